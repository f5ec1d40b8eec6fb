# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Measures a chain's temperature, in two ways: Wenzel et al. (ICML 2020), appendix I.

At the target exp(-U/T), whatever the model, (theta - c) . dU/dtheta has the expectation n T over n weights, for any
constant c (equipartition, or the virial theorem): divided by n, that is the *configurational* temperature. Here c is
the prior's mean. Where the posterior's mean is many of its standard deviations away from c, readings are noisy, which
their standard error shows. With the chain's own mean they would be less noisy, but wrong until the chain has mixed.

Steps that are too large and mini-batch noise raise the temperature; so does a chain that has not reached its target.
Samplers with momenta also have a *kinetic* temperature, that of the momenta alone. Either can be read for each site, so
for each layer.

Gradients for a reading are computed on mini-batches of their own. Those of the chain's next step would bias it: within
an epoch they are the rows that the batches so far, which moved theta, have left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.index_stream import Generators
from pyro_apd.kernels.engine.gradients import GradientEstimator
from pyro_apd.models.potential import Pieces, Potential

#: Langevin steps from one reading to the next, at least: a reading costs a gradient.
READ_EVERY = 100
#: Blocks of consecutive readings, whose means give a standard error that allows for autocorrelation.
NUM_BLOCKS = 20

#: Sums of the momenta's thermal motion by site, given the auxiliary state and the step size.
Kinetic = Callable[[Mapping[str, Pieces], float], Tensor]


@dataclass(frozen=True)
class Temperature:
    """One reading.

    :ivar str kind: ``"configurational"`` or ``"kinetic"``.
    :ivar str site: a site's name, or ``"all"``.
    :ivar float mean: the temperature.
    :ivar float standard_error: of the mean, by the means of 20 blocks of readings; None with fewer readings.
    :ivar float target: the kernel's temperature.
    :ivar int steps_needed: Langevin steps of kept draws from which there is a standard error; None where there is one.
    """

    kind: str
    site: str
    mean: float
    standard_error: float | None
    target: float
    steps_needed: int | None = None

    def __str__(self) -> str:
        if self.standard_error is None:
            needed = "" if self.steps_needed is None else f", {self.steps_needed:,} Langevin steps of kept draws needed"
            return f"{self.kind} {self.site}: too short to read{needed} (target {self.target:g})"
        return f"{self.kind} {self.site}: {self.mean:.3g} +- {self.standard_error:.2g} (target {self.target:g})"


