# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How much too wide a chain's draws come out, from gradients at the states that it visits.

Where a chain is stationary, the mean of theta^2 does not change from one step to the next. For Langevin dynamics that
is, for every weight and whatever the posterior,

    E[theta dU/dtheta] = T + epsilon E[g^2] / 4,

with g the gradient that the step used. At the target the left-hand side is T. So the second term is by how much the
weight's temperature is too high, and for a Gaussian its variance. With friction a, along a direction where the noise of
mini-batches has the variance V and the gradient on all data the mean square F, it is

    epsilon / 4 (V / a + F / (2 - a)) - b T / a,

to first order in epsilon (the notation is that of :mod:`pyro_apd.kernels.adaptation.dynamics`). Two gradients g and h
on different batches at one state give both: V is the mean of (g - h)^2 / 2, and F that of g h. A preconditioner G is
the same for theta / sqrt(G). Batches count as independent: those of an epoch without replacement cancel a part of their
noise in slow directions, so that draws are less too wide than stated.

Curvature at a few states says less: that of a network varies by an order of magnitude within a posterior, is larger
where steps are small, and on one mini-batch it is mostly that of single rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.kernels.adaptation.dynamics import Dynamics

# Readings that say something.
_MIN_READINGS = 3


@dataclass(frozen=True)
class Heat:
    """Share by which variances come out too large, per unit of epsilon.

    :ivar float mean: over all weights.
    :ivar float hottest: over those of the site where it is largest, and ``site``, its name.
    :ivar float offset: what is to be subtracted, b / a.
    """

    mean: float
    hottest: float
    site: str
    offset: float = 0.0

    def step_by_mean(self, allowed: float) -> float:
        """The largest epsilon at which the mean over all weights is no more than ``allowed``."""
        return (allowed + self.offset) / max(self.mean, 1e-30)

    def step_by_site(self, allowed: float) -> float:
        """The largest epsilon at which the mean over the weights of each site is no more than ``allowed``."""
        return (allowed + self.offset) / max(self.hottest, 1e-30)

    def inflation(self, step_size: float) -> float:
        """The mean over all weights."""
        return step_size * self.mean - self.offset


class GradientReadings:
    """V and F by site, over the states of a chain, or of C chains. It never waits for the device.

    :param names: of sites, and ``sizes``, their numbers of weights.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        self._names, self._sizes = list(names), list(sizes)
        self._noise: list[Tensor] = []
        self._slope: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._noise)

    def add(self, gradient: Tensor, other: Tensor | None, epoch_length: int | None) -> None:
        """One reading.

        :param gradient: gradient of U in the sampler's metric, ``(D,)`` or ``(C, D)``.
        :param other: that on another batch at the same state; None where every batch is all the data.
        :param epoch_length: batches per epoch without replacement; None for independent batches.
        """
        noise = torch.zeros_like(gradient) if other is None else (gradient - other).square() / 2
        slope = gradient * (gradient if other is None else other)
        if other is not None and epoch_length is not None:
            # Batches of one epoch have the covariance -V / (k - 1).
            noise = noise * ((epoch_length - 1) / epoch_length)
            slope = slope + noise / (epoch_length - 1)
        self._noise.append(self._by_site(noise))
        self._slope.append(self._by_site(slope))

    def drop_old(self, share: float) -> None:
        """Forgets this share of the readings, from the front."""
        first = round(share * len(self._noise))
        self._noise, self._slope = self._noise[first:], self._slope[first:]

    def means(self) -> tuple[Tensor, Tensor] | None:
        """V and F summed over the weights of each site, ``(..., sites)``; None from too few readings."""
        if len(self._noise) < _MIN_READINGS:
            return None
        return torch.stack(self._noise).mean(0), torch.stack(self._slope).mean(0).clamp_min(0.0)

    def heat(self, noise: Tensor, slope: Tensor, dynamics: Dynamics, temperature: float) -> Heat:
        """Of V and F ``(sites,)``, as by :meth:`means`, averaged over chains."""
        friction = dynamics.friction
        sums = (noise / friction + slope / (2 - friction)).double().cpu() / (4 * temperature)
        shares = sums / torch.tensor(self._sizes, dtype=torch.float64).clamp_min(1)
        site = int(shares.nan_to_num(torch.inf).argmax())
        offset = dynamics.noise_estimate / friction
        return Heat(float(sums.sum()) / sum(self._sizes), float(shares[site]), self._names[site], offset)

    def state_dict(self) -> dict[str, Any]:
        """All readings."""
        return {"noise": list(self._noise), "slope": list(self._slope)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._noise, self._slope = list(state["noise"]), list(state["slope"])

    def _by_site(self, values: Tensor) -> Tensor:
        return torch.stack([part.sum(-1) for part in values.split(self._sizes, -1)], -1)
