# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Distances between networks as functions: what single predictions do not show, such as a mode that is missing.

A network is the vector of its predictions on all inputs, of which averages over draws see the means alone. Distances
between draws see the law: how far draws are apart, and whether those of the generator lie where the chain's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_apd.diagnostics.comparison.evaluation import Evaluation
from pyro_apd.diagnostics.comparison.standard_errors import Half

# Numbers of one set that are worked on together.
_CHUNK_ENTRIES = 2**22
_MAX_DIRECTIONS, _SHARE_OF_VARIANCE = 10, 0.95


def function_distances(sets: Sequence[Evaluation]) -> Tensor:
    """Distance of every draw to every other, of all sets end to end, ``(T, T)`` in ``float64``.

    Classes: the Hellinger distance of class probabilities, root-mean-square over data; between 0 and 1. Numbers: the
    difference of means in units of the first set's predictive standard deviation, root-mean-square over data.

    :param sets: evaluations on the same inputs; of classes or of numbers.
    """
    if sets[0].kind == "classes":
        parts = [evaluation.values[""].sqrt() / math.sqrt(2) for evaluation in sets]
    else:
        scale_N = sets[0].scores()["sd"]
        parts = [evaluation.values[""][0] / scale_N for evaluation in sets]
    num_data, num_draws = parts[0].shape[1], sum(len(part) for part in parts)
    squares_TT = parts[0].new_zeros(num_draws, num_draws, dtype=torch.float64)
    width = max(1, _CHUNK_ENTRIES // parts[0][:, 0].numel())
    for start in range(0, num_data, width):
        points_TF = torch.cat([part[:, start : start + width].flatten(1).double() for part in parts])
        points_TF = points_TF - points_TF.mean(0)
        gram_TT = points_TF @ points_TF.T
        square_T = gram_TT.diagonal()
        squares_TT += square_T[:, None] + square_T - 2 * gram_TT
    # What is below rounding is no distance: equal draws predict equally to the last digits only.
    noise = 64 * torch.finfo(torch.float32).eps ** 2 * num_data
    return torch.where(squares_TT > noise, squares_TT, 0.0).div(num_data).sqrt()


def disagreement(distance_TT: Tensor, draws: Sequence[int]) -> float:
    """Mean distance between two different draws of a set; NaN for a single draw."""
    if len(draws) < 2:
        return math.nan
    index = torch.as_tensor(draws, device=distance_TT.device)
    return float(distance_TT[index[:, None], index].sum() / (len(draws) * (len(draws) - 1)))


def energy_distance(distance_TT: Tensor, first: Sequence[int], second: Sequence[int]) -> float:
    """How much farther draws of two sets are from each other than from their own, as a share of the first's distance.

    The energy distance (Székely and Rizzo 2013), without bias: about zero, and as often below, for two sets of one
    law. NaN where a set has one draw, or the first no spread.
    """
    rows, columns = (torch.as_tensor(index, device=distance_TT.device) for index in (first, second))
    across = float(distance_TT[rows[:, None], columns].mean())
    own, other = disagreement(distance_TT, first), disagreement(distance_TT, second)
    return (2 * across - own - other) / own if own > 0 else math.nan


def main_coordinates(distance_TT: Tensor, pool: Sequence[int]) -> Tensor:
    """Draws in the main directions of a pool, ``(T, M)``: those that hold 95 % of its variance, ten at most.

    Principal coordinates, from distances alone. Chain and generator pooled in equal number choose the directions
    together, so that neither looks shrunk in directions fitted to the other.

    :param pool: places of the draws that choose; ``M`` is zero where these are all the same.
    """
    index = torch.as_tensor(pool, device=distance_TT.device)
    square_TP = distance_TT[:, index].square()
    mean_T = square_TP.mean(1)
    gram_TP = -0.5 * (square_TP - mean_T[:, None] - mean_T[index] + mean_T[index].mean())
    values, vectors = torch.linalg.eigh(gram_TP[index])
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if not float(values.sum()) > 0:
        return distance_TT.new_zeros(len(distance_TT), 0)
    share = values.cumsum(0) / values.sum()
    count = min(_MAX_DIRECTIONS, int((share < _SHARE_OF_VARIANCE).sum()) + 1, max(1, len(pool) // 10))
    place: Tensor = gram_TP @ vectors[:, :count] / values[:count].sqrt()
    return place


def spread(coordinate_TM: Tensor, draws: Sequence[int]) -> float:
    """Geometric mean over directions of the standard deviation of a set; NaN for a single draw or no direction.

    All directions count alike, where distances are ruled by the widest.
    """
    if len(draws) < 2 or coordinate_TM.shape[1] == 0:
        return math.nan
    sd_M = coordinate_TM[torch.as_tensor(draws, device=coordinate_TM.device)].std(0)
    return float(sd_M.clamp_min(torch.finfo(torch.float64).tiny).log().mean().exp())


def spread_error(coordinate_TM: Tensor, draws: Sequence[int], halves: Sequence[Half]) -> float:
    """Standard error of the logarithm of :func:`spread`, by halving the set."""
    squares = []
    for half in halves:
        first, second = (spread(coordinate_TM, [draws[i] for i in part]) for part in half)
        squares.append(math.log(first / second) ** 2 if first > 0 and second > 0 else math.nan)
    return math.sqrt(math.fsum(squares) / len(squares)) / 2


def distance_errors(distance_TT: Tensor, draws: Sequence[int], halves: Sequence[Half]) -> dict[str, float]:
    """Standard errors of ``disagreement`` and ``energy`` of a set against one of another, by halving it.

    :param draws: the set's places in ``distance_TT``.
    :param halves: ways to halve it, as places in ``draws``.
    """
    squares: dict[str, list[float]] = {"disagreement": [], "energy": []}
    for half in halves:
        first, second = ([draws[i] for i in part] for part in half)
        change = disagreement(distance_TT, first) - disagreement(distance_TT, second)
        squares["disagreement"].append(change**2)
        squares["energy"].append(energy_distance(distance_TT, first, second) ** 2)
    # Energy distances of two sets of one law fall with the number of draws, not with its root.
    return {name: math.sqrt(math.fsum(values) / len(values)) / 2 for name, values in squares.items()}
