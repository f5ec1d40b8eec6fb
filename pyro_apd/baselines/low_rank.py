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
from pyro_apd.generators.coordinates import principal_coordinates
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import ChainsLike


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
        principal = principal_coordinates(theta_SD, rank)
        left_SD = theta_SD - principal.location_D - principal.coordinates_SR @ principal.basis_RD
        return LowRankGenerator.of(principal.location_D, principal.basis_RD, left_SD.std(0, correction=0))
