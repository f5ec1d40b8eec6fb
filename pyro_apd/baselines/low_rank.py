# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A Gaussian of low rank plus a diagonal, SWAG's form, fitted to the draws of a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.baselines.descent import check_counts
from pyro_apd.distillation.source import read_source
from pyro_apd.generators import LowRankGenerator
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import ChainsLike

# Columns that are multiplied in double precision at a time.
_COLUMNS = 2**14


def low_rank(
    source: ChainsLike,
    model: Callable[..., Any] | None = None,
    *,
    rank: int = 10,
    data: Sequence[Any] | None = None,
    group_by_chain: bool = False,
) -> DistilledPosterior:
    """The Gaussian with the draws' mean, their leading principal directions, and the variances that these leave.

    Distillation without an adversary, for comparison: every file of ``rank + 2`` networks should beat it.

    :param source: as of :func:`~pyro_apd.distill`, and likewise ``model``, ``data`` and ``group_by_chain``.
    :param int rank: directions, at most; there are fewer where the draws move in fewer.
    :raises ValueError: if ``rank`` is not positive, or draws are malformed or all the same.
    """
    check_counts(rank=rank)
    draws = read_source(source, model, data, group_by_chain)
    posterior = DistilledPosterior(draws.layout, fit_low_rank(draws.theta_CSD.flatten(0, 1), rank))
    posterior.metadata = {"method": "low rank plus diagonal"}
    posterior.frozen = draws.frozen_tensors()
    return posterior


def fit_low_rank(theta_SD: Tensor, rank: int) -> LowRankGenerator:
    """The same of unconstrained draws ``(S, D)``."""
    with torch.no_grad():
        location_D, basis_RD, coordinates_SR = principal_directions(theta_SD, rank)
        left_SD = theta_SD - location_D - coordinates_SR @ basis_RD
        return LowRankGenerator.of(location_D, basis_RD, left_SD.std(0, correction=0))


def principal_directions(theta_SD: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(D,)`` of draws, their directions of largest variance ``(R, D)``, each as long as the standard deviation
    along it, and the draws' coordinates in these ``(S, R)``.

    From the ``S x S`` Gram matrix: nothing is ever ``D x D``. Directions without variance are left out, so that there
    may be fewer than ``rank``. Of each, the coordinate of largest absolute value is positive.

    :raises ValueError: if all draws are the same.
    """
    num_draws = len(theta_SD)
    location_D = theta_SD.mean(0)
    # In double precision, since squaring halves the number of correct digits of directions of small variance.
    gram_SS = torch.zeros(num_draws, num_draws, dtype=torch.float64, device=theta_SD.device)
    for part_SW in (theta_SD - location_D).split(_COLUMNS, 1):
        gram_SS += part_SW.double() @ part_SW.double().mT
    variance_S, vectors_SS = torch.linalg.eigh(gram_SS / num_draws)
    resolution = num_draws * torch.finfo(theta_SD.dtype).eps
    rank = min(rank, int((variance_S > resolution * variance_S[-1]).sum()))
    # The draws are compared: the mean of equal ones may be off by its rounding, which would pass for a direction.
    if bool((theta_SD == theta_SD[0]).all()) or rank == 0:
        raise ValueError("All draws are the same, so there is no posterior to distil. Check that the chain moved.")
    left_SR = vectors_SS[:, num_draws - rank :].flip(1)
    left_SR = left_SR * left_SR.gather(0, left_SR.abs().argmax(0, keepdim=True)).sign()
    coordinates_SR = (num_draws**0.5 * left_SR).to(theta_SD)
    basis_RD = left_SR.to(theta_SD).mT @ (theta_SD - location_D) / num_draws**0.5
    return location_D, basis_RD, coordinates_SR
