# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One step of a sampler as a function of tensors, run eagerly or compiled.

The state is kept by site, each tensor with a storage of its own: compiled code then writes products of matrices in
place and updates the weights in the same pass. Noise is an argument, since generators do not compile well.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_apd.kernels.engine.cuda_graphs import replayed
from pyro_apd.kernels.engine.gradients import GradientEstimator
from pyro_apd.kernels.engine.noise import Noise
from pyro_apd.kernels.engine.programs import Estimate, compiled
from pyro_apd.kernels.engine.schedules import Schedule
from pyro_apd.models.potential import GradientFunction, Inputs, Pieces, Potential

logger = logging.getLogger("pyro_apd")

#: Weights, over all chains, up to which calls from Python take a noticeable part of the time.
SMALL = 200_000
# Of noise and update, per weight.
_UPDATE_SECONDS = 5e-9


@dataclass(frozen=True)
class Step:
    """Arguments of a sampler's update. Tensors are by site, ``(n,)`` or ``(C, n)``.

    :ivar theta: the state, to be moved in place.
    :ivar auxiliary: what the sampler keeps beside it, to be changed in place.
    :ivar gradient: of U at theta, on this step's mini-batch.
    :ivar Tensor energy: U at theta, on this step's mini-batch, ``()`` or ``(C,)``.
    :ivar noise: independent, of mean 0 and variance 1.
    :ivar Tensor size: epsilon, ``()``, or ``(C, 1)`` where chains may differ.
    :ivar evaluate: gradient of U, and U, at another state on the same mini-batch.
    :ivar int num_data: N, or 1 where the model has no data.
    """

    theta: Pieces
    auxiliary: Mapping[str, Pieces]
    gradient: Pieces
    energy: Tensor
    noise: Pieces
    size: Tensor
    evaluate: Callable[[Pieces], tuple[Pieces, Tensor]]
    num_data: int


@dataclass(frozen=True)
class Measures:
    """Measurements of a step, ``()`` or ``(C,)`` each.

    :ivar energy: U before the step, on its mini-batch.
    :ivar squared_norm: of the gradient; None where it was not computed.
    """

    energy: Tensor
    squared_norm: Tensor | None = None


Update = Callable[[Step], None]


@dataclass(frozen=True)
class StepSettings:
    """How steps are computed.

    :ivar compile: True, False, or ``"auto"``: once ``expected_steps``, or the steps taken, reach those from which it
        pays. By an estimate and not by measured time, so that a seed gives the same draws again.
    :ivar int expected_steps: steps that each chain will take at least.
    :ivar Estimate estimate: of what compiling costs and saves.
    :ivar bool cuda_graphs: replay compiled steps on a GPU as a CUDA graph.
    :ivar int unroll: steps in a compiled program, which share the cost of a call.
    :ivar str noise: kind of :class:`~pyro_apd.kernels.engine.noise.Noise`.
    :ivar int num_threads: threads that torch uses for steps; None for as many as it is set to.
    """

    compile: bool | str = False
    expected_steps: int = 0
    estimate: Estimate = field(default_factory=lambda: Estimate(1, 1))
    cuda_graphs: bool = False
    unroll: int = 1
    noise: str = "normal"
    num_threads: int | None = None


def steps_per_program(thinning: int) -> int:
    """Steps to compile into one program: an equal part of those per draw, of five at most, since compiling is slow."""
    return max(num for num in range(1, 6) if thinning % num == 0)


def step_seconds(potential: Potential, num_chains: int) -> float:
    """Estimated time of a step of all chains on one thread, right to a factor of about two."""
    by_weight = _UPDATE_SECONDS * potential.layout.size
    return num_chains * (potential.operations.gradient_seconds + by_weight)


class StepSizes:
    """The step sizes of the next steps as a tensor, which is written only where a value changes.

    :param schedule: step size by step.
    :param Tensor theta: a state ``(D,)`` or ``(C, D)``.
    :ivar float last: the step size of the last step given; nan before.
    """

    def __init__(self, schedule: Schedule, theta: Tensor) -> None:
        self._schedule = schedule
        self._sizes = theta.new_empty((1, len(theta), 1) if theta.dim() > 1 else (1,))
        self._values: list[float] = []
        self.last = float("nan")

    def of_steps(self, step: int, count: int, is_frozen: Tensor | None) -> Tensor:
        """Of ``count`` steps from ``step`` on, ``(K,)`` or ``(K, C, 1)``; 0 for frozen chains.

        :raises ValueError: if the schedule gives a step size that is not positive and finite.
        """
        values = [self._schedule(step + i) for i in range(count)]
        for i, value in enumerate(values):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"step_size({step + i}) = {value!r}: a schedule must stay positive, finite.")
        if values != self._values:
            if len(self._sizes) != count:
                self._sizes = self._sizes.new_empty((count, *self._sizes.shape[1:]))
            for row, value in zip(self._sizes, values, strict=True):
                row.fill_(value)
                if is_frozen is not None:
                    row[is_frozen] = 0.0
        self._values = values
        self.last = values[-1]
        return self._sizes

    def reset(self) -> None:
        """Writes the tensor again at the next step, for example because other chains are frozen."""
        self._values = []


