# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A running chain, or C of them advancing as one batched computation: state, randomness, steps, watch for divergence.

Kernels hold settings and speak Pyro's contract; what moves is here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.minibatch import check_finite
from pyro_apd.errors import DataError, DivergenceError
from pyro_apd.kernels.adaptation.warmup import WarmUp
from pyro_apd.kernels.engine.control_variates import ControlVariates
from pyro_apd.kernels.engine.noise import Noise
from pyro_apd.kernels.engine.schedules import Schedule
from pyro_apd.kernels.engine.step import Measures, Step, Stepper
from pyro_apd.kernels.engine.temperature import READ_EVERY, Temperature, Thermometer
from pyro_apd.models.potential import Inputs, Pieces, Potential

# Steps between looks at the state for divergence. Each look waits for the device, so not at every step.
_CHECK_EVERY = 50
# A potential that rose by this many times its scale at the start is on its way to infinity.
_RUNAWAY = 1e3
# From the seed of a stream of mini-batches to that of the next.
_STREAM = 6_700_417


class Chain:
    """The state of a chain on a potential, or of C chains.

    One chain that runs away raises. Of several, each that runs away stays at its last good state, and the others go on.

    :param Potential potential: what is sampled.
    :param theta: where it starts, unconstrained: ``(D,)``, or ``(C, D)`` for C chains.
    :param schedule: step size by step.
    :param update: a sampler's update.
    :param seeds: one a chain, of its mini-batches and its noise.
    :param str name: the sampler's name, for messages.
    :param compile: see :class:`~pyro_apd.kernels.engine.step.Stepper`.
    :param int expected_steps: Langevin steps that the run is known to take.
    :param int unroll: steps that are compiled into one program.
    :param bool keep_draws: keep draws for the error of a chain that diverges.
    :param WarmUp warmup: what the chain does for itself; None for nothing.
    :param bool control_variates: take gradients with control variates about the state before the first step.
    :param kinetic: sums of the momenta's thermal motion by site, given the auxiliary state and the step size.
    :param int of_chains: chains of the whole run, where others of it are elsewhere. Each chain is then the same
        whichever others are here, and where all that are here ran away, they stay and do not raise.
    :param int first_number: number in the run of the first chain here, for messages.
    :param int data_stream: which of the independent streams of mini-batches that go with the seeds.
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
        unroll: int = 1,
        keep_draws: bool = True,
        warmup: WarmUp | None = None,
        control_variates: bool = False,
        kinetic: Callable[[Mapping[str, Pieces], float], Tensor] | None = None,
        of_chains: int | None = None,
        first_number: int = 0,
        data_stream: int = 0,
    ) -> None:
        self.potential, self.layout, self.name = potential, potential.layout, name
        self.num_chains = len(theta) if theta.dim() > 1 else None
        self._has_fellows = of_chains is not None and of_chains > (self.num_chains or 1)
        self.first_number = first_number
        self._num_counted = of_chains or self.num_chains or 1  # chains whose steps count for compiling
        self._theta: Pieces = tuple(piece.clone() for piece in potential.pieces(theta))
        self.auxiliary: dict[str, Pieces] = {}
        self.step, self.step_size = 0, float("nan")
        self._measures = Measures(*[theta.new_zeros(theta.shape[:-1])] * 2)
        self.draws: list[Tensor] = []
        self.trace: dict[str, list[Tensor]] = {"potential": [], "grad_norm": [], "step_size": []}
        self.divergences: list[DivergenceError] = []
        self.control: ControlVariates | None = None
        self._wants_control = control_variates
        self._schedule, self._keep_draws, self.warmup = schedule, keep_draws, warmup
        self._like = theta.new_empty(0)
        self._is_cpu = theta.device.type == "cpu"
        self._sizes = theta.new_empty((1, len(theta), 1) if self.num_chains else (1,))
        self._values: list[float] = []
        self._noise = Noise(theta, seeds, unroll, per_chain=of_chains is not None)
        self._start_streams(theta, [(seed + data_stream * _STREAM) % 2**62 for seed in seeds], unroll)
        sizes = [site.size for site in self.layout]
        known = expected_steps * self._num_counted
        self._stepper = Stepper(potential, sizes, update, self._noise, compile, known, unroll)
        self._read_step = 0
        self.thermometers = [Thermometer("configurational", sizes)]
        self._kinetic = kinetic
        if kinetic is not None:
            self.thermometers.append(Thermometer("kinetic", sizes))
        self._inputs: Inputs = ()
        self._energy_start: Tensor | None = None
        self._is_frozen = torch.zeros(theta.shape[:-1], dtype=torch.bool)
        # The potential of a state is known a step later: it counts as good once the next look finds the chain well.
        self._last_good, self._hopeful = (tuple(piece.clone() for piece in self._theta) for _ in range(2))
        self._checked_step = self._num_good = 0

    def _start_streams(self, theta: Tensor, seeds: Sequence[int], unroll: int) -> None:
        generators = [torch.Generator(device=theta.device).manual_seed(seed) for seed in seeds]
        self.potential.source.device, self.potential.source.at_once = theta.device, unroll
        self.potential.source.start(generators if self.num_chains else generators[0])
        others = [torch.Generator(device=theta.device).manual_seed(seed ^ 1) for seed in seeds]
        self._thermal_source = copy.copy(self.potential.source)
        self._thermal_source.prefetch = 0  # it is asked rarely
        self._thermal_source.start(others if self.num_chains else others[0])

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
    def energy(self) -> Tensor:
        """U before the last step, on its mini-batch, ``()`` or ``(C,)``."""
        return self._measures.energy

    @property
    def gradient_norm(self) -> Tensor:
        """Norm of the gradient of the last step of the last :meth:`advance`, ``()`` or ``(C,)``."""
        assert self._measures.squared_norm is not None
        return self._measures.squared_norm.sqrt()

    def zeros(self) -> Pieces:
        """Zeros by site, for what a sampler keeps beside theta."""
        return tuple(torch.zeros_like(piece) for piece in self._theta)

    def advance(self, num_steps: int) -> None:
        """Takes steps of the sampler.

        :raises DivergenceError: if the chain ran away, or all of several did.
        :raises ValueError: if the schedule gives a step size that is not positive and finite.
        """
        while num_steps > 0:
            if self.warmup is not None:
                self.warmup.before_step(self)
            if self._wants_control:
                self.use_control_variates()
            taken = self.step * self._num_counted
            num = self._stepper.num_at_once(num_steps, self.step, taken)
            num_steps -= num
            inputs = [self.potential.source.draw() for _ in range(num)]
            self._measures = self._stepper.take(
                self._theta,
                self.auxiliary,
                self._step_sizes(num),
                inputs,
                steps_taken=taken,
                is_measured=num_steps == 0,
            )
            self._inputs = inputs[-1]
            self.step += num
            # On a CPU the potential can be read at once; elsewhere reading waits for the device.
            is_lost = self._looks_at_once and not self._is_finite()
            if is_lost or self.step == 1 or self.step - self._checked_step >= _CHECK_EVERY:
                self.check()
        if self.warmup is not None:
            self.warmup.after_draw(self, self._theta)

    @property
    def _looks_at_once(self) -> bool:
        return self._is_cpu and not (self.warmup is not None and self.warmup.looks_together)

    def statistics(self) -> dict[str, Tensor]:
        """Of the last step, ``()`` or ``(C,)``: ``potential`` (U on its batch), ``grad_norm`` and ``step_size``."""
        size = self.energy.new_full(self.energy.shape, self.step_size)
        return {"potential": self.energy, "grad_norm": self.gradient_norm, "step_size": size}

    def keep(self, draw: Tensor) -> None:
        """Keeps a draw and its statistics, for a driver that does not; and observes it."""
        if self._keep_draws:
            self.draws.append(draw)
        for name, value in self.statistics().items():
            self.trace[name].append(value)
        self.observe()

    def observe(self) -> None:
        """Reads the thermometers, where it is time. To be called at each draw after warm-up."""
        # Ever more rarely: a long run has readings enough, and each costs a gradient.
        if self.step - self._read_step >= max(READ_EVERY, self.step // 50):
            self._read_temperatures()

    def _read_temperatures(self) -> None:
        self._read_step = self.step
        inputs = self._thermal_source.draw()
        gradient, _ = self._stepper.potential.gradient_function(self._theta, inputs)(self._theta, inputs)
        priors = self.potential.gaussian_priors.parameters
        locs = [priors.get(name, (0.0, 0.0))[0] for name in self.layout.names]
        states = zip(self._theta, locs, gradient, strict=True)
        self.thermometers[0].add(torch.stack([((theta - loc) * g).sum(-1) for theta, loc, g in states], -1))
        if self._kinetic is not None:
            self.thermometers[1].add(self._kinetic(self.auxiliary, self.step_size))

    def temperatures(self, target: float) -> list[Temperature]:
        """What the thermometers read over the kept draws, beside the ``target``."""
        return [reading for t in self.thermometers for reading in t.readings(self.layout.names, target)]

    def close(self) -> None:
        """Ends what reads batches beside the chain, which takes no further steps."""
        self.potential.source.close()

    def end_warmup(self) -> None:
        """Says that what follows is kept."""
        if self.warmup is not None:
            self.warmup.begin_keeping(self)

    def use_control_variates(self) -> None:
        """From here on takes gradients with control variates about the present state.

        :raises ValueError: if the mini-batches cannot be made to cover the data once.
        """
        self._install(ControlVariates.about(self.potential, self._theta))

    def _install(self, control: ControlVariates) -> None:
        self.control, self._wants_control = control, False
        self._stepper.potential = control

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
            "hopeful": torch.cat(self._hopeful, -1) if self._hopeful else self._like,
            "checked_step": self._checked_step,
            "divergences": [error.to_json() for error in self.divergences],
            "thermometers": [thermometer.state_dict() for thermometer in self.thermometers],
            "thermal_source": self._thermal_source.state_dict(),
            "read_step": self._read_step,
            "control": None if self.control is None else self.control.state_dict(),
            "warmup": None if self.warmup is None else self.warmup.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a chain with the same settings stood."""
        self.theta = state["theta"]
        for name, pieces in state["auxiliary"].items():
            for piece, new in zip(self.auxiliary[name], pieces, strict=True):
                piece.copy_(new)
        self.step, self._checked_step = int(state["step"]), int(state["checked_step"])
        self.potential.source.load_state_dict(state["source"])
        self._noise.load_state_dict(state["noise"])
        self._energy_start, self._is_frozen = state["energy_start"], state["is_frozen"].clone()
        for pieces, name in ((self._last_good, "last_good"), (self._hopeful, "hopeful")):
            for piece, new in zip(pieces, self.potential.pieces(state[name]), strict=True):
                piece.copy_(new)
        self.divergences = [DivergenceError.from_json(error) for error in state["divergences"]]
        self._values = []
        for thermometer, readings in zip(self.thermometers, state["thermometers"], strict=True):
            thermometer.load_state_dict(readings)
        self._thermal_source.load_state_dict(state["thermal_source"])
        self._read_step = int(state["read_step"])
        if state["control"] is not None:
            self._install(ControlVariates(self.potential, **state["control"]))
        if self.warmup is not None and state["warmup"] is not None:
            self.warmup.load_state_dict(state["warmup"], self)

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
        scale = self._energy_start.abs() + self.layout.size + (self.potential.num_data or 0)
        is_good = torch.isfinite(self.energy) & (self.energy - self._energy_start < _RUNAWAY * scale)
        for piece in self._theta:
            is_good &= torch.isfinite(piece).all(-1)
        is_good = is_good.cpu() | self._is_frozen
        lost = torch.nonzero(~is_good.reshape(-1)).flatten().tolist()
        if self.warmup is not None and self.warmup.backs_off(self, bool(lost)):
            self._put_back(lost)
        elif lost:
            self._stop(lost)
        for good, hopeful, piece in zip(self._last_good, self._hopeful, self._theta, strict=True):
            good.copy_(hopeful)
            hopeful.copy_(piece)
        self._checked_step, self._num_good = self.step, len(self.draws)

    def _stop(self, chains: Sequence[int]) -> None:
        """Freezes chains that ran away at their last good state; raises where that leaves none."""
        errors = [self._describe(chain) for chain in chains]
        if self.num_chains is None:
            raise errors[0]
        self.divergences += errors
        self._is_frozen[list(chains)] = True
        if bool(self._is_frozen.all()) and not self._has_fellows:
            raise errors[0]
        self._put_back(chains)

    def _put_back(self, chains: Sequence[int]) -> None:
        """Chains to their last good state, at rest."""
        for chain in chains:
            row = ... if self.num_chains is None else chain
            for theta, hopeful, good in zip(self._theta, self._hopeful, self._last_good, strict=True):
                theta[row] = hopeful[row] = good[row]
            for pieces in self.auxiliary.values():
                for piece in pieces:
                    piece[row] = 0.0
        self._values = []  # so that the next step sets them anew: to zero for chains that are frozen

    def _step_sizes(self, num_steps: int) -> Tensor:
        """Of the next steps, ``(K,)`` or ``(K, C, 1)``; nothing is written where they are those of the last."""
        values = [self._schedule(self.step + i) for i in range(num_steps)]
        for i, value in enumerate(values):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"step_size({self.step + i}) = {value!r}: a schedule must stay positive, finite.")
        if values != self._values:
            if len(self._sizes) != num_steps:
                self._sizes = self._sizes.new_empty((num_steps, *self._sizes.shape[1:]))
            for row, value in zip(self._sizes, values, strict=True):
                row.fill_(value)
                if self.divergences:
                    row[self._is_frozen] = 0.0
        self._values, self.step_size = values, values[-1]
        return self._sizes

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
        which = "" if self.num_chains is None else f" in chain {self.first_number + chain}"
        return DivergenceError(
            f"{self.name} diverged{which} by Langevin step {self.step}: potential {energy:.3g}, at the start "
            f"{start:.3g}; site '{site}' at |value| {furthest:.3g}, with step_size={self.step_size:.3g}. The largest "
            f"curvature met is about {curvature:.2g}, so step sizes must stay under {4 / curvature:.2g}; try "
            f"step_size={suggested:.0e}. The draws taken before are in this error's `draws`.",
            step=self.step,
            site=site,
            step_size=self.step_size,
            suggested_step_size=suggested,
            draws=self.layout.constrain(kept),
            chain=chain,
            last_good_step=max(self._checked_step - 1, 0),  # its potential was looked at, not that of the next
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
