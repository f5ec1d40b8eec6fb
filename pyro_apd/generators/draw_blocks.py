# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws read in blocks of rows (draws) or columns (weights), since all together may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pyro_apd.generators.base import Generator, stratified

# Bytes of a block: a thirty-second of the draws, within these bounds. Large blocks read files faster, and
# a fit holds several copies of one.
_MIN_BYTES, _MAX_BYTES = 8 * 2**20, 32 * 2**20
# Bytes of draws that are evaluated by the network together; a training step needs several times as much memory.
_DRAWS_BYTES = 8 * 2**20


class DrawBlocks:
    """Some draws of each chain, in order of chains, of which only the present block is copied.

    Indexing with a tensor of row numbers gives these rows.

    :param Tensor theta_CSD: draws by chain, in memory or mapped from a file.
    :param Tensor index_T: which draws per chain; by default all.
    :ivar tuple shape: chains, draws per chain, numbers per draw: ``(C, T, D)``.
    """

    def __init__(self, theta_CSD: Tensor, index_T: Tensor | None = None) -> None:
        if index_T is None:
            index_T = torch.arange(theta_CSD.shape[1])
        self._theta_CSD = theta_CSD
        self._index_T = index_T.to(theta_CSD.device)
        self.shape = (theta_CSD.shape[0], len(index_T), theta_CSD.shape[2])
        self.dtype = theta_CSD.dtype
        self.device = theta_CSD.device
        self._shift_D: Tensor | None = None
        self._divisor_D: Tensor | None = None

    def standardised(self, shift_D: Tensor, divisor_D: Tensor) -> DrawBlocks:
        """The same draws less ``shift`` and divided by ``divisor``, as they are read."""
        blocks = DrawBlocks(self._theta_CSD, self._index_T)
        blocks._shift_D = shift_D
        blocks._divisor_D = divisor_D
        return blocks

    def thinned(self, count: int) -> DrawBlocks:
        """At most ``count`` draws of each chain, evenly spaced."""
        num_draws = self.shape[1]
        if num_draws <= count:
            return self
        place_T = torch.linspace(0, num_draws - 1, count, dtype=torch.float64).round().long()
        return DrawBlocks(self._theta_CSD, self._index_T[place_T.to(self.device)])

    def pooled(self) -> DrawBlocks:
        """The same draws as those of one chain."""
        num_chains, _, size = self._theta_CSD.shape
        chain_C1 = torch.arange(num_chains, device=self.device).unsqueeze(1) * self._theta_CSD.shape[1]
        return DrawBlocks(self._theta_CSD.reshape(1, -1, size), (chain_C1 + self._index_T).flatten())

    def __len__(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, row_N: Tensor) -> Tensor:
        return self.part(row_N, slice(None))

    def part(self, row_N: Tensor, span: slice) -> Tensor:
        """Some columns ``(N, W)`` of some rows; nothing else is read."""
        chain_N = row_N.div(self.shape[1], rounding_mode="floor")
        return self._standardise(self._theta_CSD[:, :, span][chain_N, self._index_T[row_N % self.shape[1]]], span)

    def rows(self, step: int = 1) -> Iterator[Tensor]:
        """Every row, or one in ``step``, in order, in blocks ``(N, D)``."""
        row_S = torch.arange(0, len(self), step, device=self.device)
        for row_N in row_S.split(items_per_block(self.shape[2] * self.dtype.itemsize, self._num_bytes)):
            yield self[row_N]

    def spaced(self, count: int) -> Iterator[Tensor]:
        """``count`` rows, evenly spaced, in blocks that the network evaluates."""
        row_S = torch.linspace(0, len(self) - 1, count, dtype=torch.float64).round().long().to(self.device)
        for row_N in row_S.split(draws_per_block(self.shape[2] * self.dtype.itemsize)):
            yield self[row_N]

    @property
    def width(self) -> int:
        """Columns per block, of all rows."""
        return min(self.shape[2], items_per_block(len(self) * self.dtype.itemsize, self._num_bytes))

    def columns(self, spans: Sequence[slice] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Columns in order, in blocks ``(S, W)``, each with its span.

        A block may be changed in place. It is valid until the next one, since all share the same memory.

        :param spans: the columns of each block; by default all columns, :attr:`width` at a time.
        """
        num_chains, num_draws, size = self.shape
        if spans is None:
            spans = [slice(start, min(start + self.width, size)) for start in range(0, size, max(1, self.width))]
        widest = max((span.stop - span.start for span in spans), default=0)
        buffer = torch.empty(len(self) * widest, dtype=self.dtype, device=self.device)
        for span in spans:
            part_CTW = buffer[: len(self) * (span.stop - span.start)].view(num_chains, num_draws, -1)
            torch.index_select(self._theta_CSD[:, :, span], 1, self._index_T, out=part_CTW)
            yield span, self._standardise(part_CTW.flatten(0, 1), span)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each column, ``(D,)``, the latter without correction."""
        mean_D = torch.empty(self.shape[2], dtype=self.dtype, device=self.device)
        scale_D = torch.empty_like(mean_D)
        for span, part_SW in self.columns():
            mean_D[span], scale_D[span] = part_SW.mean(0), part_SW.std(0, correction=0)
        return mean_D, scale_D

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of all rows, ``(S, ...)``, evaluated in blocks ``(N, D)``."""
        return torch.cat([function(rows_ND) for rows_ND in self.rows()])

    def _standardise(self, values: Tensor, span: slice) -> Tensor:
        """In place, since ``values`` are a copy."""
        if self._shift_D is None or self._divisor_D is None:
            return values
        return values.sub_(self._shift_D[span]).div_(self._divisor_D[span])

    @property
    def _num_bytes(self) -> int:
        return len(self) * self.shape[2] * self.dtype.itemsize


def items_per_block(item_bytes: int, num_bytes: int = 0) -> int:
    """How many items, such as rows, of ``item_bytes`` each make a block, of ``num_bytes`` in all."""
    return max(1, min(max(_MIN_BYTES, num_bytes // 32), _MAX_BYTES) // max(1, item_bytes))


def draws_per_block(draw_bytes: int) -> int:
    """How many draws of ``draw_bytes`` each make a block that the network evaluates."""
    return max(1, _DRAWS_BYTES // max(1, draw_bytes))


@torch.no_grad()
def blocks_of_draws(generator: Generator, count: int, paired_with: int | None = None) -> Iterator[Tensor]:
    """Draws in blocks, evenly spread over modes all together, with torch's global random numbers.

    :param int paired_with: number of the chain's draws, each of which is a mode: draws are then of the modes of
        ``count`` draws that are evenly spaced, so that it matters less which these are.
    """
    like = next(generator.parameters())
    if paired_with is None:
        place_S1 = stratified(torch.empty(count, 1, dtype=like.dtype, device=like.device))
    else:
        row_S = torch.linspace(0, paired_with - 1, count, dtype=torch.float64).round()  # as DrawBlocks.spaced
        place_S1 = torch.special.ndtri((row_S + 0.5) / paired_with).to(like).unsqueeze(1)
    for place_N1 in place_S1.split(draws_per_block(generator.latent_size * like.element_size())):
        latent_NL = place_N1.new_empty(len(place_N1), generator.latent_size)
        latent_NL[:, :1] = place_N1
        for latent_L in latent_NL:
            # One at a time: random numbers of a tensor depend on its shape, and blocks must not change the result.
            latent_L[1:] = torch.randn(generator.latent_size - 1, dtype=like.dtype, device=like.device)
        yield generator(latent_NL)
