# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What adapts a chain during warm-up: a start at a mode, the step size, and a warning where warm-up was too short."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyro_apd.errors import DivergenceError
from pyro_apd.kernels.adaptation.drift import DriftWatch, WarmupWarning, steps_to_forget, too_short
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.excursions import ExcursionWarning, ExcursionWatch, excursion_message
from pyro_apd.kernels.adaptation.measured_inflation import GradientReadings, Heat
from pyro_apd.kernels.adaptation.mixing import (
    MixingWarning,
    MixingWatch,
    TemperatureWarning,
    mixing_message,
    temperature_message,
    wrong_temperatures,
)
from pyro_apd.kernels.adaptation.spectrum import MAX_DENSE, LocalPotential
from pyro_apd.kernels.adaptation.step_size import AutoStep
from pyro_apd.kernels.adaptation.warm_start import optimised, shrunk
from pyro_apd.models.layout import Layout
from pyro_apd.models.potential import Potential

if TYPE_CHECKING:
    from pyro_apd.kernels.engine.chain_set import ChainSet
    from pyro_apd.kernels.engine.gradients import GradientEstimator
    from pyro_apd.kernels.engine.temperature import Temperature

# Langevin steps from one reading of gradients to the next in warm-up, at least, and how many readings at most.
_READ_EVERY, _NUM_READINGS = 20, 200
# Share of the readings between two measures that is left out: the step size was another.
_TRANSIENT = 0.25


class AdaptedChain(Protocol):
    """What adaptation needs of a :class:`~pyro_apd.kernels.engine.chain.Chain`."""

    theta: Tensor
    step: int
    layout: Layout
    potential: Potential
    estimator: GradientEstimator
    chains: ChainSet

    @property
    def num_chains(self) -> int | None:
        """Number of chains, C; None for a single chain."""

    @property
    def energy(self) -> Tensor:
        """U before the last step, ``()`` or ``(C,)``."""

    @property
    def step_size(self) -> float:
        """Of the last step."""

    @property
    def divergences(self) -> Sequence[DivergenceError]:
        """Errors of the chains that diverged."""

    def outside_history(self, *, may_wait: bool) -> Tensor:
        """Which chains are on an excursion, ``()`` or ``(C,)``."""

    def dynamics(self) -> Dynamics:
        """The sampler's recursion at the present state."""

    def temperatures(self, target: float) -> list[Temperature]:
        """What the thermometers read over the kept draws."""


