# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Mixtures of normal distributions, one component for each network: quantiles without random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# Halvings of the bracket: to one part in 1e15 of it.
_NUM_HALVINGS = 50
# Standard deviations from the outermost means at which a bracket begins and ends.
_NUM_SDS = 9.0


def mixture_quantiles(mean_SN: Tensor, sd_SN: Tensor, levels: list[float]) -> Tensor:
    """Quantiles of mixtures with equal weights, ``(Q, N)``, by bisection of the distribution function.

    :param mean_SN: means of the components, ``(S, N)``.
    :param sd_SN: standard deviations, ``(S, N)``.
    :param levels: Q numbers between 0 and 1.
    """
    found = []
    for level in levels:
        low_N = (mean_SN - _NUM_SDS * sd_SN).amin(0)
        high_N = (mean_SN + _NUM_SDS * sd_SN).amax(0)
        for _ in range(_NUM_HALVINGS):
            middle_N = 0.5 * (low_N + high_N)
            is_above_N = torch.special.ndtr((middle_N - mean_SN) / sd_SN).mean(0) > level
            high_N = torch.where(is_above_N, middle_N, high_N)
            low_N = torch.where(is_above_N, low_N, middle_N)
        found.append(0.5 * (low_N + high_N))
    return torch.stack(found)
