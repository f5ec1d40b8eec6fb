# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``step_size="auto"``: a step size from measured curvature and gradient noise, chosen during warm-up and then kept.

The step is the largest at which a Gaussian of the measured curvatures would come out too wide by no more than a stated
share (:mod:`pyro_apd.kernels.adaptation.dynamics` has the theory), by
discretisation and mini-batch noise together:

* With up to 32 latents the Hessian and the noise are measured whole, and the share holds for **every direction**.
* With more, gradients at the states that the chains visit say by how much draws come out too wide
  (:mod:`pyro_apd.kernels.adaptation.measured_inflation`). The share holds for the **mean over all weights**, and three
  times the share for the **mean over each site**. On full data the stiffest direction is kept away from the limit of
  stability as well: the step size is at most 5 times the share of that limit, and never more than half of it. At the
  default share the variance there is twice too large by discretisation. On mini-batches the largest curvature is mostly
  that of single rows, which come and go, and does not bound the step in the end. Where there are too few readings of
  gradients, the spectra of curvature and noise at one state are estimated from random vectors instead, and the share
  holds for the trace of the covariance.

Chains that advance together have one step size: the share holds on their average, and the stiffest of them sets the
distance from instability. Where other processes have chains of the run, all measure their own at the same steps and
exchange the results, never a state, so that the step size is the one that a single process would choose.

A posterior with several modes or with curvature that changes strongly is not Gaussian: the share is then that of the
Gaussian approximations at the points where it was measured.

The curvature of a network rises by orders of magnitude while it learns. So it is measured several times over the
warm-up, at equal distances, and more often while the potential falls; the step size follows, and the median of the
measures in the last quarter is kept. In the last quarter it is already in use, and is lowered to what is stable at the
largest curvature met there.

Where curvature varies strongly within the posterior, as with learned scales, a few measures miss its peaks, and a chain
whose step is too large stays away from them until it is thrown out. So a chain that leaves what its own history allows
(:mod:`pyro_apd.kernels.adaptation.excursions`) is put back, and the others with it; the step size goes on with a
quarter, and may grow again until the last quarter of the warm-up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.excursions import REDUCTION, rise_to_equilibrium
from pyro_apd.kernels.adaptation.measured_inflation import Heat
from pyro_apd.kernels.adaptation.spectrum import MAX_DENSE, CurvatureSpectrum, LocalPotential, measure_spectrum
from pyro_apd.runtime.checks import number
from pyro_apd.runtime.seeds import derived_seed

logger = logging.getLogger("pyro_apd")

#: Share by which variances may come out too large, by default.
MAX_INFLATION = 0.1

# Measures per warm-up, at least so many steps apart.
_NUM_MEASURES, _MIN_APART = 12, 50
# Measures from this share of the warm-up on decide.
_SETTLED = 0.75
# Times that a chain may diverge while its step size is adapted.
_MAX_BACK_OFFS = 8
# What the step size is divided by then, and the growth per measure of what it may be after that or an excursion.
_LOST, _RECOVERY = 10.0, 2.0
# What is aimed at, as a part of what is allowed: measures have errors.
_MARGIN = 0.9
# Limit of the change of the step size from one measure to the next, where the potential decides about it.
_MAX_CHANGE = 4.0
# In warm-up the drift of a step moves the state by no more than this share of its norm.
_MAX_DRIFT = 0.05
# Mini-batches that the potential is measured on.
_NUM_ENERGIES = 4
# Steps from one measure to the next while the potential falls by more than it may vary, and how many more these may be.
_SOON, _MAX_EXTRA = 10, 30
# Share by which variances may come out too large, on average over the weights of one site, as a multiple of that over
# all: at the default the sds of every site are within 15 %.
_BY_SITE = 3.0
# Measures early in the warm-up, as shares of it: the effect of a wrong first step should be seen soon.
_EARLY = (0.01, 0.03)


@dataclass(frozen=True)
class Choice:
    """A step size, and why.

    :ivar float step_size: epsilon.
    :ivar str bound: what bounds it: ``"inflation"``, ``"stability"``, or a site.
    :ivar float inflation: predicted share by which variances come out too large.
    :ivar float largest_curvature: lambda in the stiffest direction, in the sampler's metric.
    :ivar bool is_bounded: whether that curvature bounds the step size. That on one mini-batch does not.
    """

    step_size: float
    bound: str
    inflation: float
    largest_curvature: float
    is_bounded: bool = True


def stable_step_size(largest: float, dynamics: Dynamics, max_inflation: float) -> float:
    """The largest step that keeps the stiffest direction at a distance from the limit of stability."""
    return min(5 * max_inflation, 0.5) * dynamics.limit / largest


