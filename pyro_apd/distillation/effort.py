# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which generator, and how much work on it, by the size of the network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")

#: Weights from which the basis is held in chunks of eight bits, unless something else is asked for.
CHUNKED_FROM = 1_000_000
#: Coordinates of a chunked generator, at most: with them its file is within twelve networks in ``float32``.
MAX_CHUNKED_RANK = 44

# Principal coordinates: of one chain, more for every other, and at most.
_RANK, _RANK_PER_CHAIN, _MAX_RANK = 40, 4, 64
# And no more than one for so many draws. Large networks have few draws and short trainings, in which noise hardly makes
# up for what coordinates leave out; small ones with as many come out too wide before their training is over.
_DRAWS_A_COORDINATE, _DRAWS_A_CHUNKED_COORDINATE = 4, 2


@dataclass(frozen=True)
class Effort:
    """How much a training does.

    :ivar int num_steps: generator steps.
    :ivar int batch_size: draws of generator and chain each, a step.
    :ivar int num_probes: inputs that they are compared at.
    :ivar int num_judged: draws of generator and held-out draws, at most, that a state is judged by.
    :ivar int num_evaluations: how many states are judged.
    """

    num_steps: int = 500
    batch_size: int = 64
    num_probes: int = 96
    num_judged: int = 200
    num_evaluations: int = 20

    @classmethod
    def of(cls, num_weights: int, num_products: int = 0) -> Effort:
        """The defaults; for large networks less of everything, so that no training takes longer than that of a fully
        connected network of a million weights does.

        :param int num_weights: numbers of a draw.
        :param int num_products: products of numbers that a prediction for one input takes: many times the weights,
            where these are shared.
        """
        ratio = max(num_weights, num_products) / CHUNKED_FROM
        if ratio <= 1:
            return cls()
        return cls(
            num_steps=max(50, round(500 / ratio)),
            batch_size=max(16, round(64 / ratio**0.5)),
            num_judged=max(40, round(200 / ratio**0.5)),
            num_evaluations=max(5, round(20 / ratio**0.5)),
        )


@dataclass(frozen=True)
class Work:
    """What a prediction with one draw takes.

    :ivar int num_products: products of numbers, in matrices and filters.
    :ivar int num_bytes: of all that is computed on the way, which a gradient keeps.
    """

    num_products: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, function: Callable[[], object]) -> Work:
        """By calling it once; nothing where an operation has no rule to be counted by, or torch no way to look on."""
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter, _counted_results() as results:
                function()
        except Exception as error:
            logger.debug("The work of a prediction is not known: %s.", error)
            return cls()
        return cls(int(counter.get_total_flops()) // 2, results.num_bytes)


def _counted_results() -> Any:
    """A mode that adds up the sizes of what operations give, views of what they were given left out.

    :raises ImportError: if torch has no dispatch modes where they are today, which is not its public interface.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Results(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {_place(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            results = func(*args, **(kwargs or {}))
            for value in tree_leaves(results):
                if isinstance(value, Tensor) and _place(value) not in given:
                    self.num_bytes += value.numel() * value.element_size()
            return results

    return Results()  # type: ignore[no-untyped-call]


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def choose_rank(generator: str, num_chains: int, num_draws: int) -> int:
    """How many principal coordinates to keep of so many draws of each of so many chains."""
    is_chunked = generator == "chunked"
    most = MAX_CHUNKED_RANK if is_chunked else _MAX_RANK
    each = _DRAWS_A_CHUNKED_COORDINATE if is_chunked else _DRAWS_A_COORDINATE
    return min(most, _RANK + _RANK_PER_CHAIN * (num_chains - 1), max(1, num_chains * num_draws // each))


def choose_generator(num_weights: int, dtype: torch.dtype, storage_dtype: str | None) -> str:
    """``"chunked"`` for large networks, where nothing speaks for more digits than it keeps; else ``"coordinates"``."""
    is_coarse = dtype == torch.float32 and storage_dtype in (None, "int8")
    return "chunked" if is_coarse and num_weights >= CHUNKED_FROM else "coordinates"
