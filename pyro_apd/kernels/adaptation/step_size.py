# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``step_size="auto"``: a step size from measured curvature and gradient noise, chosen during warm-up and then kept.

The step is the largest at which a Gaussian of the measured curvatures would come out too wide by no more than a stated
share (:mod:`pyro_apd.kernels.adaptation.dynamics` has the theory), by
discretisation and mini-batch noise together:

* With up to 32 latents the Hessian and the noise are measured whole, and the share holds for **every direction**.
* With more, their spectra are estimated from random vectors, and the share holds for the **trace of the covariance**.
  In a Bayesian neural network most directions have little more curvature than the prior, so the few stiff ones hardly
  count. These are kept away from the limit of stability instead: the step size is at most 5 times the share of that
  limit, and never more than half of it. At the default share the variance of the stiffest direction is twice too large
  by discretisation, and mini-batch noise may widen stiff directions further.

Chains that advance together have one step size: the share holds on their average, and the stiffest of them sets the
distance from instability. Where other processes have chains of the run, all measure their own at the same steps and
exchange the results, never a state, so that the step size is the one that a single process would choose.

A posterior with several modes or with curvature that changes strongly is not Gaussian: the share is then that of the
Gaussian approximations at the points where it was measured.

The curvature of a network rises by orders of magnitude while it learns. So it is measured several times over the
warm-up, at equal distances; the step size follows, and the median of the measures in the last quarter is kept. In the
last quarter it is already in use, and is lowered to what is stable at the largest curvature met there.

Where curvature varies strongly within the posterior, as with learned scales, a few measures miss its peaks, and a chain
whose step is too large stays away from them until it is thrown out. So a chain that leaves what its own history allows
(:mod:`pyro_apd.kernels.adaptation.excursions`) is put back, and the step size goes on with a quarter; it may grow again
until the last quarter of the warm-up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.excursions import REDUCTION, rise_to_equilibrium
from pyro_apd.kernels.adaptation.spectrum import CurvatureSpectrum, LocalPotential, measure_spectrum
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
# Steps after it in which excursions of further chains are still due to the step size from before.
_GRACE = 100
# What is aimed at, as a part of what is allowed: measures have errors.
_MARGIN = 0.9
# Limit of the change of the step size from one measure to the next, where the potential decides about it.
_MAX_CHANGE = 4.0
# In warm-up the drift of a step moves the state by no more than this share of its norm.
_MAX_DRIFT = 0.05
# Measures early in the warm-up, as shares of it: the effect of a wrong first step should be seen soon.
_EARLY = (0.01, 0.03)


