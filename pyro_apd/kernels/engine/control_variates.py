# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients whose mini-batch noise vanishes near a mode: Baker, Fearnhead, Fox & Nemeth (Stat. Comput. 2019).

    grad U(theta)  is estimated by  grad U(m) + (N/B) sum over the batch of (grad l_i(theta) - grad l_i(m))

with l_i the negative log-likelihood of a datum, the prior exact in each term, and m a point near the mode, where the
gradient over all data is taken once. The noise of what is left is proportional to the distance from m, so that the
heat which mini-batches bring almost disappears. A step costs two gradients. Far from m, or in a posterior with many
modes, the estimate is noisier than the plain one: this is for posteriors with one mode that the data concentrate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.minibatch import MinibatchSource
from pyro_apd.models.potential import GradientFunction, Inputs, Pieces, Potential


class ControlVariates:
    """Stands in for a potential where gradients are asked for.

    :param Potential potential: the potential.
    :param centre: m, by site, ``(n,)`` or ``(C, n)``.
    :param gradient: of U over all data at m, by site.
    :param Tensor energy: U over all data at m, ``()`` or ``(C,)``.
    """

    def __init__(self, potential: Potential, centre: Pieces, gradient: Pieces, energy: Tensor) -> None:
        self._potential = potential
        self.source: MinibatchSource = potential.source
        self.path = potential.path
        self.centre, self.gradient, self.energy = tuple(centre), tuple(gradient), energy

    @property
    def num_data(self) -> int | None:
        """N."""
        return self._potential.num_data

    @classmethod
    def about(cls, potential: Potential, theta: Pieces) -> ControlVariates:
        """With m at ``theta``, from one pass over the data.

        :raises ValueError: if there are no mini-batches, or they cannot be made to cover the data once.
        """
        centre = tuple(piece.clone() for piece in theta)
        return cls(potential, centre, *_full_gradient(potential, centre))

    def gradient_function(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        """As :meth:`~pyro_apd.models.potential.Potential.gradient_function`, with control variates."""
        plain = self._potential.gradient_function(pieces, inputs)
        self.path = self._potential.path

        def gradients(pieces: Pieces, inputs: Inputs) -> tuple[Pieces, Tensor]:
            here, energy = plain(pieces, inputs)
            there, energy_there = plain(self.centre, inputs)
            corrected = tuple(h - t + full for h, t, full in zip(here, there, self.gradient, strict=True))
            return corrected, energy - energy_there + self.energy

        return gradients

    def state_dict(self) -> dict[str, Any]:
        """What :class:`ControlVariates` takes beside the potential."""
        return {"centre": list(self.centre), "gradient": list(self.gradient), "energy": self.energy}


def _full_gradient(potential: Potential, pieces: Pieces) -> tuple[Pieces, Tensor]:
    """Gradient of U and U over all data, from batches that cover them once."""
    gradient = tuple(torch.zeros_like(piece) for piece in pieces)
    energy = pieces[0].new_zeros(pieces[0].shape[:-1])
    chains = pieces[0].shape[:-1]
    for inputs, weight in potential.source.cover():
        stacked = tuple(t.expand(*chains, *t.shape).contiguous() for t in inputs)
        part, part_energy = potential.gradients(pieces, stacked)
        for total, value in zip(gradient, part, strict=True):
            total.add_(value, alpha=weight)
        energy += weight * part_energy
    return gradient, energy
