# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that the generator has memorised: these are too near to a draw of the chain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pyro_apd.diagnostics.draws import flat
from pyro_apd.predictive.chain_draws import ChainDraws

# A draw nearer to another than this share of the usual distance between neighbours counts as a copy. In eight
# dimensions, one independent draw in 6,000 is so near.
_SHARE = 1 / 3
_BLOCK_BYTES = 64 * 2**20


def new_draw_shares(chain: ChainDraws, steps: Sequence[int], sets: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of draws that copy neither a draw of the chain nor one another, by set, and as ``chain`` the chain's own.

    Networks are compared weight by weight, in units of each weight's standard deviation over the chain. The measure is
    the usual distance of a chain's draw to its nearest neighbour in the chain. Slow chains have near neighbours, so
    that a generator which follows one closely is not taken for a copy. All draws of the chain are read once, a block at
    a time.

    :param ChainDraws chain: the chain.
    :param steps: which of its draws, of each chain, give the measure.
    :param sets: draws ``(S, D)`` by name, sites side by side in the chain's order.
    :returns: empty where the chain's neighbours are mostly equal, so that there is nothing to measure by.
    """
    names = list(chain.values)
    reference_MD = flat(chain.pooled(steps), names)
    centre_D, scale_D = reference_MD.mean(0), reference_MD.std(0)
    moving_D = scale_D > 0
    if len(reference_MD) < 2 or not bool(moving_D.any()):
        return {}

    def scaled(theta_SD: Tensor) -> Tensor:
        return ((theta_SD - centre_D)[:, moving_D] / scale_D[moving_D]).float()

    points = [scaled(reference_MD), *(scaled(theta_SD) for theta_SD in sets.values())]
    sizes = [len(part) for part in points]
    points_PD = torch.cat(points)
    own = torch.as_tensor(
        [c * chain.num_draws + s for c in range(chain.num_chains) for s in steps], device=chain.device
    )
    nearest_P = points_PD.new_full((len(points_PD),), math.inf)
    for start, block_BD in _blocks(chain, names):
        distance_PB = torch.cdist(points_PD, scaled(block_BD))
        place_M = own - start
        inside = ((place_M >= 0) & (place_M < len(block_BD))).nonzero().squeeze(1)
        distance_PB[inside, place_M[inside]] = math.inf  # a draw is not its own neighbour
        nearest_P = torch.minimum(nearest_P, distance_PB.amin(1))
    nearest = nearest_P.split(sizes)
    limit = float(nearest[0].median()) * _SHARE
    if not 0 < limit < math.inf:
        return {}
    shares = {"chain": float((nearest[0] >= limit).double().mean())}
    for name, points_SD, nearest_S in zip(sets, points[1:], nearest[1:], strict=True):
        is_new = nearest_S >= limit
        if len(points_SD) > 1:
            is_new &= torch.cdist(points_SD, points_SD).fill_diagonal_(math.inf).amin(1) >= limit
        shares[name] = float(is_new.double().mean())
    return shares


def _blocks(chain: ChainDraws, names: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
    """All draws, ``(B, D)`` at a time, each block with the place of its first draw."""
    width = max(1, _BLOCK_BYTES // max(1, chain.bytes_per_draw))
    for c in range(chain.num_chains):
        for start in range(0, chain.num_draws, width):
            block = {name: chain.values[name][c, start : start + width] for name in names}
            yield c * chain.num_draws + start, flat(block, names)
