# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Data parallelism: each process has some of the rows, and all run the same chains with gradients that are summed.

Each process has a potential of its own rows, in which the prior is counted once. With R processes

    U(theta) = sum over r of U_r(theta) - (R - 1) (-log p(theta) - log |d constrained / d theta|)

is exactly that of all rows, and so is its gradient. On mini-batches of b_r of the N_r rows of each process it is an
unbiased estimate, stratified by process, whose variance is no larger than that of a batch of all of them drawn at once
where shards are of equal size. (Chains that see one shard each with N in place of N_r would sample posteriors of other
data; nothing here does that.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_apd.models.potential import GradientFunction, Inputs, Pieces, Potential
from pyro_apd.runtime.ranks import Ranks


class DataParallelGradient:
    """A :class:`~pyro_apd.kernels.engine.gradients.GradientEstimator` for the rows of all processes.

    All processes call it at the same states, in the same order.

    :param Potential part: of this process's rows.
    :param Ranks ranks: the processes.
    """

    def __init__(self, part: Potential, ranks: Ranks) -> None:
        self._part, self._ranks = part, ranks
        self._prior = part.prior_alone()
        self._num_data = sum(ranks.gathered(part.num_data or 0)) or None

    @property
    def path(self) -> str:
        """``"captured"`` or ``"traced"``, of this process's rows."""
        return self._part.path

    @property
    def num_data(self) -> int | None:
        """Rows of all processes."""
        return self._num_data

    def gradient_function(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        """As that of one process, summed over the processes; it waits for all.

        :raises RankError: if a process is gone.
        """
        part = self._part.gradient_function(pieces, inputs)
        prior = self._prior.gradient_function(pieces, ())
        sizes = [piece.shape[-1] for piece in pieces]

        def added(pieces: Pieces, inputs: Inputs) -> tuple[Pieces, Tensor]:
            gradients, energy = part(pieces, inputs)
            total = torch.cat([*gradients, energy.unsqueeze(-1)], -1)
            self._ranks.all_reduce_sum(total)
            if self._ranks.size > 1:
                of_prior, energy_of_prior = prior(pieces, ())
                surplus = torch.cat([*of_prior, energy_of_prior.unsqueeze(-1)], -1)
                total.sub_(surplus, alpha=self._ranks.size - 1)
            *split, energy = total.split([*sizes, 1], -1)
            return tuple(gradient.contiguous() for gradient in split), energy.squeeze(-1)

        return added

    def gradient(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The same at a joined state."""
        pieces = tuple(piece.contiguous() for piece in self._part.pieces(theta))
        gradients, energy = self.gradient_function(pieces, inputs)(pieces, inputs)
        return torch.cat(gradients, -1) if gradients else torch.zeros_like(theta), energy

    def prepare(self, pieces: Pieces) -> None:
        """Nothing to do."""

    def state_dict(self) -> None:
        """There is no state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
