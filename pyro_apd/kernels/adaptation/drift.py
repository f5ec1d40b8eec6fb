# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the warm-up was long enough: detects drift of the kept draws, and computes from the prior the steps needed.

Two quantities are tested: the potential, and for each site the root mean square of its entries, the standard deviation
of a layer's weights. In a chain at its target both change by chance alone. The prior has the weakest gradient: a
direction that the data do not inform returns to it at a rate of epsilon / (2 sd^2) per Langevin step, and needs
6 sd^2 / epsilon steps until 5 % of the start are left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.kernels.adaptation.dynamics import Dynamics

# Part of the start that is left when it counts as forgotten.
_FORGOTTEN = 0.05
# Points in time kept per run, at most; when there are as many, every second one is dropped.
_NUM_POINTS = 256
# Averages that drift is tested on, and the fewest points for that.
_NUM_BLOCKS, _MIN_POINTS = 24, 48
# Shares of the run over which a start may fade, beside the steady drift that is looked for too; and what the choice of
# the best of these shapes, which are much alike, multiplies p-values by.
_FADING, _SELECTION = (0.06, 0.12, 0.25, 0.5, 1.0), 3.0
# Share of stationary runs that are reported, at most; divided among all series of a run.
_FALSE_ALARMS = 0.01
# A shape that explains this share of a series' variance is a drift. Of stationary series with an autocorrelation time
# of a fifth of the run, less than one in a thousand is explained so well.
_EXPLAINED = 0.97
# Changes that matter: of a root mean square, as a share of it; of the potential, in sds of its later draws.
_MIN_CHANGE, _MIN_RISE = 0.05, 1.0


class WarmupWarning(UserWarning):
    """The kept draws had not reached the target: the warm-up was too short."""


@dataclass(frozen=True)
class Drift:
    """A quantity that drifted over the kept draws.

    :ivar str name: ``"potential"`` or a site.
    :ivar int chain: of several chains, which; None for one.
    :ivar float first: fitted value where the kept draws begin, and ``last`` where they end.
    """

    name: str
    chain: int | None
    first: float
    last: float


