# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Options of a distillation, and the checks of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyro_apd.distillation.critic import GAN_LOSSES
from pyro_apd.distillation.source import MIN_DRAWS
from pyro_apd.generators import GENERATORS
from pyro_apd.generators.precision import check_dtype
from pyro_apd.runtime import checks
from pyro_apd.runtime.seeds import checked_seed

_DEFAULT = "None takes the default."
_NUM_CHECKPOINTS = 20


@dataclass(frozen=True)
class DistillOptions:
    """Options of :func:`~pyro_apd.distill`; None for the defaults.

    :ivar int share_of_steps: an online round before the last takes one in this many of the steps.
    :raises ValueError: naming the option that is out of range or has no meaning.
    """

    generator: str | None = None
    objective: str | None = None
    num_steps: int | None = None
    rank: int | None = None
    byte_budget: float | int | None = None
    storage_dtype: str | None = None
    seed: int | None = None
    share_of_steps: int = 1

    def __post_init__(self) -> None:
        if self.storage_dtype is not None:
            check_dtype(self.storage_dtype, "storage_dtype")
        if self.generator is not None:
            if self.generator in ("coordinates", "chunked"):
                raise ValueError(
                    f"generator={self.generator!r} is replaced by 'subspace', the default, which takes fewer bytes for "
                    "networks of any size; leave generator= out. Files of the old kinds can still be read."
                )
            checks.choice("generator", self.generator, sorted(GENERATORS), _DEFAULT)
        for name, smallest in (("num_steps", 0), ("rank", 1)):
            value = getattr(self, name)
            if value is not None:
                # Python's own integers, which JSON holds.
                object.__setattr__(self, name, checks.integer(name, value, at_least=smallest, hint=_DEFAULT))
        object.__setattr__(self, "seed", checked_seed(self.seed))
        if self.byte_budget is not None:
            object.__setattr__(self, "byte_budget", checked_budget(self.byte_budget))
        for name in ("rank", "byte_budget"):
            if self.generator == "paper" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no meaning for generator='paper', whose size is that of its "
                    "layers; leave it out."
                )
        if self.objective is not None and (self.generator != "paper" or self.objective not in GAN_LOSSES):
            raise ValueError(
                f"objective={self.objective!r} with generator={self.generator or 'subspace'!r}: accepted are "
                f"{sorted(GAN_LOSSES)} with generator='paper'. The objective of the other generators follows from what "
                "is known of the model."
            )

    def file_dtype(self, dtype: torch.dtype) -> str:
        """Precision of the file, by default by the ``dtype`` of the draws: digits beyond those of float32 are kept."""
        is_narrow = self.generator != "paper" and dtype == torch.float32
        return self.storage_dtype or ("int8" if is_narrow else "float32")

    def steps(self, default: int) -> int:
        """Generator steps to take, ``default`` unless ``num_steps`` is given."""
        return (default if self.num_steps is None else self.num_steps) // self.share_of_steps


def checked_budget(value: object) -> float | int:
    """A number of bytes (an integer), or of networks (a float).

    :raises ValueError: if it is neither, or not positive.
    """
    hint = "Give networks as a float (1.5), or bytes as an integer (250_000)."
    if checks.is_integer(value):
        return checks.integer("byte_budget", value, at_least=1, hint=hint)
    return checks.number("byte_budget", value, above=0.0, hint=hint)


@dataclass(frozen=True)
class RunLengths:
    """Numbers of an online run, after checks; as of :func:`~pyro_apd.distill_online`.

    :ivar int checkpoint_every: draws between checkpoints; by default a twentieth of the run.
    """

    num_samples: int
    warmup_steps: int
    num_chains: int
    buffer_size: int
    rounds: int
    checkpoint_every: int

    @classmethod
    def checked(
        cls,
        num_samples: int,
        warmup_steps: int | None,
        num_chains: int,
        buffer_size: int,
        rounds: int,
        checkpoint_every: int | None,
    ) -> RunLengths:
        """The numbers as Python's own integers, with defaults in place of None.

        :raises ValueError: naming the number that is out of range.
        """
        num_samples = checks.integer("num_samples", num_samples, at_least=MIN_DRAWS)
        if warmup_steps is None:
            warmup_steps = num_samples // 2
        warmup_steps = checks.integer("warmup_steps", warmup_steps, at_least=0)
        num_chains = checks.integer("num_chains", num_chains)
        if checkpoint_every is None:
            checkpoint_every = max(1, (num_samples + warmup_steps) // _NUM_CHECKPOINTS)
        return cls(
            num_samples,
            warmup_steps,
            num_chains,
            checks.integer("buffer_size", buffer_size, at_least=max(2 * MIN_DRAWS, 2 * num_chains)),
            checks.integer("rounds", rounds),
            checks.integer("checkpoint_every", checkpoint_every),
        )

    @property
    def capacity(self) -> int:
        """Draws per chain that the buffer holds."""
        return self.buffer_size // self.num_chains

    @property
    def schedule(self) -> list[int]:
        """Draws per chain after which there is a round, the last one left out."""
        counts = [self.num_samples // 2**k for k in range(self.rounds - 1, 0, -1)]
        return [count for count in counts if count]
