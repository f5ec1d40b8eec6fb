# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A running chain, or C of them advancing as one batched computation: state, randomness, steps, watch for divergence.

Kernels hold settings and speak Pyro's contract; what moves is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.errors import DataError, DivergenceError
from pyro_apd.kernels.noise import Noise
from pyro_apd.kernels.schedules import Schedule
from pyro_apd.kernels.step import Step, Stepper
from pyro_apd.kernels.warmup import WarmUp
from pyro_apd.minibatch import LoaderBatches, check_finite
from pyro_apd.potential import Inputs, Pieces, Potential

# Steps between looks at the state for divergence. Each look waits for the device, so not at every step.
_CHECK_EVERY = 50
# A potential that rose by this many times its scale at the start is on its way to infinity.
_RUNAWAY = 1e3


class Chain:
    """The state of a chain on a potential, or of C chains.

    One chain that runs away raises. Of several, each that runs away stays at its last good state, and the others go on.

    :param Potential potential: what is sampled.
    :param theta: where it starts, unconstrained: ``(D,)``, or ``(C, D)`` for C chains.
    :param schedule: step size by step.
    :param update: a sampler's update.
    :param seeds: one a chain, of its mini-batches and its noise.
    :param str name: the sampler's name, for messages.
    :param compile: see :class:`~pyro_apd.kernels.step.Stepper`.
    :param int expected_steps: Langevin steps that the run is known to take.
    :param bool keep_draws: keep recorded draws for the error of a chain that diverges.
    :param WarmUp warmup: what the chain does for itself; None for nothing.
    :ivar dict auxiliary: what a sampler keeps beside theta, by site, such as momenta.
    :ivar divergences: errors of the chains that diverged, with the chain's index as ``chain``.
    :ivar int step: Langevin steps taken.
    """

    def __init__(
        self,
        potential: Potential,
        theta: Tensor,
        schedule: Schedule,
        update: Callable[[Step], None],
        seeds: Sequence[int],
        name: str,
        *,
        compile: bool | str = False,
        expected_steps: int = 0,
        keep_draws: bool = True,
        warmup: WarmUp | None = None,
    ) -> None:
        self.potential, self.layout, self.name = potential, potential.layout, name
        self.num_chains = len(theta) if theta.dim() > 1 else None
        self._theta: Pieces = tuple(piece.clone() for piece in potential.pieces(theta))
        self.auxiliary: dict[str, Pieces] = {}
        self.step, self.step_size = 0, float("nan")
        self.energy = self._squared_norm = theta.new_zeros(theta.shape[:-1])
        self.draws: list[Tensor] = []
        self.trace: dict[str, list[Tensor]] = {"potential": [], "grad_norm": [], "step_size": []}
        self.divergences: list[DivergenceError] = []
        self._schedule, self._keep_draws, self.warmup = schedule, keep_draws, warmup
        self._like = theta.new_empty(0)
        self._is_cpu = theta.device.type == "cpu"
        self._size = theta.new_full((len(theta), 1) if self.num_chains else (), float("nan"))
        self._start_streams(theta, seeds)
        self._stepper = Stepper(potential, update, self._noise, compile, expected_steps * (self.num_chains or 1))
        self._inputs: Inputs = ()
        self._energy_start: Tensor | None = None
        self._is_frozen = torch.zeros(theta.shape[:-1], dtype=torch.bool)
        self._last_good = tuple(piece.clone() for piece in self._theta)
        self._checked_step = self._num_good = 0

    def _start_streams(self, theta: Tensor, seeds: Sequence[int]) -> None:
        generators = [torch.Generator(device=theta.device).manual_seed(seed) for seed in seeds]
        if isinstance(self.potential.source, LoaderBatches):
            self.potential.source.device = theta.device
        self.potential.source.start(generators if self.num_chains else generators[0])
        self._noise = Noise(theta, seeds)

    @property
    def theta(self) -> Tensor:
        """The state, ``(D,)`` or ``(C, D)``: a copy."""
        return torch.cat(self._theta, -1) if self._theta else self._like

    @theta.setter
    def theta(self, value: Tensor) -> None:
        for piece, new in zip(self._theta, self.potential.pieces(value), strict=True):
            piece.copy_(new)

    @property
    def path(self) -> str:
        """How steps are taken: ``"compiled"``, ``"captured"`` or ``"traced"``."""
        return self._stepper.path

    @property
    def gradient_norm(self) -> Tensor:
        """Norm of the last gradient, ``()`` or ``(C,)``."""
        return self._squared_norm.sqrt()

    def zeros(self) -> Pieces:
        """Zeros by site, for what a sampler keeps beside theta."""
        return tuple(torch.zeros_like(piece) for piece in self._theta)

    def advance(self, num_steps: int) -> None:
        """Takes steps of the sampler.

        :raises DivergenceError: if the chain ran away, or all of several did.
        :raises ValueError: if the schedule gives a step size that is not positive and finite.
        """
        for _ in range(num_steps):
            if self.warmup is not None:
                self.warmup.before_step(self)
            self._set_step_size(self._schedule(self.step))
            self._inputs = self.potential.source.draw()
            taken = self.step * (self.num_chains or 1)
            self.energy, self._squared_norm = self._stepper.take(
                self._theta, self.auxiliary, self._size, self._inputs, taken
            )
            self.step += 1
            # On a CPU the potential can be read at once; elsewhere reading waits for the device.
            is_lost = self._is_cpu and not self._is_finite()
            if is_lost or self.step == 1 or self.step - self._checked_step >= _CHECK_EVERY:
                self.check()
        if self.warmup is not None:
            self.warmup.after_draw(self, self._theta)

    def record(self) -> Tensor:
        """The state as a draw ``(D,)`` or ``(C, D)`` that later steps do not change."""
        return self.theta

    def statistics(self) -> dict[str, Tensor]:
        """Of the last step, ``()`` or ``(C,)``: ``potential`` (U on its mini-batch), ``grad_norm`` and ``step_size``."""
        size = self.energy.new_full(self.energy.shape, self.step_size)
        return {"potential": self.energy.clone(), "grad_norm": self.gradient_norm, "step_size": size}

    def keep(self, draw: Tensor) -> None:
        """Adds a draw after warm-up, with its statistics, to what is kept for the end of the run."""
        if self._keep_draws:
            self.draws.append(draw)
        for name, value in self.statistics().items():
            self.trace[name].append(value)

    def end_warmup(self) -> None:
        """Says that what follows is kept."""
        if self.warmup is not None:
            self.warmup.begin_keeping(self)

    def state_dict(self) -> dict[str, Any]:
        """All that the continuation depends on: tensors, numbers, strings, and dicts and lists of them."""
        return {
            "theta": self.theta,
            "auxiliary": {name: [p.clone() for p in pieces] for name, pieces in self.auxiliary.items()},
            "step": self.step,
            "source": self.potential.source.state_dict(),
            "noise": self._noise.state_dict(),
            "energy_start": self._energy_start,
            "is_frozen": self._is_frozen.clone(),
            "last_good": torch.cat(self._last_good, -1) if self._last_good else self._like,
            "checked_step": self._checked_step,
            "divergences": [error.to_json() for error in self.divergences],
            "warmup": None if self.warmup is None else self.warmup.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a chain with the same settings stood."""
        self.theta = state["theta"]
        for name, pieces in state["auxiliary"].items():
            self.auxiliary[name] = tuple(piece.clone() for piece in pieces)
        self.step, self._checked_step = int(state["step"]), int(state["checked_step"])
        self.potential.source.load_state_dict(state["source"])
        self._noise.load_state_dict(state["noise"])
        self._energy_start, self._is_frozen = state["energy_start"], state["is_frozen"].clone()
        for piece, new in zip(self._last_good, self.potential.pieces(state["last_good"]), strict=True):
            piece.copy_(new)
        self.divergences = [DivergenceError.from_json(error) for error in state["divergences"]]
        if self.warmup is not None and state["warmup"] is not None:
            self.warmup.load_state_dict(state["warmup"], self)
        self.step_size = float("nan")

    # -- divergence ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Looks whether each chain still is where a posterior could be.

        :raises DivergenceError: if the chain is not, or none of several is.
        :raises DataError: if a mini-batch holds NaN, or the start has no finite potential.
        """
        if self.step == 0 or not self._theta:
            return
        if self._energy_start is None:
            self._energy_start = self.energy.clone()
        scale = self._energy_start.abs() + self.layout.size + (self.potential.source.num_data or 0)
        is_good = torch.isfinite(self.energy) & (self.energy - self._energy_start < _RUNAWAY * scale)
        for piece in self._theta:
            is_good &= torch.isfinite(piece).all(-1)
        is_good = is_good.cpu() | self._is_frozen
        if not bool(is_good.all()):
            self._stop(torch.nonzero(~is_good.reshape(-1)).flatten().tolist())
        for good, piece in zip(self._last_good, self._theta, strict=True):
            good.copy_(piece)
        self._checked_step, self._num_good = self.step, len(self.draws)

    def _stop(self, chains: Sequence[int]) -> None:
        """Freezes chains that ran away at their last good state; raises where that leaves none."""
        errors = [self._describe(chain) for chain in chains]
        if self.num_chains is None:
            raise errors[0]
        self.divergences += errors
        self._is_frozen[list(chains)] = True
        if bool(self._is_frozen.all()):
            raise errors[0]
        for chain in chains:
            for pieces in (self._theta, *self.auxiliary.values()):
                for piece, good in zip(pieces, self._last_good, strict=True):
                    piece[chain] = good[chain] if pieces is self._theta else 0.0
        self.step_size = float("nan")  # so that the next step sets it anew, to zero for these

    def _set_step_size(self, step_size: float) -> None:
        if step_size == self.step_size:
            return
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size({self.step}) = {step_size!r}: a schedule must stay positive, finite.")
        self.step_size = step_size
        self._size.fill_(step_size)
        if self.divergences:
            self._size[self._is_frozen] = 0.0

    def _is_finite(self) -> bool:
        if self.num_chains is None:
            return math.isfinite(float(self.energy))
        return bool((torch.isfinite(self.energy) | self._is_frozen).all())

    def _of_chain(self, tensors: Sequence[Tensor], chain: int) -> tuple[Tensor, ...]:
        return tuple(tensors) if self.num_chains is None else tuple(tensor[chain] for tensor in tensors)

    def _describe(self, chain: int) -> DivergenceError:
        inputs = self._of_chain(self._inputs, chain)
        check_finite(self.potential.source.bind(inputs))
        assert self._energy_start is not None
        energy, start = (float(value.reshape(-1)[chain]) for value in (self.energy, self._energy_start))
        if self.step == 1 and not math.isfinite(energy):
            raise DataError(
                f"The potential is {energy} at the starting point. Start elsewhere with init_strategy= or "
                "initial_params=, or check the data for values outside the likelihood's support."
            )
        theta = self._of_chain(self._theta, chain)
        reach = [float(piece.abs().nan_to_num(math.inf).max()) for piece in theta]
        site, furthest = max(zip(self.layout.names, reach, strict=True), key=lambda pair: pair[1])
        curvature, suggested = self._stable_step_size(self._of_chain(self._last_good, chain), inputs)
        draws = self.draws[: self._num_good] if self.num_chains is None else []
        kept = torch.stack(draws) if draws else self._like.new_empty(0, self.layout.size)
        which = "" if self.num_chains is None else f" in chain {chain}"
        return DivergenceError(
            f"{self.name} diverged{which} by Langevin step {self.step}: potential {energy:.3g}, at the start "
            f"{start:.3g}; site '{site}' at |value| {furthest:.3g}, with step_size={self.step_size:.3g}. The largest "
            f"curvature met is about {curvature:.2g}, so step sizes must stay under {4 / curvature:.2g}; try "
            f"step_size={suggested:.0e}. The {len(draws)} draws taken before are in this error's `draws`.",
            step=self.step,
            site=site,
            step_size=self.step_size,
            suggested_step_size=suggested,
            draws=self.layout.constrain(kept),
            chain=chain,
        )

    def _stable_step_size(self, theta: Pieces, inputs: Inputs, iterations: int = 15) -> tuple[float, float]:
        """Largest curvature of U at ``theta``, by power iteration on differences of the gradient, and a step size.

        Langevin steps are stable below 4 / curvature; a tenth of that inflates the variance there by about 11 %.
        """
        centre, curvature = torch.cat(theta), 0.0
        direction = torch.randn(centre.shape, generator=torch.Generator().manual_seed(0)).to(centre)
        reach = 1e-3 * (1.0 + float(centre.norm()))
        for _ in range(iterations):
            offset = direction * (reach / direction.norm())
            ahead, behind = (self.potential.gradient(centre + o, inputs)[0] for o in (offset, -offset))
            direction = (ahead - behind) / (2 * reach)
            norm = float(direction.norm())
            if not math.isfinite(norm) or norm == 0.0:
                break
            curvature = norm
        suggested = min(0.4 / curvature if curvature else math.inf, self.step_size / 10)
        exponent = math.floor(math.log10(suggested))
        return curvature or 4 / self.step_size, math.floor(suggested / 10**exponent) * 10**exponent
