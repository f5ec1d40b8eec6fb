# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients whose mini-batch noise vanishes near a mode: Baker, Fearnhead, Fox & Nemeth (Stat. Comput. 2019).

    grad U(theta)  is estimated by  grad U(m) + (N/B) sum over the batch of (grad l_i(theta) - grad l_i(m))

with l_i the negative log-likelihood of a datum, the prior exact in each term, and m a point near the mode, where the
gradient over all data is computed once. The noise of the estimate is proportional to the distance from m, so the excess
variance due to mini-batches almost disappears. A step costs two gradients. Far from m, or in a posterior with many
modes, the estimate is noisier than the plain one: this is for concentrated posteriors with one mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_apd.kernels.engine.gradients import PlainGradient
from pyro_apd.models.potential import GradientFunction, Inputs, Pieces, Potential


class ControlVariates(PlainGradient):
    """A :class:`~pyro_apd.kernels.engine.gradients.GradientEstimator` with control variates about one state.

    Steps use them. Measurements, by :meth:`gradient`, use the plain estimate.

    :param Potential potential: the potential.
    :ivar centre: m, by site, ``(n,)`` or ``(C, n)``, once :meth:`prepare` was called; None before.
    :ivar full_gradient: gradient of U over all data at m, by site.
    :ivar energy: U over all data at m, ``()`` or ``(C,)``.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__(potential)
        self.centre: Pieces | None = None
        self.full_gradient: Pieces = ()
        self.energy: Tensor = torch.empty(0)

    def prepare(self, pieces: Pieces) -> None:
        """Sets m to the present state, if it has none yet, at the cost of one pass over the data.

        :raises ValueError: if there are no mini-batches, or they cannot be made to cover the data once.
        """
        if self.centre is None:
            centre = tuple(piece.clone() for piece in pieces)
            self.full_gradient, self.energy = _full_gradient(self._potential, centre)
            self.centre = centre

    def gradient_function(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        """As :meth:`~pyro_apd.models.potential.Potential.gradient_function`, with control variates."""
        plain = self._potential.gradient_function(pieces, inputs)
        centre, full_gradient, full_energy = self.centre, self.full_gradient, self.energy
        if centre is None:
            raise RuntimeError("ControlVariates.prepare(pieces) must be called before gradients are computed.")

        def gradients(pieces: Pieces, inputs: Inputs) -> tuple[Pieces, Tensor]:
            here, energy = plain(pieces, inputs)
            there, energy_there = plain(centre, inputs)
            corrected = tuple(h - t + full for h, t, full in zip(here, there, full_gradient, strict=True))
            return corrected, energy - energy_there + full_energy

        return gradients

    def state_dict(self) -> dict[str, Any] | None:
        """m, and gradient and U of all data there; None before :meth:`prepare`."""
        if self.centre is None:
            return None
        return {"centre": list(self.centre), "gradient": list(self.full_gradient), "energy": self.energy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.centre = tuple(state["centre"])
        self.full_gradient = tuple(state["gradient"])
        self.energy = state["energy"]


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
