# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Does a chain have the temperature that it claims? Two thermometers, Wenzel et al. (ICML 2020), appendix I.

At the target exp(-U/T), whatever the model, (theta - c) . dU/dtheta has the expectation n T over n weights, for any
constant c (equipartition, or the virial theorem): divided by n, that is the *configurational* temperature. c is the
prior's mean here. Where the posterior's mean is many of its sds away from it, readings are noisy, as their standard
error says; an average of the chain's own would be less so, and wrong while the chain remembers it.

Steps that are too large and mini-batches heat the chain, and both show here; so does a chain that has not arrived.
Samplers with momenta also have a *kinetic* temperature, that of the momenta alone. Either can be read for each site, so
for each layer.

Gradients for a reading are taken on mini-batches of their own. Those of the chain's next step would not do: within an
epoch they are what was left over by the batches that brought theta where it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Langevin steps from one reading to the next, at least: a reading costs a gradient.
READ_EVERY = 100
#: Blocks of consecutive readings, whose means tell the standard error in spite of autocorrelation.
NUM_BLOCKS = 20


@dataclass(frozen=True)
class Temperature:
    """One reading.

    :ivar str kind: ``"configurational"`` or ``"kinetic"``.
    :ivar str site: a site's name, or ``"all"``.
    :ivar float mean: the temperature.
    :ivar float standard_error: of the mean, by the means of blocks of readings; nan with fewer than 20.
    :ivar float target: the kernel's temperature.
    """

    kind: str
    site: str
    mean: float
    standard_error: float
    target: float

    def __str__(self) -> str:
        return f"{self.kind} {self.site}: {self.mean:.3g} +- {self.standard_error:.2g} (target {self.target:g})"


class Thermometer:
    """Collects, reading by reading and by site, twice the energy in thermal motion.

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

    def readings(self, names: Sequence[str], target: float) -> list[Temperature]:
        """Of all weights, then of each site; over all chains."""
        if not self._readings:
            return []
        sums = torch.stack(self._readings, -2).double().cpu()
        sums = sums.reshape(-1, *sums.shape[-2:])  # (C, S, sites)
        series = [("all", sums.sum(-1) / sum(self._sizes))]
        series += [(name, sums[..., i] / self._sizes[i]) for i, name in enumerate(names)]
        return [Temperature(self.kind, name, float(s.mean()), _standard_error(s), target) for name, s in series]


def _standard_error(values_CS: Tensor) -> float:
    """Of the mean, by batch means within chains."""
    length = values_CS.shape[1] // NUM_BLOCKS
    if length == 0:
        return float("nan")
    blocks = values_CS[:, : length * NUM_BLOCKS].reshape(-1, length).mean(1)
    return float(blocks.std()) / math.sqrt(len(blocks))
