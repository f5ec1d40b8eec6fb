# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Statistics of chains during warm-up: variances, autocorrelation times, and what energy errors say of a step size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Factor by which one reading of energy errors changes a step size, at most.
MAX_CHANGE = 4.0

# States that variances are computed from, at least.
_MIN_STATES = 10
# States by whose weight variances are drawn to their common size.
_PRIOR_STATES = 5.0


class RunningMoments:
    """Mean and variances of states ``(D,)`` or ``(C, D)``, by the recursion of Welford (Technometrics, 1962).

    :ivar int count: states so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, theta: Tensor) -> None:
        """One more state."""
        self.count += 1
        if self.mean is None or self.squares is None:
            self.mean, self.squares = theta.clone(), torch.zeros_like(theta)
            return
        offset = theta - self.mean
        self.mean += offset / self.count
        self.squares += offset * (theta - self.mean)

    def scale(self) -> Tensor | None:
        """Standard deviations, as ``theta``, drawn a little to their common size; None from too few states."""
        if self.squares is None or self.count < _MIN_STATES:
            return None
        logs = (self.squares / self.count).clamp_min(1e-30).log()
        share = self.count / (self.count + _PRIOR_STATES)
        return (0.5 * (share * logs + (1 - share) * logs.mean(-1, keepdim=True))).exp()

    def state_dict(self) -> dict[str, Any]:
        """The moments so far."""
        return {"count": self.count, **{name: _copy(getattr(self, name)) for name in ("mean", "squares")}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.count = int(state["count"])
        self.mean, self.squares = _copy(state["mean"]), _copy(state["squares"])


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def autocorrelation_time(points_TCK: Tensor) -> Tensor:
    """Integrated autocorrelation time of each chain, ``(C,)``, in points: the mean over K coordinates.

    By the initial positive sequence of Geyer (Statistical Science, 1992), of the mean autocorrelation.

    :param points_TCK: T points in time of C chains.
    """
    length = len(points_TCK)
    spectrum = torch.fft.rfft(points_TCK - points_TCK.mean(0), n=2 * length, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, n=2 * length, dim=0)[:length]
    rho_TC = (covariance / covariance[0].clamp_min(1e-300)).mean(-1)
    pairs = rho_TC[: length // 2 * 2].reshape(-1, 2, rho_TC.shape[-1]).sum(1)
    is_positive = (pairs > 0).cumprod(0)
    times: Tensor = 2 * (pairs * is_positive).sum(0) - 1
    return times


def mean_without_outliers(values: list[float]) -> float:
    """The mean, with values above ten times the median taken as that: states early in a window are not typical."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(torch.minimum(tensor, 10 * tensor.median()).mean())


def step_change(variances: Tensor, target: float, power: float, limit: float) -> float:
    """Factor from a step size to one with another variance of the energy error, to whose sixth root it is proportional.

    :param variances: of each chain, ``(C,)``; their median counts. Where it is not finite the step becomes smaller.
    :param float target: the variance aimed at.
    :param float power: part of the change, on the scale of logarithms, that is made.
    :param float limit: largest factor; the smallest is that of :data:`MAX_CHANGE`.
    """
    finite = torch.where(torch.isfinite(variances), variances, math.inf)
    variance = float(finite.median()) if len(finite) else target
    change = (max(variance, 1e-30) / target) ** (-power / 6)
    return float(min(max(change, 1 / MAX_CHANGE), limit))
