# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Noise for what principal coordinates leave out, structured by rows and columns of matrices of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_apd.generators.base import LARGEST_LATENT, check_in_order, is_entry, peak


@dataclass(frozen=True)
class Block:
    """A matrix of weights within a draw: entries ``start`` to ``start + rows * columns``, row by row.

    :ivar int rank: directions in the space of its columns along which there is less noise.
    """

    start: int
    rows: int
    columns: int
    rank: int

    @classmethod
    def checked(cls, entry: Sequence[int], output_size: int) -> Block:
        """From ``(start, rows, columns, rank)``.

        :raises ValueError: if these are not integers that fit into a draw of ``output_size`` numbers.
        """
        if not is_entry(entry, smallest=(0, 1, 1, 1)) or entry[3] > entry[2]:
            raise ValueError(
                f"A block of noise must be (start, rows, columns, rank), rank <= columns; got {entry!r:.80}."
            )
        block = cls(*entry)
        if block.span.stop > output_size:
            raise ValueError(f"Block {entry!r} of noise reaches beyond the {output_size} numbers of a draw.")
        return block

    @classmethod
    def all_checked(cls, entries: Sequence[Sequence[int]], output_size: int) -> list[Block]:
        """All blocks of a generator.

        :raises ValueError: as :meth:`checked`, or if they are not in order, or overlap: a file could then ask for more
            latent numbers than it has weights.
        """
        blocks = [cls.checked(entry, output_size) for entry in entries]
        check_in_order([(block.span, block.entry) for block in blocks], "Blocks")
        return blocks

    @property
    def entry(self) -> tuple[int, int, int, int]:
        """As in the settings of a generator."""
        return (self.start, self.rows, self.columns, self.rank)

    @property
    def span(self) -> slice:
        """Its entries within a draw."""
        return slice(self.start, self.start + self.rows * self.columns)

    @property
    def latent_size(self) -> int:
        """Standard normal numbers per draw."""
        return self.rows * self.columns


class MatrixNoise(nn.Module):
    """Gaussian noise on a matrix of weights, ``rows * (E - damping * (E @ Q.T) @ Q) * columns``; E is standard normal.

    Each weight varies independently, with a scale of its row (unit) times a scale of its column (input), except along a
    few directions Q in the space of columns, which all units share and in which the noise is damped: those in which the
    layer's inputs determine the weights. Without damping, noise of the right size in every weight would dominate the
    function near the data. Noise in the other directions changes the function little there, and gives it its spread far
    from the data. This is a matrix-variate normal distribution (Dawid 1981) whose covariance among columns is diagonal
    less a matrix of low rank. Cost: ``rank`` rows of the matrix.

    :param Block block: the matrix.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.row_scale = nn.Parameter(torch.ones(block.rows))
        self.column_scale = nn.Parameter(torch.zeros(block.columns))
        self.directions = nn.Parameter(torch.zeros(block.rank, block.columns))
        self.damping = nn.Parameter(torch.zeros(block.rank))
        self._unit: Tensor | None = None

    def forward(self, latent_SL: Tensor) -> Tensor:
        """Noise ``(S, rows * columns)`` from latents of the same shape."""
        latent_SOI = latent_SL.unflatten(-1, (self.block.rows, self.block.columns))
        along_SOK = latent_SOI @ self.directions.mT
        columns_I = self.column_scale if self._unit is None else self.column_scale * self._unit
        noise_SOI = (latent_SOI - (along_SOK * self.damping) @ self.directions) * columns_I
        noise_SB: Tensor = (noise_SOI * self.row_scale.unsqueeze(-1)).flatten(-2)
        return noise_SB

    def bound(self) -> float:
        """See :meth:`~pyro_apd.generators.base.Generator.bound`."""
        along = self.block.columns * peak(self.directions)
        column = peak(self.column_scale) * (1.0 if self._unit is None else float(self._unit))
        within = 1 + self.block.rank * along * peak(self.damping) * peak(self.directions)
        return LARGEST_LATENT * within * column * peak(self.row_scale)

    @torch.no_grad()
    def fit(self, residuals: Callable[[], Iterable[Tensor]]) -> None:
        """Sets scales and directions from residuals of draws, which are read twice.

        The scale of columns is relative to its root mean square until :meth:`fold`, so that one learning rate suits
        all parameters.

        :param residuals: returns an iterator over blocks ``(N, rows * columns)`` of them.
        """
        square_OI = torch.zeros_like(self.row_scale.unsqueeze(-1) * self.column_scale)
        count = 0
        for part_NB in residuals():
            square_OI += part_NB.square().sum(0).view_as(square_OI)
            count += len(part_NB)
        square_OI /= max(count, 1)
        tiny = torch.finfo(square_OI.dtype).tiny
        row_O = (square_OI.mean(1) / square_OI.mean().clamp_min(tiny)).sqrt()
        column_I = square_OI.mean(0).sqrt()
        divisor_OI = row_O.unsqueeze(-1) * column_I
        divisor_OI = divisor_OI.where(divisor_OI > 0, torch.ones_like(divisor_OI))
        covariance_II = square_OI.new_zeros(len(column_I), len(column_I))
        for part_NB in residuals():
            white_NI = (part_NB.unflatten(-1, divisor_OI.shape) / divisor_OI).flatten(0, 1)
            covariance_II.addmm_(white_NI.mT, white_NI)
        variance_I, vectors_II = torch.linalg.eigh(covariance_II / (max(count, 1) * len(row_O)))
        # Columns without variance are left out: they are constant, rather than determined by the inputs.
        rank = self.block.rank
        varying = variance_I > 1e-6 * variance_I[-1]
        first = min(int((~varying).sum()), len(variance_I) - 1)
        chosen = slice(first, min(first + rank, len(variance_I) - 1))
        typical = variance_I[chosen.stop :].mean()
        count = chosen.stop - chosen.start
        self.directions.zero_()[:count] = vectors_II[:, chosen].mT
        self.damping.zero_()[:count] = 1 - (variance_I[chosen] / typical.clamp_min(tiny)).sqrt()
        column_I = column_I * typical.sqrt()
        unit = column_I.square().mean().sqrt().clamp_min(tiny)
        self._unit = unit
        self.column_scale.copy_(column_I / unit)
        self.row_scale.copy_(row_O)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies the unit that :meth:`fit` keeps apart into the scale of columns."""
        if self._unit is not None:
            self.column_scale.mul_(self._unit)
            self._unit = None
