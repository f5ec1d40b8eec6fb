# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Quantiles of sites from independent draws, with their Monte-Carlo errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.models.layout import Layout
from pyro_apd.runtime.checks import is_number

# Columns per block that is sorted.
_BLOCK = 4096


class Estimates(dict[str, Tensor]):
    """Values by site, as an autoguide gives them, and their Monte-Carlo errors.

    :ivar dict error: standard error of each entry, by site, of the same shape.
    :ivar int num_samples: number of draws that they are estimated from.
    """

    def __init__(self, values: dict[str, Tensor], error: dict[str, Tensor], num_samples: int) -> None:
        super().__init__(values)
        self.error = error
        self.num_samples = num_samples


def quantiles(layout: Layout, theta_SD: Tensor, levels: Sequence[float]) -> Estimates:
    """Quantiles of unconstrained draws, constrained: ``(Q, *site.shape)`` by site.

    The error is half the distance between the quantiles at one standard error of the level below and above.
    """
    num_samples, size = theta_SD.shape
    level_Q = torch.tensor(levels, dtype=torch.float64)
    spread_Q = (level_Q * (1 - level_Q) / num_samples).sqrt()
    places_3Q = torch.stack([level_Q - spread_Q, level_Q, level_Q + spread_Q]).clamp(0, 1) * (num_samples - 1)
    below_3Q, share_3Q = places_3Q.floor().long().to(theta_SD.device), places_3Q.frac().to(theta_SD)
    above_3Q = (below_3Q + 1).clamp_max(num_samples - 1)
    found_3QD = theta_SD.new_empty(3, len(levels), size)
    for start in range(0, size, _BLOCK):
        span = slice(start, min(start + _BLOCK, size))
        sorted_SB = theta_SD[:, span].sort(0).values
        found_3QD[..., span] = torch.lerp(sorted_SB[below_3Q], sorted_SB[above_3Q], share_3Q.unsqueeze(-1))
    low, middle, high = (layout.constrain(found_QD) for found_QD in found_3QD)
    error = {name: (high[name] - low[name]).abs() / 2 for name in middle}
    return Estimates(middle, error, num_samples)


def check_levels(levels: object) -> list[float]:
    """``levels`` as a list.

    :raises ValueError: unless it is a number, or numbers, from 0 to 1.
    """
    found = levels.tolist() if isinstance(levels, Tensor) else levels
    values: list[Any] = list(found) if isinstance(found, (list, tuple)) else [found]
    if not values or not all(is_number(value) and 0 <= value <= 1 for value in values):
        raise ValueError(f"quantiles={levels!r} must be numbers from 0 to 1, such as [0.05, 0.5, 0.95].")
    return [float(value) for value in values]