def choose(spectrum: CurvatureSpectrum, local: LocalPotential, max_inflation: float) -> Choice:
    """The largest step size that keeps both rules of this module."""
    largest = float(local.active(spectrum.largest).max())
    high = stable_step_size(largest, local.dynamics, max_inflation)
    if local.temperature == 0:
        return Choice(high, "stability", 0.0, largest)

    def inflation(step_size: float) -> float:
        return float(local.active(spectrum.inflation(step_size, local)).mean())

    allowed = _MARGIN * max_inflation
    if inflation(high) <= allowed:
        return Choice(high, "stability", inflation(high), largest)
    low = high * 1e-6
    if not inflation(low) <= allowed:
        # No step size is small enough, as where gradients are not finite: use what is stable.
        return Choice(high, "stability", inflation(high), largest)
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if inflation(middle) <= allowed else (low, middle)
    return Choice(low, "inflation", inflation(low), largest)


def by_heat(heat: Heat, local: LocalPotential, max_inflation: float, largest: float) -> Choice:
    """The largest step size at which gradients at the states that chains visited say what is allowed.

    :param largest: largest curvature. On mini-batches it is mostly that of single rows, and does not bound the step.
    """
    allowed = _MARGIN * max_inflation
    bounds = {"inflation": heat.step_by_mean(allowed), f"site '{heat.site}'": heat.step_by_site(_BY_SITE * allowed)}
    is_bounded = local.epoch_length == 1
    if is_bounded:
        bounds["stability"] = stable_step_size(max(largest, 1e-12), local.dynamics, max_inflation)
    bound = min(bounds, key=lambda name: bounds[name])
    return Choice(bounds[bound], bound, heat.inflation(bounds[bound]), largest, is_bounded)


def chosen(local: LocalPotential, seed: int, max_inflation: float, heat: Heat | None) -> Choice:
    """The choice at the states of the chains, and by the ``heat`` of the gradients since the last measure, if any."""
    if heat is not None and local.theta.shape[-1] > MAX_DENSE and local.temperature > 0:
        (by_chain,) = local.of_all_chains(local.largest_curvature(seed))
        return by_heat(heat, local, max_inflation, float(local.active(by_chain).max()))
    choice = choose(measure_spectrum(local, seed).of_all_chains(local), local, max_inflation)
    if heat is None or local.temperature == 0:
        return choice
    step_size = heat.step_by_site(_BY_SITE * _MARGIN * max_inflation)
    return replace(choice, step_size=step_size, bound=f"site '{heat.site}'") if step_size < choice.step_size else choice


def _drift_and_energy(local: LocalPotential) -> tuple[float, float, float]:
    """Drift of a step per epsilon / 2, relative to the state; U; and two standard errors of a difference of such U.

    Far from a mode gradients can be large where curvature is not. The drift is that of the fastest chain, U the mean.
    """
    count = 1 if local.epoch_length == 1 else _NUM_ENERGIES
    readings = [local.gradient(local.theta, local.draw()) for _ in range(count)]
    slope = local.scaled(local.scaled(readings[-1][0]))
    drift = slope.norm(dim=-1) / (1.0 + local.theta.norm(dim=-1))
    drift, energies = local.of_all_chains(drift, torch.stack([energy for _, energy in readings], -1))
    energies_M = local.active(energies).reshape(-1, count).double().mean(0)
    error = 2 * math.sqrt(2 / count) * float(energies_M.std()) if count > 1 else 0.0
    return float(local.active(drift).max()), float(energies_M.mean()), error if math.isfinite(error) else 0.0


