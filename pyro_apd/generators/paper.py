# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The generator as published: a perceptron from the latent straight to raw weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from pyro_apd.generators.base import LARGEST_LATENT, Generator, check_sizes, linear_bound


class PaperGenerator(Generator):
    """Three hidden layers of ReLU units and a linear output (Wang et al., ICML 2018).

    Cost: about ``width + 1`` networks, most of it in the last layer.

    :param int output_size: D, numbers of a draw.
    :param int latent_size: 32 in the paper.
    :param int width: 100 in the paper.
    """

    def __init__(self, output_size: int, latent_size: int = 32, width: int = 100) -> None:
        super().__init__()
        check_sizes(output_size=output_size, latent_size=latent_size, width=width)
        self.output_size = output_size
        self.latent_size = latent_size
        self.width = width
        self.layers = he_perceptron([latent_size, width, width, width, output_size])

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {
            "kind": "paper",
            "output_size": self.output_size,
            "latent_size": self.latent_size,
            "width": self.width,
        }

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        theta_SD: Tensor = self.layers(latent_SL)
        return theta_SD

    def bound(self) -> float:
        """See :class:`Generator`."""
        largest = LARGEST_LATENT
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                largest = linear_bound(layer, largest)
        return largest


def he_perceptron(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them, initialised uniformly after He et al. 2015, biases zero."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
