# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Means, deviations and quantiles of sites from independent draws, with what the number of draws leaves uncertain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_apd.models.layout import Layout

# Columns sorted together.
_BLOCK = 4096


class Estimates(dict[str, Tensor]):
    """Values by site, as an autoguide gives them, and their Monte-Carlo errors.

    :ivar dict error: standard error of each entry, by site, of the same shape.
    :ivar int num_samples: draws that they are from.
    """

    def __init__(self, values: dict[str, Tensor], error: dict[str, Tensor], num_samples: int) -> None:
        super().__init__(values)
        self.error = error
        self.num_samples = num_samples


def mean_and_sd(draws: dict[str, Tensor]) -> tuple[Estimates, Estimates]:
    """Means and standard deviations of draws ``(S, ...)``, S at least 2.

    The error of a deviation takes the fourth moment into account, so that it holds for heavy tails as well.
    """
    mean, mean_error, sd, sd_error = {}, {}, {}, {}
    num_samples = 0
    for name, value in draws.items():
        num_samples = len(value)
        mean[name] = value.mean(0)
        centred = value - mean[name]
        variance = centred.square().mean(0)
        fourth = centred.square_().square_().mean(0)
        sd[name] = (variance * (num_samples / (num_samples - 1))).sqrt()
        mean_error[name] = sd[name] / math.sqrt(num_samples)
        spread = (fourth - variance.square()).clamp_min(0.0) / num_samples
        tiny = torch.finfo(value.dtype).tiny
        sd_error[name] = torch.where(sd[name] > 0, spread.sqrt() / (2 * sd[name]).clamp_min(tiny), 0.0)
    return Estimates(mean, mean_error, num_samples), Estimates(sd, sd_error, num_samples)


def quantiles(layout: Layout, theta_SD: Tensor, levels: Sequence[float]) -> Estimates:
    """Quantiles of unconstrained draws, taken to where each site lives: ``(Q, *site.shape)`` by site.

    The error is half the distance of the order statistics one standard error of the level away on either side.
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
    values = levels.tolist() if isinstance(levels, Tensor) else levels
    values = [values] if isinstance(values, (int, float)) else values
    is_right = isinstance(values, (list, tuple)) and len(values) > 0
    if not is_right or not all(isinstance(q, (int, float)) and 0 <= q <= 1 for q in values):  # type: ignore[attr-defined]
        raise ValueError(f"`quantiles` must be numbers from 0 to 1, such as [0.05, 0.5, 0.95]; got {levels!r}.")
    return [float(q) for q in values]  # type: ignore[attr-defined]
