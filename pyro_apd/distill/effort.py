# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which generator, and how much work on it, by the size of the network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

logger = logging.getLogger("pyro_apd")

#: Weights from which the basis is held in chunks of eight bits, unless something else is asked for.
CHUNKED_FROM = 1_000_000
#: Coordinates of a chunked generator, at most: with them its file is within twelve networks in ``float32``.
MAX_CHUNKED_RANK = 44


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


def count_products(function: Callable[[], object], num_inputs: int) -> int:
    """Products that a call takes for each of so many inputs, in matrices and filters; 0 if they cannot be counted."""
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
        return int(counter.get_total_flops()) // (2 * max(1, num_inputs))
    except Exception as error:  # an operation that the counter has no rule for
        logger.debug("The work of a prediction is not known: %s.", error)
        return 0


def choose_generator(num_weights: int, dtype: torch.dtype, storage_dtype: str | None) -> str:
    """``"chunked"`` for large networks, where nothing speaks for more digits than it keeps; else ``"coordinates"``."""
    is_coarse = dtype == torch.float32 and storage_dtype in (None, "int8")
    return "chunked" if is_coarse and num_weights >= CHUNKED_FROM else "coordinates"
