# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Distances between networks as functions: these show what single predictions do not, such as a missing mode.

A network is the vector of its predictions on all inputs. Averages over draws depend on the mean of that vector alone,
distances between draws on its whole distribution: how far draws are apart, and whether those of the generator lie where
the chain's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_apd.diagnostics.comparison.evaluation import Evaluation
from pyro_apd.diagnostics.comparison.standard_errors import Half
from pyro_apd.distillation.distances import energy_distance, spread

# Numbers of one set that are processed together.
_CHUNK_ENTRIES = 2**22
_MAX_DIRECTIONS = 10
_SHARE_OF_VARIANCE = 0.95
# Smaller distances are rounding errors: equal draws have predictions that are equal to the last digits only.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


def function_points(sets: Sequence[Evaluation]) -> Tensor:
    """A point for every draw of all sets, one set after the other, ``(T, M)`` in ``float64``.

    Euclidean distances between points are those between draws as functions. Classes: the Hellinger distance of class
    probabilities, root-mean-square over data; between 0 and 1. Numbers: the difference of means in units of the first
    set's predictive standard deviation, root-mean-square over data. There are no more coordinates than draws.

    :param sets: evaluations on the same inputs; of classes or of numbers.
    """
    if sets[0].kind == "classes":
        parts = [evaluation.values[""].sqrt() / math.sqrt(2) for evaluation in sets]
    else:
        scale_N = sets[0].scores()["sd"]
        parts = [evaluation.values[""][0] / scale_N for evaluation in sets]
    num_data = parts[0].shape[1]
    num_draws = sum(len(part) for part in parts)
    gram_TT = parts[0].new_zeros(num_draws, num_draws, dtype=torch.float64)
    width = max(1, _CHUNK_ENTRIES // parts[0][:, 0].numel())
    for start in range(0, num_data, width):
        points_TF = torch.cat([part[:, start : start + width].flatten(1).double() for part in parts])
        points_TF = points_TF - points_TF.mean(0)
        gram_TT += points_TF @ points_TF.T
    values_M, vectors_TM = torch.linalg.eigh(gram_TT / num_data)
    kept = values_M > torch.finfo(torch.float64).eps * num_draws * values_M[-1].clamp_min(0)
    points_TM: Tensor = vectors_TM[:, kept] * values_M[kept].sqrt()
    return points_TM


def disagreement(points_TM: Tensor, draws: Sequence[int]) -> float:
    """Mean distance between two different draws of a set; NaN for a single draw."""
    if len(draws) < 2:
        return math.nan
    distance = float(spread(points_TM[list(draws)].unsqueeze(0)))
    return distance if distance > _ROUNDING else 0.0


def relative_energy(points_TM: Tensor, first: Sequence[int], second: Sequence[int]) -> float:
    """Energy distance between two sets, relative to the first's :func:`disagreement`.

    About zero, and as often below, for two sets of one distribution. NaN where a set has one draw, or the draws of the
    first are all the same.
    """
    own = disagreement(points_TM, first)
    if len(second) < 2 or not own > 0:
        return math.nan
    first_1SM = points_TM[list(first)].unsqueeze(0)
    second_1SM = points_TM[list(second)].unsqueeze(0)
    return float(energy_distance(second_1SM, first_1SM)) / own


def main_coordinates(points_TM: Tensor, pool: Sequence[int]) -> Tensor:
    """Draws in the main directions of a pool, ``(T, R)``: those with 95 % of its variance, ten at most.

    Chain and generator pooled in equal number determine the directions together, so that neither looks shrunk in
    directions fitted to the other.

    :param pool: places of the draws that determine them; ``R`` is zero where these are all the same.
    """
    centred_TM = points_TM - points_TM[list(pool)].mean(0)
    _, scale_R, direction_RM = torch.linalg.svd(centred_TM[list(pool)], full_matrices=False)
    variance_R = scale_R.square()
    if not float(variance_R.sum()) > _ROUNDING**2:
        return points_TM.new_zeros(len(points_TM), 0)
    share_R = variance_R.cumsum(0) / variance_R.sum()
    count = min(_MAX_DIRECTIONS, int((share_R < _SHARE_OF_VARIANCE).sum()) + 1, max(1, len(pool) // 10))
    coordinate_TR: Tensor = centred_TM @ direction_RM[:count].T
    return coordinate_TR


def main_spread(coordinate_TR: Tensor, draws: Sequence[int]) -> float:
    """Geometric mean over main directions of the standard deviation of a set; NaN for a single draw or no direction.

    All directions count the same, while the widest dominates distances.
    """
    if len(draws) < 2 or coordinate_TR.shape[1] == 0:
        return math.nan
    sd_R = coordinate_TR[list(draws)].std(0)
    sd_R = torch.where(sd_R > _ROUNDING, sd_R, 0.0)
    return float(sd_R.clamp_min(torch.finfo(torch.float64).tiny).log().mean().exp())


def main_spread_error(coordinate_TR: Tensor, draws: Sequence[int], halves: Sequence[Half]) -> float:
    """Standard error of the logarithm of :func:`main_spread`, by halving the set."""
    squares = []
    for half in halves:
        first, second = (main_spread(coordinate_TR, [draws[i] for i in part]) for part in half)
        squares.append(math.log(first / second) ** 2 if first > 0 and second > 0 else math.nan)
    return math.sqrt(math.fsum(squares) / len(squares)) / 2


def distance_errors(points_TM: Tensor, draws: Sequence[int], halves: Sequence[Half]) -> dict[str, float]:
    """Standard errors of ``disagreement`` and ``energy`` of a set against one of another, by halving it.

    :param draws: the set's places in ``points_TM``.
    :param halves: ways to halve it, as places in ``draws``.
    """
    squares: dict[str, list[float]] = {"disagreement": [], "energy": []}
    for half in halves:
        first, second = ([draws[i] for i in part] for part in half)
        change = disagreement(points_TM, first) - disagreement(points_TM, second)
        squares["disagreement"].append(change**2)
        squares["energy"].append(relative_energy(points_TM, first, second) ** 2)
    # Energy distances of two sets of one distribution fall with the number of draws, not with its root.
    return {name: math.sqrt(math.fsum(values) / len(values)) / 2 for name, values in squares.items()}
