# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the kept draws can be trusted: how many are effective, and whether the temperature of each site is right.

With ``step_size="auto"`` nobody chose the step, so nobody knows what it cannot do. A funnel, that is a scale which is
learned together with what it scales, has no step size that suits all of it: chains stay out of its neck, or hardly move
in its mouth. That shows in few effective draws, chain by chain the same or not. Weights of a large network are not
identified, so that effective draws are counted for models of up to 32 latents only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

if TYPE_CHECKING:
    from pyro_apd.kernels.engine.temperature import Temperature

# Points in time kept per run, at most; when there are as many, every second one is dropped. The fewest that are judged.
_NUM_POINTS, _MIN_POINTS = 512, 48
#: With fewer effective draws a mean is not known to a tenth of a standard deviation.
MIN_EFFECTIVE = 100
# Temperatures that matter: a share of the target by which sds are 15 % too wide, and so many standard errors.
_MAX_EXCESS, _MIN_ERRORS = 0.32, 5.0
# Names in a message.
_NUM_NAMED = 5


class MixingWarning(UserWarning):
    """Some latents have too few effective draws: their means and standard deviations are not known."""


class TemperatureWarning(UserWarning):
    """The temperature of some site is not the target's: its draws are too wide or too narrow."""


@dataclass(frozen=True)
class SlowLatent:
    """A latent with too few effective draws.

    :ivar str name: of the latent, unconstrained.
    :ivar float effective: draws, the fewer of those for its mean and for its standard deviation.
    :ivar float rhat: split R-hat.
    """

    name: str
    effective: float
    rhat: float


class MixingWatch:
    """Collects the states of a small model over the kept draws. It never waits for the device.

    :param names: of the latents, D of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._points: list[Tensor] = []
        self._stride, self._count = 1, 0

    def add(self, theta: Tensor) -> None:
        """One draw ``(D,)`` or ``(C, D)``."""
        if self._count % self._stride == 0:
            self._points.append(theta.clone())
            if len(self._points) >= _NUM_POINTS:
                self._points = self._points[::2]
                self._stride *= 2
        self._count += 1

    def slow(self, is_active: Tensor) -> list[SlowLatent]:
        """Latents with too few effective draws, the slowest first. Empty for short runs.

        :param is_active: which chains count, ``(C,)``.
        """
        if len(self._points) < _MIN_POINTS or not bool(is_active.any()):
            return []
        points = torch.stack(self._points).double().cpu()
        states_CTD = points.reshape(len(points), -1, points.shape[-1]).movedim(0, 1)[is_active]
        centred = states_CTD - states_CTD.mean((0, 1))
        moving = centred.square().mean((0, 1)) > 0
        centred = torch.where(moving, centred, torch.randn_like(centred))
        effective = torch.stack([_effective(values) for values in (centred, centred.abs())]).amin(0)
        rhat = split_gelman_rubin(centred, chain_dim=0, sample_dim=1)
        order = effective.argsort()
        found = [SlowLatent(self._names[i], float(effective[i]), float(rhat[i])) for i in order.tolist()]
        return [latent for latent in found if latent.effective < MIN_EFFECTIVE]

    def state_dict(self) -> dict[str, Any]:
        """All that was collected."""
        return {"points": list(self._points), "stride": self._stride, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._points = list(state["points"])
        self._stride, self._count = int(state["stride"]), int(state["count"])


def _effective(values_CTD: Tensor) -> Tensor:
    """Effective sizes ``(D,)`` over all chains."""
    size: Tensor = effective_sample_size(values_CTD, chain_dim=0, sample_dim=1)
    return size.nan_to_num(0.0).clamp(0.0, float(values_CTD.shape[0] * values_CTD.shape[1]))


def mixing_message(slow: Sequence[SlowLatent], num_draws: int, num_chains: int) -> str:
    """The warning's text."""
    worst = slow[0]
    others = [latent.name for latent in slow[1 : 1 + _NUM_NAMED]]
    error = 1 / math.sqrt(max(worst.effective, 1.0))
    also = f"; too few have also {others}" if others else ""
    more = f" and {len(slow) - 1 - len(others)} more" if len(slow) > 1 + len(others) else ""
    return (
        f"Of {num_draws} kept draws of {num_chains} chain{'s' * (num_chains > 1)} about {worst.effective:.0f} are "
        f"effective for '{worst.name}' (R-hat {worst.rhat:.2f}): its mean has an error of {error:.2g} of its standard "
        f"deviation, and its width may be wrong{also}{more}. Sample for longer, by more draws or a larger thinning=. "
        "Where a scale is learned together with what it scales (a funnel, as in hierarchical models with centred "
        "effects), no step size suits all of the posterior: reparametrise the model, for example by "
        "pyro.infer.reparam.LocScaleReparam, or take pyro.infer.NUTS."
    )


def wrong_temperatures(readings: Sequence[Temperature]) -> list[Temperature]:
    """Readings of sites that differ from the target by what matters, and not by chance; the largest first."""
    found = []
    for reading in readings:
        if reading.site == "all" or reading.standard_error is None or not math.isfinite(reading.mean):
            continue
        off = abs(reading.mean - reading.target)
        if off > max(_MAX_EXCESS * reading.target, _MIN_ERRORS * reading.standard_error):
            found.append(reading)
    return sorted(found, key=lambda reading: -abs(reading.mean - reading.target))


def temperature_message(wrong: Sequence[Temperature], step_size: float) -> str:
    """The warning's text."""
    worst = wrong[0]
    others = sorted({reading.site for reading in wrong} - {worst.site})[:_NUM_NAMED]
    also = f", and so are those of {others}" if others else ""
    ratio = math.sqrt(max(worst.mean, 0.0) / worst.target)
    what = (
        f"draws are about {ratio:.2g} times as wide as they should be. Sample again with a smaller step than "
        f"step_size={step_size:.2g} (a smaller max_inflation=), larger mini-batches or, for a learned scale, other "
        "coordinates"
        if worst.mean > worst.target
        else "the chain has not reached its target. Give more warmup_steps, or more draws"
    )
    return (
        f"The temperature of site '{worst.site}' is {worst.mean:.3g} +- {worst.standard_error:.2g} where "
        f"{worst.target:g} is right{also}: {what}. kernel.temperatures() has all."
    )