@dataclass(frozen=True)
class Choice:
    """A step size, and why.

    :ivar float step_size: epsilon.
    :ivar str bound: what bounds it: ``"inflation"`` or ``"stability"``.
    :ivar float inflation: predicted share by which variances come out too large.
    :ivar float largest_curvature: lambda in the stiffest direction, in the sampler's metric.
    """

    step_size: float
    bound: str
    inflation: float
    largest_curvature: float


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
        self._back_off_step = -_GRACE
        count = max(1, min(_NUM_MEASURES, num_warmup // _MIN_APART))
        early = [int(num_warmup * share) for share in _EARLY] if count > 1 else []
        self._marks = sorted({num_warmup * i // count for i in range(count + 1)}.union(early))
        self._num_done = 0

    @property
    def is_settled(self) -> bool:
        """Whether the step size is final."""
        return self._num_done == len(self._marks)

    def __call__(self, step: int) -> float:
        """The step size, as of a schedule."""
        return self.step_size

    def is_due(self, step: int) -> bool:
        """Whether it is time to measure, before Langevin step ``step``."""
        return not self.is_settled and step >= self._marks[self._num_done]

    def measure(self, local: LocalPotential) -> None:
        """Measures, and sets the step size. Waits for the device.

        :raises ValueError: if U is flat, so that no step size is better than another.
        """
        seed = derived_seed(self.seed, "measure", self._num_done)
        is_last = self._num_done == len(self._marks) - 1
        if local.is_active is not None and not bool(local.is_active.any()):
            # All chains have diverged, which is reported when they are over.
            self._num_done += 1
            return
        if is_last or self._marks[self._num_done] >= _SETTLED * self.num_warmup:
            choice = choose(measure_spectrum(local, seed).of_all_chains(local), local, self.max_inflation)
            if math.isfinite(choice.step_size):
                self._choices.append(choice)
                stable = stable_step_size(choice.largest_curvature, local.dynamics, self.max_inflation)
                self._stable = min(self._stable, stable)
                # What will be kept is in use from here on, so that an excursion at it is seen before draws are kept.
                wanted = self._settled_step()
            else:
                wanted = choice.step_size
            largest = choice.largest_curvature
        else:
            (by_chain,) = local.of_all_chains(local.largest_curvature(seed))
            largest = float(local.active(by_chain).max())
            wanted = stable_step_size(max(largest, 1e-12), local.dynamics, self.max_inflation)
        self._num_done += 1
        if not math.isfinite(wanted):
            # The start has no finite potential, or the chain diverged: the next check of the chain reports it.
            wanted = self.step_size if math.isfinite(self.step_size) else 1e-12
        gradient, energies = local.gradient(local.theta, local.draw())
        # The drift of one step, relative to the state: far from a mode gradients can be large where curvature is not.
        drift = local.scaled(local.scaled(gradient)).norm(dim=-1) / (1.0 + local.theta.norm(dim=-1))
        drift, energies = local.of_all_chains(drift, energies)
        energy = float(local.active(energies).mean())
        fastest = 2 * _MAX_DRIFT / max(float(local.active(drift).max()), 1e-30)
        reach = rise_to_equilibrium(local.theta.shape[-1], local.temperature)
        self.step_size = self._guarded(min(wanted, fastest) if math.isfinite(fastest) else wanted, energy, reach)
        self._energies.append(energy)
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
        if not is_lost and step < self._back_off_step + _GRACE:
            # Thrown out by the step size from before: it is put back too, but this one has not failed.
            return True
        self._back_off_step = step
        self._num_back_offs += is_lost
        self.step_size /= _LOST if is_lost else REDUCTION
        self._lowest = min(self._lowest, self.step_size)
        self._ceiling = self.step_size
        what = "diverged" if is_lost else "left what its history allows"
        logger.info("step_size='auto': a chain %s by step %d; going on with %.3g.", what, step, self.step_size)
        return True

    def _settled_step(self) -> float:
        """The median choice, within what is stable at the largest curvature met and what led to no excursion."""
        return min(self._median_choice().step_size, self._stable, self._ceiling)

    def _guarded(self, wanted: float, energy: float, reach: float) -> float:
        """Limits the proposed step size while the potential is rising.

        With steps that are too large, networks with a learned noise scale explain everything as noise. The potential is
        flat there, so that even larger steps would be proposed. So above its potential at the start a chain slows down,
        and one whose potential rose keeps its step size. A chain that comes from a mode has to rise, by ``reach`` above
        its lowest potential at most: up to there it may grow.
        """
        if self._marks[self._num_done - 1] < _SETTLED * self.num_warmup:
            self._ceiling *= _RECOVERY
        wanted = min(wanted, self._ceiling)
        if not self._energies:
            self._lowest = wanted / _MAX_CHANGE**3
            return wanted
        if energy <= min(self._energies) + reach:
            return min(wanted, self.step_size * _MAX_CHANGE)
        if energy > self._energies[0]:
            return min(wanted, max(self.step_size / _MAX_CHANGE, self._lowest))
        return min(wanted, self.step_size * (1.0 if energy > self._energies[-1] else _MAX_CHANGE))

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
            "energies": list(self._energies),
            "lowest": self._lowest,
            "num_back_offs": self._num_back_offs,
            "back_off_step": self._back_off_step,
            "ceiling": self._ceiling,
            "stable": self._stable,
            "choices": [vars(choice) | {} for choice in self._choices],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, on an object made with the same arguments."""
        self.step_size, self._num_done = float(state["step_size"]), int(state["num_done"])
        self._energies, self._lowest = [float(value) for value in state["energies"]], float(state["lowest"])
        self._choices = [Choice(**choice) for choice in state["choices"]]
        self._num_back_offs = int(state["num_back_offs"])
        self._back_off_step = int(state["back_off_step"])
        self._ceiling, self._stable = float(state["ceiling"]), float(state["stable"])


def checked_max_inflation(max_inflation: float) -> float:
    """``max_inflation`` as a float.

    :raises ValueError: if it is not a positive finite number.
    """
    hint = (
        f"It is the share by which step_size='auto' lets variances come out too large; the default is {MAX_INFLATION}."
    )
    return number("max_inflation", max_inflation, above=0, hint=hint)