class WarmUp:
    """Adapts one chain, or C chains that advance together, from the start to the end.

    :param int num_steps: Langevin steps of the warm-up.
    :param float temperature: T.
    :param ChainSet chains: which chains of a run these are. The step size is found together with the processes that
        have the others.
    :param AutoStep auto: finds the step size; None where it is given.
    :param int warm_start: steps of optimisation before the first Langevin step.
    :param int num_latents: D.
    :ivar ExcursionWatch excursions: tells when a chain leaves what its own history allows.
    """

    def __init__(
        self,
        num_steps: int,
        temperature: float,
        chains: ChainSet,
        auto: AutoStep | None = None,
        warm_start: int = 0,
        num_latents: int = 1,
    ) -> None:
        self.num_steps = num_steps
        self.temperature = temperature
        self.auto = auto
        #: Whether the step size is found here.
        self.is_automatic = auto is not None
        self.warm_start = warm_start
        #: Whether optimisation begins with :func:`~pyro_apd.kernels.adaptation.warm_start.shrunk`.
        self.shrinks_start = False
        #: Texts of the warnings given so far, for the run's report.
        self.warnings: list[str] = []
        self.excursions = ExcursionWatch(num_latents, temperature)
        self._chains = chains
        self._watch: DriftWatch | None = None
        self._mixing: MixingWatch | None = None
        self._step_of_keeping: int | None = None
        self._is_over = False
        self._readings: GradientReadings | None = None
        self._read_step, self._is_deciding = 0, False

    def before_step(self, chain: AdaptedChain) -> None:
        """Optimises the start, and measures the step size, where it is time before the chain's next step."""
        if chain.step == 0 and self.warm_start:
            with torch.no_grad():
                gradient, draw = chain.estimator.gradient, chain.potential.source.draw
                if self.shrinks_start:
                    chain.theta = shrunk(gradient, draw, chain.theta)
                chain.theta = optimised(gradient, draw, chain.theta, self.warm_start)
        if self.auto is None or self.auto.is_settled:
            return
        with torch.no_grad():
            if self._is_reading_due(chain.step):
                self._read_gradients(chain)
            if self.auto.is_due(chain.step):
                local = self._local_potential(chain)
                self.auto.measure(local, self._heat(chain, local))
            self.auto.step_size = self._chains.same_on_data_ranks(self.auto.step_size)

    def _is_reading_due(self, step: int) -> bool:
        return step > 0 and step - self._read_step >= max(_READ_EVERY, self.num_steps // _NUM_READINGS)

    def _read_gradients(self, chain: AdaptedChain) -> None:
        """Two gradients at the present state, on batches of their own."""
        self._read_step = chain.step
        local = self._local_potential(chain)
        gradient = local.scaled(local.gradient(local.theta, local.draw())[0]).clone()
        is_whole = local.epoch_length == 1
        other = None if is_whole else local.scaled(local.gradient(local.theta, local.draw())[0])
        self._readings_of(chain).add(gradient, other, local.epoch_length)

    def _readings_of(self, chain: AdaptedChain) -> GradientReadings:
        """The readings; models that are measured direction by direction are read weight by weight."""
        if self._readings is None:
            sites = [(site.name, site.size) for site in chain.layout]
            if chain.layout.size <= MAX_DENSE:
                sites = [(f"{name}[{i}]", 1) for name, size in sites for i in range(size)]
            names, sizes = zip(*sites, strict=True)
            self._readings = GradientReadings(names, sizes)
        return self._readings

    def _heat(self, chain: AdaptedChain, local: LocalPotential) -> Heat | None:
        """What the readings since the last measure say; in the part of the warm-up that decides, all from its start."""
        readings = self._readings_of(chain)
        if not self._is_deciding:
            readings.drop_old(_TRANSIENT)
        means = readings.means()
        self._is_deciding = self.auto is not None and self.auto.is_deciding
        if not self._is_deciding:
            readings.drop_old(1.0)
        if means is None or self.temperature == 0:
            return None
        noise, slope = (local.active(part) for part in local.of_all_chains(*means))
        sites = noise.shape[-1]
        noise, slope = noise.reshape(-1, sites).mean(0), slope.reshape(-1, sites).mean(0)
        return readings.heat(noise, slope, local.dynamics, self.temperature)

    @property
    def checks_in_sync(self) -> bool:
        """Whether processes have to check their chains at the same steps, also where one of them has all chains."""
        return self.auto is not None and not self.auto.is_settled and self._chains.is_distributed

    @property
    def is_adapting(self) -> bool:
        """Whether the step size may still change."""
        return self.auto is not None and not self.auto.is_settled

    def is_suspicious(self, energy: Tensor) -> bool:
        """Whether a chain should be checked at once, while its step size can still be lowered. Waits for the device."""
        return self.is_adapting and bool(self.excursions.beyond(energy).any())

    def backs_off(self, chain: AdaptedChain, is_lost: bool, is_outside: bool = False) -> bool:
        """Whether chains that diverged, or went on an excursion, continue from their checkpoint with a smaller step.

        A step size that is still being adapted may be too large; one that was given, or found, is final.

        :param is_lost: whether a chain here diverged; one of another process counts as well.
        :param is_outside: whether one is on an excursion.
        :raises RankError: if another process is gone.
        """
        if self.auto is None or chain.step <= 1:
            return False
        if self.checks_in_sync:
            lost, outside = zip(*self._chains.peer_ranks.gathered((is_lost, is_outside)), strict=True)
            is_lost, is_outside = any(lost), any(outside)
        has_failed = is_lost or is_outside
        if has_failed and self._readings is not None:
            # The gradients out there are not those of the posterior.
            self._readings.drop_old(1.0)
        return has_failed and self.auto.back_off(chain.step, is_lost=is_lost)

    def begin_keeping(self, chain: AdaptedChain) -> None:
        """Marks the end of the warm-up: draws are kept from here on."""
        self._watch = DriftWatch(chain.layout.names)
        self._mixing = self._mixing_watch(chain)
        self._step_of_keeping = chain.step

    def after_draw(self, chain: AdaptedChain, pieces: tuple[Tensor, ...]) -> None:
        """Adds a draw to what is examined for drift."""
        if self._watch is not None:
            self._watch.add(chain.energy, pieces)
            self.excursions.keep(chain.outside_history(may_wait=False))
        if self._mixing is not None:
            self._mixing.add(torch.cat(pieces, -1))

    def report(self) -> dict[str, Any]:
        """What ``step_size="auto"`` chose and why; empty where the step size was given."""
        return {} if self.auto is None else self.auto.report()

    def finish(self, chain: AdaptedChain) -> None:
        """Warns, once, if the kept draws drifted, or if some were made on an excursion."""
        if self._is_over or self._watch is None:
            return
        self._is_over = True
        self._warn_of_excursions(chain)
        self._warn_of_mixing(chain)
        frozen = {error.chain for error in chain.divergences}
        drifts = [drift for drift in self._watch.drifts(self.temperature) if drift.chain not in frozen]
        if drifts:
            sds, needed = prior_sds(chain.potential), self._steps_to_forget(chain)
            if chain.num_chains is not None:
                drifts = [replace(drift, chain=(drift.chain or 0) + self._chains.first) for drift in drifts]
            kind = {"is_automatic": self.is_automatic, "is_optimised": bool(self.warm_start)}
            text = too_short(drifts, self._step_of_keeping or 0, chain.step_size, sds, needed, **kind)
            self._warn(text, WarmupWarning)

    def _warn(self, text: str, category: type[UserWarning]) -> None:
        self.warnings.append(text)
        warnings.warn(text, category)

    def _warn_of_mixing(self, chain: AdaptedChain) -> None:
        """Where the step size was found here, what cannot be trusted at it is named."""
        if not self.is_automatic or self.temperature == 0:
            return
        is_active = torch.ones(self._chains.size, dtype=torch.bool)
        is_active[[error.chain for error in chain.divergences]] = False
        slow = [] if self._mixing is None else self._mixing.slow(is_active)
        if slow:
            num_chains = int(is_active.sum())
            text = mixing_message(slow, num_chains * self.excursions.num_kept, num_chains)
            self._warn(text, MixingWarning)
        wrong = wrong_temperatures(chain.temperatures(self.temperature))
        if wrong:
            self._warn(temperature_message(wrong, chain.step_size), TemperatureWarning)

    def _mixing_watch(self, chain: AdaptedChain) -> MixingWatch | None:
        if not self.is_automatic or not 0 < chain.layout.size <= MAX_DENSE:
            return None
        return MixingWatch([f"{site.name}[{i}]" for site in chain.layout for i in range(site.size)])

    def _warn_of_excursions(self, chain: AdaptedChain) -> None:
        marked = {self._chains.first + i: draws for i, draws in enumerate(self.excursions.marked()) if draws}
        if marked:
            text = excursion_message(marked, self.excursions.num_kept, chain.step_size)
            self._warn(text, ExcursionWarning)

    def state_dict(self) -> dict[str, Any]:
        """All that the continuation depends on."""
        return {
            "auto": None if self.auto is None else self.auto.state_dict(),
            "excursions": self.excursions.state_dict(),
            "watch": None if self._watch is None else self._watch.state_dict(),
            "mixing": None if self._mixing is None else self._mixing.state_dict(),
            "step_of_keeping": self._step_of_keeping,
            "readings": None if self._readings is None else self._readings.state_dict(),
            "read": [self._read_step, int(self._is_deciding)],
        }

    def load_state_dict(self, state: Mapping[str, Any], chain: AdaptedChain) -> None:
        """Inverse of :meth:`state_dict`, on a warm-up with the same settings."""
        if self.auto is not None and state["auto"] is not None:
            self.auto.load_state_dict(state["auto"])
        self._step_of_keeping = state["step_of_keeping"]
        self.excursions.load_state_dict(state["excursions"])
        self._read_step, self._is_deciding = int(state["read"][0]), bool(state["read"][1])
        if state["readings"] is not None:
            self._readings_of(chain).load_state_dict(state["readings"])
        if state["watch"] is not None:
            self._watch = DriftWatch(chain.layout.names)
            self._watch.load_state_dict(state["watch"])
        self._mixing = self._mixing_watch(chain) if state["mixing"] is not None else None
        if self._mixing is not None:
            self._mixing.load_state_dict(state["mixing"])

    def _steps_to_forget(self, chain: AdaptedChain) -> dict[str, float]:
        """Steps until the start is forgotten by the prior alone, by site; empty where no theory says."""
        return {site: _steps_to_forget(chain, site, sd) for site, sd in prior_sds(chain.potential).items()}

    def _local_potential(self, chain: AdaptedChain) -> LocalPotential:
        is_active = torch.ones(self._chains.size, dtype=torch.bool)
        is_active[[error.chain for error in chain.divergences]] = False
        is_active = torch.cat(self._chains.peer_ranks.gathered(is_active))
        source = chain.potential.source
        return LocalPotential(
            chain.estimator.gradient,
            source.draw,
            chain.theta,
            chain.dynamics(),
            self.temperature,
            self._chains.same_on_data_ranks(source.epoch_length),
            None if bool(is_active.all()) else is_active,
            self._chains,
        )


def _steps_to_forget(chain: AdaptedChain, name: str, sd: float) -> float:
    """Steps by the prior of one site; a preconditioner counts by its median over the site."""
    dynamics = chain.dynamics()
    site = chain.layout[name]
    scale = 1.0
    if dynamics.metric is not None:
        scale = float(dynamics.metric[..., site.start : site.stop].median())
    return steps_to_forget(chain.step_size * scale, sd, dynamics)


def prior_sds(potential: Potential) -> dict[str, float]:
    """Largest standard deviation of the independent Gaussian priors, by site; sites with other priors are left out."""
    found = {}
    for name, (_, precision) in potential.gaussian_priors.parameters.items():
        smallest = float(torch.as_tensor(precision).min())
        if smallest > 0:
            found[name] = 1 / math.sqrt(smallest)
    return found
