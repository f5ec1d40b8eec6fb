# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One running chain: its state, its randomness, its steps, and the watch for divergence.

Kernels hold settings and speak Pyro's contract; what moves is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from pyro_apd.errors import DataError, DivergenceError
from pyro_apd.kernels.schedules import Schedule
from pyro_apd.minibatch import LoaderBatches, check_finite
from pyro_apd.potential import Inputs, Potential

# Steps between looks at the state for divergence. Each look waits for the device, so not at every step.
_CHECK_EVERY = 50
# A potential that rose by this many times its scale at the start is on its way to infinity.
_RUNAWAY = 1e3


class Chain:
    """The state of a chain on a potential.

    :param Potential potential: what is sampled.
    :param theta: where it starts, ``(D,)``, unconstrained.
    :param schedule: step size by step.
    :param update: moves ``chain.theta`` in place, given the chain, the gradient ``(D,)`` and the step size.
    :param int seed: of the chain's own generator, which its mini-batches and its noise come from.
    :param str name: the sampler's name, for messages.
    :ivar dict auxiliary: what a sampler keeps beside theta, such as momenta.
    """

    def __init__(
        self,
        potential: Potential,
        theta: Tensor,
        schedule: Schedule,
        update: Callable[[Chain, Tensor, float], None],
        seed: int,
        name: str,
    ) -> None:
        self.potential, self.layout, self.name = potential, potential.layout, name
        self.theta = theta.clone()
        self.auxiliary: dict[str, Tensor] = {}
        self.step = 0
        self.step_size = float("nan")
        self.energy = self.gradient_norm = theta.new_zeros(())
        self.draws: list[Tensor] = []
        self.trace: dict[str, list[Tensor]] = {"potential": [], "grad_norm": [], "step_size": []}
        self._schedule, self._update = schedule, update
        self._noise, self._is_cpu = torch.empty_like(theta), theta.device.type == "cpu"
        self._generator = torch.Generator(device=theta.device).manual_seed(seed)
        if isinstance(potential.source, LoaderBatches):
            potential.source.device = theta.device
        potential.source.start(self._generator)
        self._inputs: Inputs = ()
        self._gradient = torch.zeros_like(theta)
        self._energy_start: float | None = None
        self._last_good = self.theta.clone()
        self._checked_step = self._num_good = 0

    def gradient_at(self, theta: Tensor) -> Tensor:
        """Gradient of U ``(D,)`` at another point, on the mini-batch of the present step."""
        return self.potential.gradient(theta, self._inputs)[0]

    def gaussian_noise(self) -> Tensor:
        """Standard normal noise ``(D,)``, in one buffer that the next call overwrites."""
        return self._noise.normal_(generator=self._generator)

    def advance(self, num_steps: int) -> None:
        """Takes steps of the sampler.

        :raises DivergenceError: if the chain ran away.
        :raises ValueError: if the schedule gives a step size that is not positive and finite.
        """
        for _ in range(num_steps):
            self.step_size = self._schedule(self.step)
            if not (math.isfinite(self.step_size) and self.step_size > 0):
                raise ValueError(f"step_size({self.step}) = {self.step_size!r}: a schedule must stay positive, finite.")
            self._inputs = self.potential.source.draw()
            self._gradient, self.energy = self.potential.gradient(self.theta, self._inputs)
            self._update(self, self._gradient, self.step_size)
            self.step += 1
            # On a CPU the potential can be read at once; elsewhere reading waits for the device.
            is_lost = self._is_cpu and not math.isfinite(float(self.energy))
            if is_lost or self.step == 1 or self.step - self._checked_step >= _CHECK_EVERY:
                self.check()

    def record(self, keep: bool) -> Tensor:
        """The state as a draw ``(D,)`` that later steps do not change; kept with its statistics where ``keep``."""
        theta = self.theta.clone()
        self.gradient_norm = self._gradient.norm()
        if keep:
            self.draws.append(theta)
            for name, value in (("potential", self.energy), ("grad_norm", self.gradient_norm)):
                self.trace[name].append(value)
            self.trace["step_size"].append(torch.tensor(self.step_size))
        return theta

    def check(self) -> None:
        """Looks whether the chain still is where a posterior could be.

        :raises DivergenceError: if it is not.
        :raises DataError: if the mini-batch holds NaN, or the start has no finite potential.
        """
        if self.step == 0:
            return
        energy = float(self.energy)
        if self._energy_start is None:
            self._energy_start = energy
        scale = abs(self._energy_start) + self.layout.size + (self.potential.source.num_data or 0)
        is_bounded = math.isfinite(energy) and energy - self._energy_start < _RUNAWAY * scale
        if is_bounded and bool(torch.isfinite(self.theta).all()):
            self._last_good.copy_(self.theta)
            self._checked_step, self._num_good = self.step, len(self.draws)
            return
        self._refuse(energy)

    def _refuse(self, energy: float) -> NoReturn:
        check_finite(self.potential.source.bind(self._inputs))
        if self.step == 1 and not math.isfinite(energy):
            raise DataError(
                f"The potential is {energy} at the starting point. Start elsewhere with init_strategy= or "
                "initial_params=, or check the data for values outside the likelihood's support."
            )
        reach = {s.name: float(self.theta[s.start : s.stop].abs().nan_to_num(math.inf).max()) for s in self.layout}
        site = max(reach, key=lambda name: reach[name])
        curvature, suggested = self._stable_step_size()
        draws = self.draws[: self._num_good]
        kept = torch.stack(draws) if draws else self.theta.new_empty(0, self.layout.size)
        raise DivergenceError(
            f"{self.name} diverged by Langevin step {self.step}: potential {energy:.3g}, at the start "
            f"{self._energy_start:.3g}; site '{site}' at |value| {reach[site]:.3g}, with "
            f"step_size={self.step_size:.3g}. The largest curvature met is about {curvature:.2g}, so step sizes must "
            f"stay under {4 / curvature:.2g}; try step_size={suggested:.0e}. The {len(draws)} draws taken before are "
            "in this error's `draws`.",
            step=self.step,
            site=site,
            step_size=self.step_size,
            suggested_step_size=suggested,
            draws=self.layout.constrain(kept),
        )

    def _stable_step_size(self, iterations: int = 15) -> tuple[float, float]:
        """Largest curvature of U at the last good state, by power iteration on differences of the gradient, and a step.

        Langevin steps are stable below 4 / curvature; a tenth of that inflates the variance there by about 11 %.
        """
        theta, curvature = self._last_good, 0.0
        direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)).to(theta)
        reach = 1e-3 * (1.0 + float(theta.norm()))
        for _ in range(iterations):
            offset = direction * (reach / direction.norm())
            ahead, behind = (self.potential.gradient(theta + o, self._inputs)[0] for o in (offset, -offset))
            direction = (ahead - behind) / (2 * reach)
            norm = float(direction.norm())
            if not math.isfinite(norm) or norm == 0.0:
                break
            curvature = norm
        suggested = min(0.4 / curvature if curvature else math.inf, self.step_size / 10)
        exponent = math.floor(math.log10(suggested))
        return curvature or 4 / self.step_size, math.floor(suggested / 10**exponent) * 10**exponent