class DriftWatch:
    """Collects, over a run's kept draws, the potential and the root mean square of each site.

    It keeps at most 256 points in time however long the run is, and never waits for the device.

    :param names: sites, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._points: list[Tensor] = []
        self._stride, self._count = 1, 0

    def add(self, energy: Tensor, pieces: Sequence[Tensor]) -> None:
        """One draw: U ``()`` or ``(C,)``, and theta by site, ``(D_site,)`` or ``(C, D_site)``."""
        if self._count % self._stride == 0:
            sizes = [piece.norm(dim=-1) / math.sqrt(max(piece.shape[-1], 1)) for piece in pieces]
            self._points.append(torch.stack([energy.to(sizes[0]) if sizes else energy, *sizes], -1))
            if len(self._points) >= _NUM_POINTS:
                self._points = self._points[::2]
                self._stride *= 2
        self._count += 1

    def drifts(self, temperature: float) -> list[Drift]:
        """Quantities whose drift is significant and large enough to matter. Empty for short runs, and at temperature 0.

        A potential's drift matters from one sd of its later draws on, mini-batch noise included; a site's, where
        its root mean square changes by 5 %.
        """
        if len(self._points) < _MIN_POINTS or temperature == 0:
            return []
        points = torch.stack(self._points).double().cpu()
        is_single = points.dim() == 2
        points_TCK = points.unsqueeze(1) if is_single else points
        num_points, num_chains, num_series = points_TCK.shape
        first, last, p_value = fitted_change(points_TCK.reshape(num_points, -1))
        found = []
        for i in range(num_chains * num_series):
            chain, series = divmod(i, num_series)
            change, size = abs(float(last[i] - first[i])), abs(float(last[i]))
            spread = float(points_TCK[num_points // 2 :, chain, series].std())
            floor = _MIN_RISE * spread if series == 0 else _MIN_CHANGE * size
            if float(p_value[i]) < _FALSE_ALARMS / (num_chains * num_series) and change > floor:
                name = "potential" if series == 0 else self.names[series - 1]
                found.append(Drift(name, None if is_single else chain, float(first[i]), float(last[i])))
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that was collected."""
        points = torch.stack(self._points) if self._points else torch.empty(0)
        return {"points": points, "stride": self._stride, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._points = list(state["points"].unbind(0)) if len(state["points"]) else []
        self._stride, self._count = int(state["stride"]), int(state["count"])


def fitted_change(series_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last value of each series by the best of some fits, and how likely chance alone explains the change.

    The fits are a straight line and starts that fade sooner or later; errors allow for autocorrelation, by a
    first-order autoregression of the averages of 24 blocks (with the small-sample correction of Kendall, 1954).

    :param series_TK: float64 ``(T, K)``; T at least 48.
    :returns: first and last values and p-values (two-sided), each ``(K,)``.
    """
    length = len(series_TK) // _NUM_BLOCKS
    # The last draws matter more than the first: what does not fit into blocks is left out in front of the end.
    blocks_MK = series_TK[: length * _NUM_BLOCKS].reshape(_NUM_BLOCKS, length, -1).mean(1)
    time = (torch.arange(_NUM_BLOCKS, dtype=torch.float64) + 0.5) / _NUM_BLOCKS
    shapes = [(time, 0.0, 1.0), *((torch.exp(-time / f), 1.0, math.exp(-1 / f)) for f in _FADING)]
    fits = [_fit(blocks_MK, *shape) for shape in shapes]
    first_FK, last_FK, p_FK = (torch.stack(parts) for parts in zip(*fits, strict=True))
    best = p_FK.argmin(0, keepdim=True)
    first, last, p_value = (values.gather(0, best)[0] for values in (first_FK, last_FK, p_FK))
    return first, last, (_SELECTION * p_value).clamp_max(1.0)


def _fit(blocks_MK: Tensor, shape: Tensor, begin: float, end: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fitted values where the shape is ``begin`` and ``end``, and the p-value of its coefficient."""
    centred, mean = shape - shape.mean(), blocks_MK.mean(0)
    slope = centred @ blocks_MK / centred.square().sum()
    rest_MK = blocks_MK - mean - torch.outer(centred, slope)
    first, last = (mean + slope * (value - float(shape.mean())) for value in (begin, end))
    # Almost all is drift: the rest is the smooth misfit of the shape, which the error estimate is not made for.
    total = (blocks_MK - mean).square().sum(0)
    is_plain = rest_MK.square().sum(0) < (1 - _EXPLAINED) * total
    return first, last, torch.where(is_plain, 0.0, _p_value(slope, rest_MK, centred))


def _p_value(slope: Tensor, rest_MK: Tensor, centred: Tensor) -> Tensor:
    """Two-sided p-value of a slope whose residuals are autocorrelated."""
    count = len(rest_MK)
    squares = rest_MK.square().sum(0).clamp_min(1e-300)
    rho = (rest_MK[1:] * rest_MK[:-1]).sum(0) / squares
    rho = (rho + (2 + 4 * rho) / count).clamp(0.0, 0.95)
    inflation = (1 + rho) / (1 - rho)
    variance = squares / (count - 2) * inflation / centred.square().sum()
    freedom = (count / inflation - 2).clamp_min(2.0)
    return _student_tail(slope.abs() / variance.sqrt(), freedom)


def _student_tail(t: Tensor, freedom: Tensor) -> Tensor:
    """Probability that a Student t variable exceeds ``t`` in size, by integrating the angle atan(t / sqrt(nu))."""
    angle = torch.atan(t / freedom.sqrt())
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def integral(low: Tensor) -> Tensor:
        width = math.pi / 2 - low
        return width * torch.cos(low + width * grid.unsqueeze(-1)).pow(freedom - 1).mean(0)

    return integral(angle) / integral(torch.zeros_like(angle))


def steps_to_forget(step_size: float, sd: float, dynamics: Dynamics) -> float:
    """Langevin steps until 5 % are left of the start in a direction where only a Gaussian prior of this sd pulls."""
    x = torch.tensor(step_size / sd**2, dtype=torch.float64)
    if float(x) >= dynamics.limit:
        return math.inf
    return -math.log(_FORGOTTEN) / max(float(dynamics.rate(x)), 1e-300)


def too_short(
    drifts: Sequence[Drift],
    num_warmup: int,
    step_size: float,
    sds: Mapping[str, float],
    needed: Mapping[str, float],
    *,
    is_automatic: bool = False,
    is_optimised: bool = False,
) -> str:
    """The warning's text.

    :param drifts: what drifted; at least one.
    :param num_warmup: Langevin steps of the warm-up that was.
    :param sds: prior sd by site, and ``needed``, the Langevin steps that it takes to forget the start by.
    :param is_automatic: whether the step size was chosen by ``"auto"``, and ``is_optimised``, whether chains started
        from ``warm_start=``: what is on is not advised.
    """
    chains = sorted({drift.chain for drift in drifts if drift.chain is not None})
    where = f" of chains {chains}" if chains else ""
    first = drifts[0] if drifts[0].name == "potential" else max(drifts, key=lambda drift: abs(drift.last - drift.first))
    named = "the potential" if first.name == "potential" else f"the root mean square of site '{first.name}'"
    others = sorted({drift.name for drift in drifts} - {first.name})
    text = (
        f"The warm-up of {num_warmup} Langevin steps was too short: over the kept draws{where} {named} still went from "
        f"{first.first:.4g} to {first.last:.4g}" + (f", and so did {others[:5]}" if others else "") + ". "
    )
    if needed:
        slowest = max(needed, key=lambda site: needed[site])
        text += (
            f"Where the data say nothing, site '{slowest}' goes back to its prior of sd {sds[slowest]:.3g}, which "
            f"takes {needed[slowest]:.3g} Langevin steps at step_size={step_size:.3g} until 5 % of the start are left. "
        )
    advice = ["more warmup_steps (in draws: Langevin steps over `thinning`)"]
    if not is_optimised:
        advice.append("warm_start=")
    if not is_automatic:
        advice.append("a larger step_size")
    *others, last = advice
    return f"{text}Give {', '.join([*others, f'or {last}']) if others else last}."