class Thermometer:
    """Accumulates, per reading and site, the sum whose expectation is n T.

    :param str kind: of temperature.
    :param sizes: weights by site.
    """

    def __init__(self, kind: str, sizes: Sequence[int]) -> None:
        self.kind, self._sizes = kind, list(sizes)
        self._readings: list[Tensor] = []

    def add(self, sums: Tensor) -> None:
        """One reading: sums over the weights of each site, ``(sites,)`` or ``(C, sites)``, of expectation n T."""
        self._readings.append(sums)

    def state_dict(self) -> dict[str, Any]:
        """The readings so far."""
        return {"readings": list(self._readings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._readings = list(state["readings"])

    def readings(self, names: Sequence[str], target: float, steps_needed: int | None = None) -> list[Temperature]:
        """Of all weights, then of each site; over all chains.

        :param steps_needed: Langevin steps that take enough readings for a standard error.
        """
        if not self._readings:
            return []
        sums = torch.stack(self._readings, -2).double().cpu()
        sums = sums.reshape(-1, *sums.shape[-2:])  # (C, S, sites)
        series = [("all", sums.sum(-1) / sum(self._sizes))]
        series += [(name, sums[..., i] / self._sizes[i]) for i, name in enumerate(names)]
        found = []
        for name, values_CS in series:
            error = _standard_error(values_CS)
            needed = steps_needed if error is None else None
            found.append(Temperature(self.kind, name, float(values_CS.mean()), error, target, needed))
        return found


class ThermometerSet:
    """The thermometers of a chain, or of C chains, and the mini-batches that they read.

    :param Potential potential: what is sampled; mini-batches of its source, from generators of their own, are used.
    :param GradientEstimator estimator: estimates gradients, as for the chain's steps.
    :param generators: of the mini-batches, one per chain for C chains.
    :param kinetic: sums of the momenta's thermal motion by site, given the auxiliary state and the step size; None for
        samplers without momenta.
    """

    def __init__(
        self, potential: Potential, estimator: GradientEstimator, generators: Generators, kinetic: Kinetic | None
    ) -> None:
        self._potential = potential
        self._estimator = estimator
        self._kinetic = kinetic
        self._source = copy.copy(potential.source)
        self._source.prefetch = 0  # it is asked rarely
        self._source.start(generators)
        sizes = [site.size for site in potential.layout]
        kinds = ["configurational"] if kinetic is None else ["configurational", "kinetic"]
        self._thermometers = [Thermometer(kind, sizes) for kind in kinds]
        self._read_step = 0
        # Step of the first draw that was offered, and of the last.
        self._first_step: int | None = None
        self._last_step = 0
        self._steps_per_draw = 1

    def observe(self, step: int, step_size: float, theta: Pieces, auxiliary: Mapping[str, Pieces]) -> None:
        """Takes a reading, where it is time. To be called at each draw after warm-up."""
        if self._first_step is None:
            self._first_step = step
        else:
            self._steps_per_draw = max(step - self._last_step, 1)
        self._last_step = step
        if step - self._read_step < _interval(step):
            return
        self._read_step = step
        inputs = self._source.draw()
        gradient, _ = self._estimator.gradient_function(theta, inputs)(theta, inputs)
        priors = self._potential.gaussian_priors.parameters
        locs = [priors.get(name, (0.0, 0.0))[0] for name in self._potential.layout.names]
        states = zip(theta, locs, gradient, strict=True)
        self._thermometers[0].add(torch.stack([((piece - loc) * g).sum(-1) for piece, loc, g in states], -1))
        if self._kinetic is not None:
            self._thermometers[1].add(self._kinetic(auxiliary, step_size))

    def temperatures(self, target: float) -> list[Temperature]:
        """The readings so far, beside the ``target``."""
        names = self._potential.layout.names
        needed = self._steps_needed()
        return [reading for t in self._thermometers for reading in t.readings(names, target, needed)]

    def _steps_needed(self) -> int:
        """Langevin steps from the end of the warm-up to the reading from which there is a standard error."""
        first = step = self._first_step or 0
        num_readings = 1 if first >= _interval(first) else 0
        while num_readings < NUM_BLOCKS:
            # The first draw at which a reading is due. Intervals grow by 2 % of the step that they end at.
            wait = max(READ_EVERY, step // 49)
            step += math.ceil(wait / self._steps_per_draw) * self._steps_per_draw
            num_readings += 1
        return step - first + self._steps_per_draw

    def state_dict(self) -> dict[str, Any]:
        """The readings so far, and where the mini-batches are."""
        return {
            "thermometers": [thermometer.state_dict() for thermometer in self._thermometers],
            "source": self._source.state_dict(),
            "read_step": self._read_step,
            "draws": [self._first_step, self._last_step, self._steps_per_draw],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for thermometer, readings in zip(self._thermometers, state["thermometers"], strict=True):
            thermometer.load_state_dict(readings)
        self._source.load_state_dict(state["source"])
        self._read_step = int(state["read_step"])
        self._first_step, self._last_step, self._steps_per_draw = state["draws"]


def _interval(step: int) -> int:
    """Steps between readings: more and more, as a long run has enough readings and each costs a gradient."""
    return max(READ_EVERY, step // 50)


def _standard_error(values_CS: Tensor) -> float | None:
    """Of the mean, by batch means within chains; None where there are fewer readings than blocks."""
    length = values_CS.shape[1] // NUM_BLOCKS
    if length == 0:
        return None
    blocks = values_CS[:, : length * NUM_BLOCKS].reshape(-1, length).mean(1)
    return float(blocks.std()) / math.sqrt(len(blocks))
