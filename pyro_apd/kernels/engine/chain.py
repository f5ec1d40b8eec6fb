# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A running chain, or C chains that advance as one batched computation: state, random streams, steps.

Kernels hold settings and follow Pyro's contract; what changes from step to step is here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.index_stream import Generators
from pyro_apd.errors import DivergenceError
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.warmup import WarmUp
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.divergence import (
    CHECK_EVERY,
    DivergenceReport,
    DivergenceWatch,
    LastStep,
    Rewind,
    of_chain,
)
from pyro_apd.kernels.engine.gradients import GradientEstimator
from pyro_apd.kernels.engine.noise import Noise
from pyro_apd.kernels.engine.schedules import Schedule
from pyro_apd.kernels.engine.step import Measures, Stepper, StepSettings, StepSizes, Update
from pyro_apd.kernels.engine.temperature import Kinetic, Temperature, ThermometerSet
from pyro_apd.models.fixed_point import fixed_point_values
from pyro_apd.models.potential import Inputs, Pieces, Potential
from pyro_apd.runtime.cpu_threads import cpu_threads
from pyro_apd.runtime.seeds import derived_generator, derived_seed

# Mini-batches that are asked whether a state is on an excursion, or only a row of its last batch is far off.
_NUM_OTHERS = 8


@dataclass(frozen=True)
class Sampler:
    """What a kernel defines about its chains.

    :ivar str name: for messages.
    :ivar update: the update equation.
    :ivar dynamics: the recursion that it is along one direction, at the chain's present state.
    :ivar kinetic: see :class:`~pyro_apd.kernels.engine.temperature.ThermometerSet`.
    :ivar kept: names of the auxiliary state that stays when a chain is put back to its checkpoint.
    :ivar restored: names of that which is put back too.
    """

    name: str
    update: Update
    dynamics: Callable[[Chain], Dynamics]
    kinetic: Kinetic | None = None
    kept: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()