class Stepper:
    """Takes steps: by the captured or traced gradient and the update as written, or several compiled into one program.

    :param GradientEstimator estimator: estimates gradients.
    :param sizes: number of weights by site.
    :param update: a sampler's update.
    :param noise: where noise comes from.
    :param StepSettings settings: how steps are computed.
    :ivar str path: ``"compiled"``, or the estimator's ``"captured"`` or ``"traced"``.
    """

    def __init__(
        self,
        estimator: GradientEstimator,
        sizes: Sequence[int],
        update: Update,
        noise: Noise,
        settings: StepSettings,
    ) -> None:
        self.estimator = estimator
        self._sizes = list(sizes)
        self._update = update
        self._noise = noise
        self._settings = settings
        self._unroll = settings.unroll
        self._programs: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self.path = "traced"

    def num_at_once(self, num_left: int, step: int, steps_taken: int) -> int:
        """How many of ``num_left`` steps from ``step`` on the next :meth:`take` should have."""
        is_whole = num_left >= self._unroll and step % self._unroll == 0
        return self._unroll if is_whole and self._is_compiling(steps_taken) else 1

    def take(
        self,
        theta: Pieces,
        auxiliary: Mapping[str, Pieces],
        sizes: Tensor,
        inputs: Sequence[Inputs],
        *,
        steps_taken: int,
        is_measured: bool,
    ) -> Measures:
        """Moves ``theta`` and ``auxiliary`` in place by a step on each of the batches ``inputs``.

        :param sizes: epsilon for each step, ``(K,)`` or ``(K, C, 1)``.
        :param steps_taken: by each chain, so far.
        :param is_measured: whether to compute more than the energy.
        """
        state = (theta, auxiliary)
        program = self._program(state, sizes, inputs, steps_taken)
        if program is not None:
            return Measures(*program(*_leaves(state, self._noise.raw(len(inputs)), sizes, inputs)))
        for size, batch in zip(sizes, inputs, strict=True):
            gradients = self.estimator.gradient_function(theta, batch)
            measures = self._step(gradients, state, self._noise.normal(), size, batch, is_measured)
        if self.path != "compiled":
            self.path = self.estimator.path
        return Measures(*measures)

    def _step(
        self, gradients: GradientFunction, state: Any, noise: Tensor, size: Tensor, inputs: Inputs, is_measured: bool
    ) -> tuple[Tensor, ...]:
        theta, auxiliary = state
        gradient, energy = gradients(theta, inputs)
        measures: tuple[Tensor, ...] = (energy,)
        if is_measured:
            measures = (energy, torch.stack([(g * g).sum(-1) for g in gradient]).sum(0))
        pieces = tuple(noise.split(self._sizes, -1))
        num_data = self.estimator.num_data or 1
        self._update(Step(theta, auxiliary, gradient, energy, pieces, size, lambda at: gradients(at, inputs), num_data))
        return measures

    def _is_compiling(self, steps_taken: int) -> bool:
        # The first step uses the captured graph, which checks the model and the start before anything is compiled.
        if not self._settings.compile or steps_taken == 0:
            return False
        num_steps = max(self._settings.expected_steps, steps_taken)
        return self._settings.compile is True or num_steps >= self._settings.estimate.min_steps

    def _program(
        self, state: Any, sizes: Tensor, inputs: Sequence[Inputs], steps_taken: int
    ) -> Callable[..., Any] | None:
        """The compiled steps for inputs of these shapes; None where they are not compiled, or cannot be."""
        if len(inputs) != self._unroll or not self._is_compiling(steps_taken):
            return None
        key, *others = (tuple((tuple(t.shape), t.dtype) for t in batch) for batch in inputs)
        if any(other != key for other in others):
            return None  # a shorter last batch among them: not worth a program for each position
        if key not in self._programs:
            self._programs[key] = self._build(state, sizes, tuple(inputs))
        return self._programs[key]

    def _announcement(self, num_steps: int) -> str:
        estimate, expected = self._settings.estimate, self._settings.expected_steps
        text = f"Compiling {num_steps} step{'s' * (num_steps > 1)}, about {estimate.cost:.0f} s"
        if expected >= estimate.min_steps:
            text += f"; the run's {expected:,} steps then take about {estimate.saved(expected):.0f} s less"
        return text

    def _build(self, state: Any, sizes: Tensor, inputs: tuple[Inputs, ...]) -> Callable[..., Any] | None:
        functions = [self.estimator.gradient_function(state[0], batch) for batch in inputs]
        if self.estimator.path != "captured":
            logger.info("Steps are not compiled: the model could not be captured.")
            return None

        def steps(state: Any, raw: Tensor, sizes: Tensor, inputs: tuple[Inputs, ...]) -> tuple[Tensor, ...]:
            noise = self._noise.to_normal(raw)
            for i, batch in enumerate(inputs):
                is_last = i == len(inputs) - 1
                measures = self._step(functions[i], state, noise[i], sizes[i], batch, is_last)
            return measures

        began = time.monotonic()
        try:
            raw = self._noise.raw_like(len(inputs))
            is_small = sum(piece.numel() for piece in state[0]) <= SMALL
            program = compiled(
                steps, state, raw, sizes, inputs, is_small=is_small, announcement=self._announcement(len(inputs))
            )
            if raw.is_cuda and self._settings.cuda_graphs:
                leaves = _leaves(state, raw, sizes, inputs)
                num_kept = len(_leaves(state, raw, sizes, ())) - 2
                program = replayed(program, leaves[:num_kept], leaves[num_kept:])
        except Exception as error:  # no compiler, or a model that it fails on: the captured graph still works
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("Steps are not compiled, which is slower: %s.", reason)
            return None
        logger.info("Compiled %d steps in %.1f s.", len(inputs), time.monotonic() - began)
        self.path = "compiled"
        return program


def _leaves(state: Any, raw: Tensor, sizes: Tensor, inputs: Sequence[Inputs]) -> list[Tensor]:
    """The tensors of a program's arguments, in :mod:`pyro_apd.runtime.trees`' order, in a tenth of its time."""
    theta, auxiliary = state
    kept = [piece for pieces in auxiliary.values() for piece in pieces]
    return [*theta, *kept, raw, sizes, *(tensor for batch in inputs for tensor in batch)]
