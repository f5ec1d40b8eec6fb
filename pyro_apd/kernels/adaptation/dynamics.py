# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A sampler's steps on a Gaussian: how much too wide it comes out, and how fast the start is forgotten.

Along a direction of curvature lambda and of variance V of the mini-batch gradient, the three samplers are the linear
recursion of equation 15 of Chen, Fox & Guestrin (ICML 2014), with friction a = 1 for Langevin dynamics:

    v <- (1 - a) v - (epsilon / 2) (lambda x + noise of variance V) + N(0, (a - b) epsilon T),    x <- x + v

Its stationary variance, exactly, is that of the target, T / lambda, times

    (1 - b / a + phi epsilon V / (4 a T)) / (1 - epsilon lambda / (4 (2 - a)))

with phi = 1 for independent batches. Batches of an epoch without replacement cancel each other; phi < 1 says by how
much. A preconditioner G is the same recursion for theta / sqrt(G).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Autocorrelations are summed over epochs of up to so many batches; longer ones count as independent batches.
_LONGEST_EPOCH = 2000


@dataclass(frozen=True)
class Dynamics:
    """A sampler's recursion.

    :ivar float friction: a; 1 is Langevin dynamics.
    :ivar float noise_estimate: b, the share of the friction's noise that is left to the mini-batches.
    :ivar metric: preconditioner G ``(D,)`` or ``(C, D)``, which multiplies epsilon; None for 1.
    """

    friction: float = 1.0
    noise_estimate: float = 0.0
    metric: Tensor | None = None

    @property
    def limit(self) -> float:
        """epsilon * lambda at which steps become unstable."""
        return 4 * (2 - self.friction)

    def variance_ratio(
        self, step_size: float, curvature: Tensor, noise: Tensor, temperature: float, epoch_length: int | None = None
    ) -> Tensor:
        """Stationary variance over T / lambda along directions of a ``curvature`` and ``noise`` V; inf if unstable.

        :param curvature: lambda, of any shape; epsilon is that of the sampler, G being in the curvature already.
        :param noise: variance of the mini-batch gradient, of the same shape.
        :param epoch_length: batches an epoch without replacement; None for independent batches.
        """
        x = step_size * curvature
        added = self.cancelling(x, epoch_length) * step_size * noise / (4 * self.friction * temperature)
        heat = 1 - self.noise_estimate / self.friction + added
        return torch.where(x < self.limit, heat / (1 - x / self.limit).clamp_min(1e-12), math.inf)

    def cancelling(self, x: Tensor, epoch_length: int | None) -> Tensor:
        """phi: variance by mini-batch noise in epochs of ``epoch_length`` over that by independent batches.

        Two batches of an epoch of k have covariance -V / (k - 1); so many steps j apart, they are of one epoch with
        probability 1 - j / k. Hence phi = 1 - 2 sum over j of (k - j) rho_j / (k (k - 1)), with rho the
        autocorrelation of x.

        :param x: epsilon * lambda, of any shape.
        """
        k = epoch_length
        if k is None or k > _LONGEST_EPOCH:
            return torch.ones_like(x)
        if k <= 1:
            return torch.zeros_like(x)
        first, second = self._roots(x)
        lag = torch.arange(1, k, dtype=torch.float64)
        one, other = first.unsqueeze(-1), second.unsqueeze(-1)
        scale = ((one - other) * (1 + one * other)).reciprocal()
        rho = (scale * (one ** (lag + 1) * (1 - other**2) - other ** (lag + 1) * (1 - one**2))).real
        return (1 - 2 * (rho * (k - lag)).sum(-1) / (k * (k - 1))).clamp_min(0).to(x.dtype)

    def rate(self, x: Tensor) -> Tensor:
        """Decrease of the logarithm of a deviation per step, at x = epsilon * lambda below the limit."""
        first, second = self._roots(x)
        return -torch.maximum(first.abs(), second.abs()).log().to(x.dtype)

    def _roots(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Roots of z^2 - (2 - a - x / 2) z + (1 - a), by which the recursion's memory decays."""
        middle = (2 - self.friction - x.double() / 2) / 2
        # Kept apart a little where they meet, as formulas divide by their difference.
        spread = middle.square() - (1 - self.friction)
        spread = torch.where(spread.abs() < 1e-12, 1e-12, spread).to(torch.complex128).sqrt()
        return middle + spread, middle - spread
