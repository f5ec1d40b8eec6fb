# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What the warm-up of the microcanonical kernel finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: Variance of the energy error of a step, per weight, that the step size is chosen for.
ENERGY_VARIANCE = 5e-4
#: Squared energy errors ``(C,)`` of a step of each chain, the mean over so many trial steps of a size on one batch.
Trial = Callable[[Any, float, int], Tensor]


@dataclass(frozen=True)
class MicrocanonicalSettings:
    """What is found during the warm-up, and how.

    :ivar bool adapts_step: whether to find the step size; so ``adapts_length`` for L, and ``preconditions``.
    :ivar float max_inflation: share by which mini-batches may widen variances.
    :ivar trial: energy errors of trial steps.
    :ivar float energy_variance: variance of the energy error of a step, per weight, that is aimed at.
    """

    adapts_step: bool
    adapts_length: bool
    preconditions: bool
    max_inflation: float
    trial: Trial
    energy_variance: float = ENERGY_VARIANCE
