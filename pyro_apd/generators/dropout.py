# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""MC-dropout as a generator: one network, of which each draw drops some units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.generators.base import Generator, check_in_order, check_sizes, is_entry, peak
from pyro_apd.runtime import checks


@dataclass(frozen=True)
class DroppedInputs:
    """A matrix of weights whose inputs are dropped out, within a draw.

    Its ``rows * units * repeats`` entries begin at ``start``: the weights that unit ``i`` feeds are those at ``i`` of
    the middle dimension. ``repeats`` is 1 for a linear layer, and the size of a filter for a convolution, whose
    channels are dropped whole.
    """

    start: int
    rows: int
    units: int
    repeats: int = 1

    @classmethod
    def checked(cls, entry: Sequence[int], output_size: int) -> DroppedInputs:
        """From ``(start, rows, units, repeats)``.

        :raises ValueError: if these are not integers that fit into a draw of ``output_size`` numbers.
        """
        if not is_entry(entry, smallest=(0, 1, 1, 1)):
            raise ValueError(f"A layer with dropped inputs must be (start, rows, units, repeats); got {entry!r:.80}.")
        layer = cls(*entry)
        if layer.span.stop > output_size:
            raise ValueError(f"Layer {entry!r} reaches beyond the {output_size} numbers of a draw.")
        return layer

    @property
    def entry(self) -> tuple[int, int, int, int]:
        """As in the settings of a generator."""
        return (self.start, self.rows, self.units, self.repeats)

    @property
    def span(self) -> slice:
        """Its entries within a draw."""
        return slice(self.start, self.start + self.rows * self.units * self.repeats)


class DropoutGenerator(Generator):
    """The weights of one network, with inputs of some layers dropped out (Gal & Ghahramani, ICML 2016).

    Dropping an input of a layer, and dividing those kept by 1 - p, is the same as doing so to the weights that the
    input meets: each draw is an ordinary network. One latent number per unit decides whether the unit is kept. Cost:
    one network.

    :param int output_size: D, numbers of a draw.
    :param layers: ``(start, rows, units, repeats)`` of each layer whose inputs are dropped, see :class:`DroppedInputs`.
    :param float rate: p, the probability that an input is dropped, in (0, 1).
    """

    def __init__(self, output_size: int, layers: Sequence[Sequence[int]], rate: float = 0.5) -> None:
        super().__init__()
        check_sizes(output_size=output_size)
        rate = checks.number("Generator setting rate", rate, above=0, below=1)
        self.layers = [DroppedInputs.checked(entry, output_size) for entry in layers]
        if not self.layers:
            raise ValueError("Generator setting layers=[] must name at least one layer.")
        # In order and without overlap, so that a file cannot ask for more latent numbers than it has weights.
        check_in_order([(layer.span, layer.entry) for layer in self.layers], "Layers")
        self.output_size = output_size
        self.rate = rate
        self.latent_size = sum(layer.units for layer in self.layers)
        self.weights = nn.Parameter(torch.zeros(output_size))

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {
            "kind": "dropout",
            "output_size": self.output_size,
            "layers": [list(layer.entry) for layer in self.layers],
            "rate": self.rate,
        }

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        threshold = _normal_quantile(self.rate)
        factor_SL = (latent_SL >= threshold).to(latent_SL) / (1 - self.rate)
        theta_SD = self.weights.repeat(len(latent_SL), 1)
        parts = factor_SL.split([layer.units for layer in self.layers], dim=-1)
        for layer, factor_SU in zip(self.layers, parts, strict=True):
            block = theta_SD[:, layer.span].unflatten(-1, (layer.rows, layer.units, layer.repeats))
            theta_SD[:, layer.span] = (block * factor_SU[:, None, :, None]).flatten(1)
        return theta_SD

    def bound(self) -> float:
        """See :class:`Generator`."""
        return peak(self.weights) / (1 - self.rate)


def _normal_quantile(probability: float) -> float:
    value = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
    return value if math.isfinite(value) else math.copysign(40.0, value)