class Chain:
    """The state of a chain on a potential, or of C chains.

    A single chain that diverges raises. Of several chains, each that diverges is frozen at the last state whose
    potential was checked, and the others go on.

    :param Potential potential: what is sampled; where data are split over processes, that of the rows here.
    :param GradientEstimator estimator: estimates the gradients of steps.
    :param theta: the start, unconstrained: ``(D,)``, or ``(C, D)`` for C chains.
    :param ChainSet chains: which chains of a run these are. Where other processes have the others, each chain is the
        same whichever others are here, and where all that are here diverged, they stay frozen and do not raise.
    :param seeds: one per chain, of its random streams.
    :param Sampler sampler: what the kernel defines.
    :param schedule: step size by step.
    :param StepSettings settings: how steps are computed.
    :param WarmUp warmup: adapts the chain during warm-up.
    :ivar dict auxiliary: what a sampler keeps beside theta, by site, such as momenta.
    :ivar int step: Langevin steps taken.
    """

    def __init__(
        self,
        potential: Potential,
        estimator: GradientEstimator,
        theta: Tensor,
        chains: ChainSet,
        seeds: Sequence[int],
        sampler: Sampler,
        schedule: Schedule,
        settings: StepSettings,
        warmup: WarmUp,
    ) -> None:
        self.potential = potential
        self.layout = potential.layout
        self.estimator = estimator
        self.chains = chains
        self.warmup = warmup
        self.auxiliary: dict[str, Pieces] = {}
        self.step = 0
        self.draws: list[Tensor] = []
        self.trace: dict[str, list[Tensor]] = {"potential": [], "grad_norm": [], "step_size": []}
        self._sampler = sampler
        self._num_threads = settings.num_threads
        self._theta: Pieces = tuple(piece.clone() for piece in potential.pieces(theta))
        self._like = theta.new_empty(0)
        self._is_cpu = theta.device.type == "cpu"
        self._measures = Measures(*[theta.new_zeros(theta.shape[:-1])] * 2)
        self._inputs: Inputs = ()
        self._step_sizes = StepSizes(schedule, theta)
        noise_seeds = [derived_seed(seed, "noise") for seed in seeds]
        self._noise = Noise(theta, noise_seeds, settings.unroll, chains.is_distributed, settings.noise)
        potential.source.device = theta.device
        potential.source.at_once = settings.unroll
        potential.source.start(self._generators(seeds, "batches"))
        sizes = [site.size for site in self.layout]
        self._stepper = Stepper(estimator, sizes, sampler.update, self._noise, settings)
        self._thermometers = ThermometerSet(
            potential, estimator, self._generators(seeds, "thermometer"), sampler.kinetic
        )
        self._watch = DivergenceWatch(self._theta, theta, self.layout.size + (estimator.num_data or 0))

    def _generators(self, seeds: Sequence[int], stream: str) -> Generators:
        """Of mini-batches: independent ones on the processes that share the data."""
        rank, device = self.chains.data_rank, self._like.device
        generators = [derived_generator(seed, stream, rank, device=device) for seed in seeds]
        return generators if self.num_chains else generators[0]

    @property
    def num_chains(self) -> int | None:
        """Number of chains, C; None for a single chain with a state ``(D,)``."""
        return self.chains.count

    @property
    def theta(self) -> Tensor:
        """The state, ``(D,)`` or ``(C, D)``: a copy."""
        return torch.cat(self._theta, -1) if self._theta else self._like

    @theta.setter
    def theta(self, value: Tensor) -> None:
        for piece, new in zip(self._theta, self.potential.pieces(value), strict=True):
            piece.copy_(new)

    @property
    def divergences(self) -> list[DivergenceError]:
        """Errors of the chains that diverged, with the index among the chains here as ``chain``."""
        return self._watch.divergences

    @property
    def path(self) -> str:
        """How steps are computed: ``"compiled"``, ``"captured"`` or ``"traced"``."""
        return self._stepper.path

    @property
    def step_size(self) -> float:
        """Of the last step; nan before."""
        return self._step_sizes.last

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

    def dynamics(self) -> Dynamics:
        """The sampler's recursion at the present state."""
        return self._sampler.dynamics(self)

    def advance(self, num_steps: int) -> None:
        """Takes steps of the sampler.

        :raises DivergenceError: if the chain diverged, or all of several did.
        :raises ValueError: if the schedule gives a step size that is not positive and finite.
        """
        with cpu_threads(self._num_threads):
            self._advance(num_steps)

    def _advance(self, num_steps: int) -> None:
        while num_steps > 0:
            self.warmup.before_step(self)
            if self.step == 0:
                self.estimator.prepare(self._theta)
            num = self._stepper.num_at_once(num_steps, self.step, self.step)
            num_steps -= num
            inputs = [self.potential.source.draw() for _ in range(num)]
            is_frozen = self._watch.is_frozen if self._watch.divergences else None
            self._measures = self._stepper.take(
                self._theta,
                self.auxiliary,
                self._step_sizes.of_steps(self.step, num, is_frozen),
                inputs,
                steps_taken=self.step,
                is_measured=num_steps == 0,
            )
            self._inputs = inputs[-1]
            self.step += num
            # On a CPU the potential can be read at once; elsewhere reading waits for the device. Where processes check
            # their chains together, none may do so earlier.
            reads_now = self._is_cpu and not self.warmup.checks_in_sync
            is_lost = reads_now and (not self._watch.is_finite(self.energy) or self.warmup.is_suspicious(self.energy))
            if is_lost or self.step == 1 or self.step - self._watch.checked_step >= CHECK_EVERY:
                self.check()
        self.warmup.after_draw(self, self._theta)

    def statistics(self) -> dict[str, Tensor]:
        """Of the last step, ``()`` or ``(C,)``: ``potential`` (U on its batch), ``grad_norm`` and ``step_size``."""
        size = self.energy.new_full(self.energy.shape, self.step_size)
        return {"potential": self.energy, "grad_norm": self.gradient_norm, "step_size": size}

    def keep(self, draw: Tensor) -> None:
        """Keeps a draw and its statistics, for a driver that does not; and observes it."""
        self.draws.append(draw)
        for name, value in self.statistics().items():
            self.trace[name].append(value)
        self.observe()

    def observe(self) -> None:
        """Reads the thermometers, where it is time. To be called at each draw after warm-up."""
        with cpu_threads(self._num_threads):
            self._thermometers.observe(self.step, self.step_size, self._theta, self.auxiliary)

    def temperatures(self, target: float) -> list[Temperature]:
        """What the thermometers read over the kept draws, beside the ``target``."""
        return self._thermometers.temperatures(target)

    @functools.cached_property
    def _rewind(self) -> Rewind:
        # Kernels add auxiliary state after the chain is made.
        return Rewind([piece for name in self._sampler.restored for piece in self.auxiliary[name]])

    def fixed_point_values(self) -> dict[str, Any]:
        """What identifies the posterior, see :mod:`pyro_apd.models.fixed_point`; of a chain before its first step."""
        return fixed_point_values(self.potential, self._like)

    def close(self) -> None:
        """Ends the thread that reads batches ahead; no further steps are taken."""
        self.potential.source.close()

    def end_warmup(self) -> None:
        """Marks the end of the warm-up: draws are kept from here on."""
        self.warmup.begin_keeping(self)

    def check(self) -> None:
        """Detects chains that have diverged, and puts them back, freezes them, or raises.

        :raises DivergenceError: if the chain diverged, or all of several did.
        :raises DataError: if a mini-batch holds NaN, or the start has no finite potential.
        """
        if self.step == 0 or not self._theta:
            return
        diverged = self._watch.diverged(self.energy, self._theta)
        is_outside = self.outside_history(may_wait=True)
        outside = torch.nonzero(is_outside.reshape(-1)).flatten().tolist()
        if self.warmup.backs_off(self, bool(diverged), bool(outside)):
            # Where one is put back all are: others may be on their way out by the same step size.
            self._put_back(torch.nonzero(~self._watch.is_frozen.reshape(-1)).flatten().tolist())
        elif diverged:
            self._stop(diverged)
        self.warmup.excursions.add(self.energy)
        if self.warmup.is_adapting:
            self._rewind.passed()
        self._watch.passed(self._theta, self.step, len(self.draws), is_outside if outside else None)

    def outside_history(self, *, may_wait: bool) -> Tensor:
        """Which chains are on an excursion, see :mod:`pyro_apd.kernels.adaptation.excursions`, ``()`` or ``(C,)``.

        :param may_wait: whether to ask, also where the device has to be waited for, if an outlying mini-batch is all.
        """
        watch = self.warmup.excursions
        is_outside = watch.beyond(self.energy)
        if watch.limit is None or not (watch.has_history or self.warmup.is_adapting):
            return torch.zeros_like(is_outside)
        is_outside = is_outside & ~self._watch.is_frozen.to(is_outside.device)
        if (self._is_cpu or may_wait) and bool(is_outside.any()):
            is_outside = is_outside & ~watch.beyond(self.estimator.gradient(self._watch.checkpoint, self._inputs)[1])
            if self.potential.source.epoch_length != 1 and bool(is_outside.any()):
                is_outside = is_outside & watch.beyond(self._energy_on_others())
        return is_outside

    def _energy_on_others(self) -> Tensor:
        """U at the present state, averaged over further mini-batches, ``()`` or ``(C,)``."""
        theta = self.theta
        batches = [self.potential.source.draw() for _ in range(_NUM_OTHERS)]
        return torch.stack([self.estimator.gradient(theta, batch)[1] for batch in batches]).mean(0)

    def _stop(self, diverged: Sequence[int]) -> None:
        """Freezes chains at their checkpoint; raises where that leaves none."""
        errors = [self._error(chain) for chain in diverged]
        if self.num_chains is None:
            raise errors[0]
        self._watch.freeze(errors)
        if bool(self._watch.is_frozen.all()) and self.chains.is_whole_run:
            raise errors[0]
        self._put_back(diverged)

    def _put_back(self, diverged: Sequence[int]) -> None:
        """Resets chains to their checkpoint, with an auxiliary state of zero but for what stays or is put back."""
        self._watch.put_back(diverged, self._theta)
        self._rewind.put_back(diverged, self.num_chains is None)
        staying = (*self._sampler.kept, *self._sampler.restored)
        moving = [pieces for name, pieces in self.auxiliary.items() if name not in staying]
        for chain in diverged:
            row = ... if self.num_chains is None else chain
            for pieces in moving:
                for piece in pieces:
                    if piece.is_floating_point():  # others are counts of steps
                        piece[row] = 0.0
        self._step_sizes.reset()  # they become 0 for chains that are frozen

    def _error(self, chain: int) -> DivergenceError:
        is_single = self.num_chains is None
        self.potential.check_batch(of_chain(self._inputs, None if is_single else chain))
        report = DivergenceReport(
            self._sampler.name, self.layout, self.estimator.gradient, None if is_single else self.chains.first
        )
        last = LastStep(self.step, self.step_size, self.energy, self._theta, self._inputs)
        draws = self.draws[: self._watch.num_safe_draws] if is_single else []
        return report.error(chain, last, self._watch, draws)

    def state_dict(self) -> dict[str, Any]:
        """All that the continuation depends on: tensors, numbers, strings, and dicts and lists of them."""
        return {
            "theta": self.theta,
            "auxiliary": {name: [p.clone() for p in pieces] for name, pieces in self.auxiliary.items()},
            "step": self.step,
            "source": self.potential.source.state_dict(),
            "noise": self._noise.state_dict(),
            "estimator": self.estimator.state_dict(),
            "divergence": self._watch.state_dict(),
            "rewind": self._rewind.state_dict(),
            "thermometers": self._thermometers.state_dict(),
            "warmup": self.warmup.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, on a chain with the same settings."""
        self.theta = state["theta"]
        for name, pieces in state["auxiliary"].items():
            for piece, new in zip(self.auxiliary[name], pieces, strict=True):
                piece.copy_(new)
        self.step = int(state["step"])
        self.potential.source.load_state_dict(state["source"])
        self._noise.load_state_dict(state["noise"])
        if state["estimator"] is not None:
            self.estimator.load_state_dict(state["estimator"])
        self._watch.load_state_dict(state["divergence"])
        self._rewind.load_state_dict(state["rewind"])
        self._thermometers.load_state_dict(state["thermometers"])
        self.warmup.load_state_dict(state["warmup"], self)
        self._step_sizes.reset()