class AutoStep:
    """The step size of a chain, or of chains that advance together, over its warm-up.

    All its state is numbers: new random vectors are drawn for each measurement.

    :param float max_inflation: share by which variances may come out too large.
    :param int num_warmup: Langevin steps of the warm-up; with 0, what is measured at the start is kept.
    :param int seed: of the random vectors.
    :ivar float step_size: the present step size.
    """

    def __init__(self, max_inflation: float, num_warmup: int, seed: int) -> None:
        self.max_inflation = max_inflation
        self.num_warmup = num_warmup
        self.seed = seed
        self.step_size = math.nan
        self._choices: list[Choice] = []
        self._energies: list[float] = []
        self._lowest = 0.0
        self._ceiling = self._stable = math.inf
        self._num_back_offs = 0
        count = max(1, min(_NUM_MEASURES, num_warmup // _MIN_APART))
        early = [int(num_warmup * share) for share in _EARLY] if count > 1 else []
        self._marks = sorted({num_warmup * i // count for i in range(count + 1)}.union(early))
        self._num_done = self._num_extra = 0

    @property
    def is_settled(self) -> bool:
        """Whether the step size is final."""
        return self._num_done == len(self._marks)

    @property
    def is_deciding(self) -> bool:
        """Whether the next measure has a part in what is kept."""
        mark = self.num_warmup if self.is_settled else self._marks[self._num_done]
        return mark >= _SETTLED * self.num_warmup

    def __call__(self, step: int) -> float:
        """The step size, as of a schedule."""
        return self.step_size

    def is_due(self, step: int) -> bool:
        """Whether it is time to measure, before Langevin step ``step``."""
        return not self.is_settled and step >= self._marks[self._num_done]

    def measure(self, local: LocalPotential, heat: Heat | None = None) -> None:
        """Measures, and sets the step size. Waits for the device.

        :param heat: what gradients say since the last measure; None where there are too few.
        :raises ValueError: if U is flat, so that no step size is better than another.
        """
        seed = derived_seed(self.seed, "measure", self._num_done)
        if local.is_active is not None and not bool(local.is_active.any()):
            # All chains have diverged, which is reported when they are over.
            self._num_done += 1
            return
        drift, energy, error = _drift_and_energy(local)
        fastest = 2 * _MAX_DRIFT / max(drift, 1e-30)
        reach = rise_to_equilibrium(local.theta.shape[-1], local.temperature)
        is_falling = not self._energies or energy < self._energies[-1] - reach
        wanted, largest = self._wanted(local, seed, None if is_falling else heat)
        self._num_done += 1
        if not math.isfinite(wanted):
            # The start has no finite potential, or the chain diverged: the next check of the chain reports it.
            wanted = self.step_size if math.isfinite(self.step_size) else 1e-12
        wanted = min(wanted, fastest) if math.isfinite(fastest) else wanted
        self.step_size = self._guarded(wanted, energy, reach, error)
        self._energies.append(energy)
        if is_falling:
            self._measure_soon()
        if self.is_settled:
            self._settle()
        else:
            logger.debug(
                "step_size='auto': %.3g for now; largest curvature %.3g, U %.4g.", self.step_size, largest, energy
            )

    def back_off(self, step: int, *, is_lost: bool = True) -> bool:
        """Lowers the step size after a chain diverged by Langevin ``step``; False if that is no longer allowed.

        The next measures may not exceed it by much at once, and what is kept may not exceed it where that happened in
        the part of the warm-up that decides.

        :param is_lost: whether it diverged: then the step size is divided by 10; after an excursion, by 4.
        """
        if self.is_settled or self._num_back_offs == _MAX_BACK_OFFS:
            return False
        self._num_back_offs += is_lost
        self.step_size /= _LOST if is_lost else REDUCTION
        self._lowest = min(self._lowest, self.step_size)
        self._ceiling = self.step_size
        what = "diverged" if is_lost else "left what its history allows"
        logger.info("step_size='auto': a chain %s by step %d; going on with %.3g.", what, step, self.step_size)
        return True

    def _wanted(self, local: LocalPotential, seed: int, heat: Heat | None) -> tuple[float, float]:
        """The step size by the present measure, and the largest curvature."""
        is_last = self._num_done == len(self._marks) - 1
        if is_last or self._marks[self._num_done] >= _SETTLED * self.num_warmup:
            choice = chosen(local, seed, self.max_inflation, heat)
            if not math.isfinite(choice.step_size):
                return choice.step_size, choice.largest_curvature
            self._choices.append(choice)
            if choice.is_bounded:
                stable = stable_step_size(choice.largest_curvature, local.dynamics, self.max_inflation)
                self._stable = min(self._stable, stable)
            # What will be kept is in use from here on, so that an excursion at it is seen before draws are kept.
            wanted = self._settled_step()
            return wanted if choice.is_bounded else min(wanted, _RECOVERY * self.step_size), choice.largest_curvature
        (by_chain,) = local.of_all_chains(local.largest_curvature(seed))
        largest = float(local.active(by_chain).max())
        stable = stable_step_size(max(largest, 1e-12), local.dynamics, self.max_inflation)
        if heat is None or local.theta.shape[-1] <= MAX_DENSE:
            return stable, largest
        # What gradients say of a larger step size is known once it is in use. While a chain learns they are large, and
        # the noise of a step does not matter yet.
        by_gradients = by_heat(heat, local, self.max_inflation, largest).step_size
        return max(stable, min(by_gradients, _RECOVERY * self.step_size)), largest

    def _measure_soon(self) -> None:
        """Measures again in a few steps, as long as the potential falls: a step that suits now is too small soon."""
        soon = self._marks[self._num_done - 1] + _SOON
        if self._num_extra < _MAX_EXTRA and self._num_done < len(self._marks) and soon < self._marks[self._num_done]:
            self._marks.insert(self._num_done, soon)
            self._num_extra += 1

    def _settled_step(self) -> float:
        """The median choice, within what is stable at the largest curvature met and what led to no excursion."""
        return min(self._median_choice().step_size, self._stable, self._ceiling)

    def _guarded(self, wanted: float, energy: float, reach: float, error: float) -> float:
        """Limits the proposed step size while the potential is rising.

        With steps that are too large, networks with a learned noise scale explain everything as noise. The potential is
        flat there, so that even larger steps would be proposed. So above its potential at the start a chain slows down,
        and one whose potential rose keeps its step size. A chain that comes from a mode has to rise, by ``reach`` above
        its lowest potential at most: up to there it may grow. Mini-batches give the potential with an ``error``.
        """
        if self._marks[self._num_done - 1] < _SETTLED * self.num_warmup:
            self._ceiling *= _RECOVERY
        wanted = min(wanted, self._ceiling)
        if not self._energies:
            self._lowest = wanted / _MAX_CHANGE**3
            return wanted
        if energy <= min(self._energies) + reach:
            return min(wanted, self.step_size * _MAX_CHANGE)
        if energy > self._energies[0] + error:
            return min(wanted, max(self.step_size / _MAX_CHANGE, self._lowest))
        return min(wanted, self.step_size * (1.0 if energy > self._energies[-1] + error else _MAX_CHANGE))

    def _settle(self) -> None:
        if self._choices:
            self.step_size = self._settled_step()
            logger.info("%s", self.explanation())

    def _median_choice(self) -> Choice:
        """Of an even number, the smaller of the two in the middle."""
        ranked = sorted(self._choices, key=lambda choice: choice.step_size)
        return ranked[(len(ranked) - 1) // 2]

    def _bound(self) -> str:
        """What the step size that is kept is bound by."""
        middle = self._median_choice()
        if middle.step_size <= min(self._stable, self._ceiling):
            return middle.bound
        return "excursions" if self._ceiling < self._stable else "stability"

    def explanation(self) -> str:
        """What was chosen and why, in a sentence or two."""
        found = self.report()
        return (
            f"step_size='auto': chose {found['step_size']:.3g}, bound by {found['bound']}. Variances are predicted to "
            f"be {found['inflation']:.1%} too large ({found['allowed']:.0%} allowed); the largest curvature is "
            f"{found['largest_curvature']:.3g}. Measured {found['num_measures']} times in {self.num_warmup} steps."
        )

    def report(self) -> dict[str, Any]:
        """What was chosen and why: ``step_size``, ``bound`` (``"inflation"``, ``"stability"`` or
        ``"excursions"``), the predicted
        ``inflation``, ``allowed``, ``largest_curvature`` (in the sampler's metric) and ``num_measures``. Empty before.
        """
        if not self.is_settled or not self._choices:
            return {}
        middle = self._median_choice()
        return {
            "step_size": self.step_size,
            "bound": self._bound(),
            "inflation": middle.inflation,
            "allowed": self.max_inflation,
            "largest_curvature": middle.largest_curvature,
            "num_measures": len(self._marks),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "step_size": self.step_size,
            "num_done": self._num_done,
            "marks": list(self._marks),
            "num_extra": self._num_extra,
            "energies": list(self._energies),
            "lowest": self._lowest,
            "num_back_offs": self._num_back_offs,
            "ceiling": self._ceiling,
            "stable": self._stable,
            "choices": [vars(choice) | {} for choice in self._choices],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, on an object made with the same arguments."""
        self.step_size, self._num_done = float(state["step_size"]), int(state["num_done"])
        self._marks, self._num_extra = [int(mark) for mark in state["marks"]], int(state["num_extra"])
        self._energies, self._lowest = [float(value) for value in state["energies"]], float(state["lowest"])
        self._choices = [Choice(**choice) for choice in state["choices"]]
        self._num_back_offs = int(state["num_back_offs"])
        self._ceiling, self._stable = float(state["ceiling"]), float(state["stable"])


def checked_max_inflation(max_inflation: float) -> float:
    """``max_inflation`` as a float.

    :raises ValueError: if it is not a positive finite number.
    """
    hint = (
        f"It is the share by which step_size='auto' lets variances come out too large; the default is {MAX_INFLATION}."
    )
    return number("max_inflation", max_inflation, above=0, hint=hint)
