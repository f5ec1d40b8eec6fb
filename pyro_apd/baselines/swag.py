# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SWAG: a Gaussian around the average of what gradient descent passes through.

**References**

Maddox, Garipov, Izmailov, Vetrov and Wilson, *A Simple Baseline for Bayesian Uncertainty in Deep Learning*, NeurIPS
2019, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd.baselines.descent import Descent, Start, check_counts, descend
from pyro_apd.generators import LowRankGenerator
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime.global_state import gradients


@gradients("swag")
def swag(
    model: Callable[..., Any],
    *args: Any,
    rank: int = 20,
    num_steps: int = 5000,
    num_iterates: int = 100,
    steps_per_iterate: int = 50,
    batch_size: int | None = None,
    learning_rate: float = 0.05,
    momentum: float = 0.0,
    init_strategy: Callable[..., Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> DistilledPosterior:
    """Runs SGD, continues at a constant rate, and fits a Gaussian of low rank plus a diagonal to the iterates.

    With the mean of all iterates and the last K deviations from the mean of those before,

        covariance = diag(mean of squares - square of the mean) / 2 + deviations' deviations / (2 (K - 1))

    Other parameters, and errors, as of :func:`~pyro_apd.baselines.map_estimate`.

    :param int rank: K, at least 2; the file takes K + 2 networks.
    :param int num_steps: steps before the first iterate is kept.
    :param int num_iterates: iterates to average, at least ``rank``.
    :param int steps_per_iterate: steps from one to the next; the paper takes an epoch.
    :returns: a posterior as :func:`~pyro_apd.distill` gives, which can be saved, drawn from and used as a guide.
    """
    check_counts(rank=rank, num_iterates=num_iterates, steps_per_iterate=steps_per_iterate)
    if rank < 2 or num_iterates < rank:
        raise ValueError(f"`rank` must be at least 2, and at most num_iterates={num_iterates}; got {rank}.")
    descent = Descent(num_steps, learning_rate, momentum)
    start = Start.prepare(model, args, kwargs, batch_size, init_strategy, seed)
    descend(start, descent, "SWAG", progress, model)
    moments = SwagMoments(rank)
    collecting = replace(descent, num_steps=num_iterates * steps_per_iterate)
    with torch.no_grad():
        for i, theta_D in enumerate(collecting.positions(start, "SWAG, averaging", progress), 1):
            if i % steps_per_iterate == 0:
                moments.add(theta_D)
    posterior = DistilledPosterior(start.potential.layout, moments.generator())
    posterior.metadata = {"method": "SWAG", "seed": seed, "num_iterates": num_iterates}
    posterior.frozen = FrozenTensors.of_run(model, posterior.layout.names, args, kwargs)
    return posterior


class SwagMoments:
    """Mean, mean square and last deviations of iterates, of which none is kept.

    :param int rank: K, deviations to keep.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._count = rank, 0
        self._deviations: list[Tensor] = []

    def add(self, theta_D: Tensor) -> None:
        """Takes in the next iterate."""
        if self._count == 0:
            # Squares are taken of distances from the first iterate: their difference keeps its digits.
            self._first_D = theta_D.clone()
            self._mean_D = torch.zeros_like(theta_D)
            self._square_D = torch.zeros_like(theta_D)
        self._count += 1
        offset_D = theta_D - self._first_D
        self._mean_D += (offset_D - self._mean_D) / self._count
        self._square_D += (offset_D.square() - self._square_D) / self._count
        self._deviations = [*self._deviations, offset_D - self._mean_D][-self._rank :]

    def generator(self) -> LowRankGenerator:
        """The Gaussian."""
        variance_D = (self._square_D - self._mean_D.square()).clamp_min(0.0)
        deviations_KD = torch.stack(self._deviations) / math.sqrt(2 * (len(self._deviations) - 1))
        return LowRankGenerator.of(self._first_D + self._mean_D, deviations_KD, (variance_D / 2).sqrt())
