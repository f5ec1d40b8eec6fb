# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a chain does for itself: it starts at a mode, finds its step size, and says when its warm-up was too short."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_apd.kernels.adaptation.drift import DriftWatch, WarmupWarning, steps_to_forget, too_short
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.step_size import AutoStep, Target, epoch_length
from pyro_apd.kernels.adaptation.warm_start import optimised
from pyro_apd.runtime.ranks import Ranks

if TYPE_CHECKING:
    from pyro_apd.kernels.engine.chain import Chain


class WarmUp:
    """Goes with a chain from its start to its end.

    :param int num_steps: Langevin steps of the warm-up.
    :param float temperature: T.
    :param dynamics: the sampler's recursion, at the chain's present state.
    :param AutoStep auto: finds the step size; None where it is given.
    :param int warm_start: steps of optimisation before the first Langevin step.
    """

    def __init__(
        self,
        num_steps: int,
        temperature: float,
        dynamics: Callable[[Chain], Dynamics],
        auto: AutoStep | None = None,
        warm_start: int = 0,
    ) -> None:
        self.num_steps, self.temperature, self.auto, self.warm_start = num_steps, temperature, auto, warm_start
        self._dynamics = dynamics
        self._ranks, self._of_chains = Ranks(), 1
        self._rows: range | None = None
        self._watch: DriftWatch | None = None
        self._step_of_keeping: int | None = None
        self._is_over = False

    def goes_with(self, ranks: Ranks, rows: range | None, of_chains: int) -> None:
        """Finds the step size together with processes that have other chains of the run.

        :param rows: which of the run's chains are here; None where all are, in a run that is not of several processes.
        :param int of_chains: how many the run has.
        """
        self._ranks, self._rows, self._of_chains = ranks, rows, of_chains

    def before_step(self, chain: Chain) -> None:
        """What is due before the chain's next step."""
        if chain.step == 0 and self.warm_start:
            with torch.no_grad():
                potential = chain.potential
                chain.theta = optimised(potential.gradient, potential.source.draw, chain.theta, self.warm_start)
        if self.auto is not None and self.auto.is_due(chain.step):
            with torch.no_grad():
                self.auto.measure(self._target(chain))
            self.auto.step_size = chain.potential.agreed(self.auto.step_size)

    @property
    def looks_together(self) -> bool:
        """Whether processes have to look at their chains at the same steps, also where one of them has all chains."""
        return self.auto is not None and not self.auto.is_settled and self._rows is not None

    def backs_off(self, chain: Chain, is_lost: bool) -> bool:
        """Whether chains that ran away are to go on from their last good state, with a smaller step.

        A step size that is still being looked for may be too large; one that was given, or found, may not.

        :param is_lost: whether a chain here ran away; one of another process counts as well.
        :raises RankError: if another process is gone.
        """
        if self.auto is None or chain.step <= 1:
            return False
        if self.looks_together:
            is_lost = any(self._ranks.gathered(is_lost))
        return is_lost and self.auto.back_off(chain.step)

    def begin_keeping(self, chain: Chain) -> None:
        """What follows is kept."""
        self._watch = DriftWatch(chain.layout.names)
        self._step_of_keeping = chain.step

    def after_draw(self, chain: Chain, pieces: tuple[Tensor, ...]) -> None:
        """A draw was made."""
        if self._watch is not None:
            self._watch.add(chain.energy, pieces)

    def report(self) -> dict[str, Any]:
        """What ``step_size="auto"`` chose and why; empty where the step size was given."""
        return {} if self.auto is None else self.auto.report()

    def finish(self, chain: Chain) -> None:
        """Warns, once, if the kept draws drifted."""
        if self._is_over or self._watch is None:
            return
        self._is_over = True
        frozen = {error.chain for error in chain.divergences}
        drifts = [drift for drift in self._watch.drifts(self.temperature) if drift.chain not in frozen]
        if drifts:
            sds = prior_sds(chain)
            needed = {site: self._steps_to_forget(chain, site, sd) for site, sd in sds.items()}
            if chain.num_chains is not None:
                drifts = [replace(drift, chain=(drift.chain or 0) + chain.first_number) for drift in drifts]
            warnings.warn(too_short(drifts, self._step_of_keeping or 0, chain.step_size, sds, needed), WarmupWarning)

    def state_dict(self) -> dict[str, Any]:
        """All that the continuation depends on."""
        return {
            "auto": None if self.auto is None else self.auto.state_dict(),
            "watch": None if self._watch is None else self._watch.state_dict(),
            "step_of_keeping": self._step_of_keeping,
        }

    def load_state_dict(self, state: Mapping[str, Any], chain: Chain) -> None:
        """Goes to where a warm-up with the same settings stood."""
        if self.auto is not None and state["auto"] is not None:
            self.auto.load_state_dict(state["auto"])
        self._step_of_keeping = state["step_of_keeping"]
        if state["watch"] is not None:
            self._watch = DriftWatch(chain.layout.names)
            self._watch.load_state_dict(state["watch"])

    def _target(self, chain: Chain) -> Target:
        is_active = torch.ones(chain.num_chains or 1, dtype=torch.bool)
        is_active[[error.chain for error in chain.divergences]] = False
        is_active = torch.cat(self._ranks.gathered(is_active))
        source = chain.potential.source
        return Target(
            chain.potential.gradient,
            source.draw,
            chain.theta,
            self._dynamics(chain),
            self.temperature,
            chain.potential.agreed(epoch_length(source)),
            None if bool(is_active.all()) else is_active,
            self._ranks,
            self._rows,
            self._of_chains,
        )

    def _steps_to_forget(self, chain: Chain, name: str, sd: float) -> float:
        """Steps by the prior of one site; a preconditioner counts by its median over the site."""
        dynamics = self._dynamics(chain)
        site = chain.layout[name]
        scale = 1.0
        if dynamics.metric is not None:
            scale = float(dynamics.metric[..., site.start : site.stop].median())
        return steps_to_forget(chain.step_size * scale, sd, dynamics)


def prior_sds(chain: Chain) -> dict[str, float]:
    """Largest sd of the independent Gaussian priors, by site; sites with other priors are left out."""
    found = {}
    for name, (_, precision) in chain.potential.gaussian_priors.parameters.items():
        smallest = float(torch.as_tensor(precision).min())
        if smallest > 0:
            found[name] = 1 / math.sqrt(smallest)
    return found
