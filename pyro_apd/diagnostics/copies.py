# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Has the generator learnt a law, or draws by heart? A memorised draw lies too near to a draw of the chain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_apd.diagnostics.draws import ChainDraws, flat
from pyro_apd.diagnostics.split import Split

# A draw nearer to another than this share of the usual distance between neighbours counts as a copy. In eight
# dimensions, one independent draw in 6,000 is so near.
_SHARE = 1 / 3


class Copies:
    """Counts draws that copy one of the chain's, or one another.

    Networks are compared weight by weight, in units of each weight's standard deviation over the chain. The measure is
    the usual distance of a chain's draw to its nearest neighbour in the chain. Slow chains have near neighbours, so
    that a generator which follows one closely is not taken for a copy.

    :param Tensor theta_CSD: all draws of the chain, ``(C, S, D)``.
    :param indices: those whose distances are the measure, as places in ``C * S`` draws, chain after chain.
    """

    def __init__(self, theta_CSD: Tensor, indices: Sequence[int]) -> None:
        pool_TD = theta_CSD.flatten(0, 1)
        index_M = torch.as_tensor(indices, device=pool_TD.device)
        reference_MD = pool_TD[index_M]
        self._centre, scale_D = reference_MD.mean(0), reference_MD.std(0)
        self._moving = scale_D > 0
        self._scale = scale_D[self._moving]
        self._pool = self._scaled(pool_TD)
        distance_MT = torch.cdist(self._pool[index_M], self._pool)
        distance_MT[torch.arange(len(index_M), device=index_M.device), index_M] = math.inf
        self._nearest_M = distance_MT.amin(1)
        self._limit = float(self._nearest_M.median()) * _SHARE

    @property
    def is_known(self) -> bool:
        """Whether there is a distance to measure by."""
        return math.isfinite(self._limit) and self._limit > 0

    def of_chain(self) -> float:
        """Share of the chain's own draws that lie as near to another of the chain."""
        return float((self._nearest_M < self._limit).double().mean())

    def of_draws(self, theta_SD: Tensor) -> float:
        """Share of draws ``(S, D)`` that lie so near to a draw of the chain, or to each other."""
        points_SD = self._scaled(theta_SD)
        near_S = torch.cdist(points_SD, self._pool).amin(1) < self._limit
        if len(points_SD) > 1:
            near_S |= torch.cdist(points_SD, points_SD).fill_diagonal_(math.inf).amin(1) < self._limit
        return float(near_S.double().mean())

    def _scaled(self, theta: Tensor) -> Tensor:
        return ((theta - self._centre)[:, self._moving] / self._scale).float()


def find_copies(chain: ChainDraws, split: Split) -> Copies | None:
    """What counts copies of a chain's draws; None where its own draws are mostly the same."""
    pooled = {name: value.flatten(0, 1) for name, value in chain.values.items()}
    theta_CSD = flat(pooled, list(pooled)).unflatten(0, (chain.num_chains, chain.num_draws))
    copies = Copies(theta_CSD, [c * chain.num_draws + s for c in range(chain.num_chains) for s in split.steps])
    return copies if copies.is_known else None
