# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a distillation is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_apd.distillation.critic import GAN_LOSSES
from pyro_apd.generators import GENERATORS
from pyro_apd.generators.precision import check_dtype
from pyro_apd.runtime import checks
from pyro_apd.runtime.seeds import checked_seed


@dataclass(frozen=True)
class DistillOptions:
    """Options of :func:`~pyro_apd.distill`; None for the defaults.

    :ivar int share_of_steps: an online round before the last takes one in so many of the steps.
    :raises ValueError: naming the option that is out of range or has no meaning.
    """

    generator: str | None = None
    objective: str | None = None
    num_steps: int | None = None
    rank: int | None = None
    storage_dtype: str | None = None
    seed: int | None = None
    share_of_steps: int = 1

    def __post_init__(self) -> None:
        if self.storage_dtype is not None:
            check_dtype(self.storage_dtype, "storage_dtype")
        if self.generator is not None:
            checks.choice("generator", self.generator, sorted(GENERATORS), "None chooses by the size of the network.")
        for name, smallest in (("num_steps", 0), ("rank", 1)):
            value = getattr(self, name)
            if value is not None:
                # Python's own integers, which JSON holds.
                object.__setattr__(self, name, checks.integer(name, value, at_least=smallest, hint=_DEFAULT))
        object.__setattr__(self, "seed", checked_seed(self.seed))
        if self.generator == "paper" and self.rank is not None:
            raise ValueError(
                f"rank={self.rank} has no meaning for generator='paper', which has no coordinates; leave it out."
            )
        if self.objective is not None and (self.generator != "paper" or self.objective not in GAN_LOSSES):
            raise ValueError(
                f"objective={self.objective!r} with generator={self.generator or 'coordinates'!r}: accepted are "
                f"{sorted(GAN_LOSSES)} with generator='paper'. The objective of the other generators follows from what "
                "is known of the model."
            )

    def steps(self, default: int) -> int:
        """Generator steps to take, ``default`` unless ``num_steps`` is given."""
        return (default if self.num_steps is None else self.num_steps) // self.share_of_steps


_DEFAULT = "None takes the default."
