# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What principal coordinates leave out, drawn as noise of a structure that matrices of weights have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A matrix of weights within a draw: entries ``start`` to ``start + rows * columns``, row by row.

    :ivar int rank: directions of noise among its columns.
    """

    start: int
    rows: int
    columns: int
    rank: int

    @classmethod
    def checked(cls, entry: Sequence[int], output_size: int) -> Block:
        """From ``(start, rows, columns, rank)``.

        :raises ValueError: if these are not whole numbers that fit into a draw of ``output_size`` numbers.
        """
        is_whole = len(entry) == 4 and all(isinstance(n, int) and not isinstance(n, bool) for n in entry)
        if not is_whole or entry[0] < 0 or min(entry[1:]) < 1 or entry[3] > entry[2]:
            raise ValueError(f"A block of noise must be (start, rows, columns, rank), rank <= columns; got {entry!r}.")
        block = cls(*entry)
        if block.span.stop > output_size:
            raise ValueError(f"Block {entry!r} of noise reaches beyond the {output_size} numbers of a draw.")
        return block

    @property
    def entry(self) -> tuple[int, int, int, int]:
        """As a file has it."""
        return (self.start, self.rows, self.columns, self.rank)

    @property
    def span(self) -> slice:
        """Where the entries are."""
        return slice(self.start, self.start + self.rows * self.columns)

    @property
    def latent_size(self) -> int:
        """Standard normal numbers that a draw takes."""
        return self.rows * self.rank


class MatrixNoise(nn.Module):
    """Gaussian noise ``scale * (Z @ directions)`` on a matrix of weights, with fresh standard normal Z.

    A unit's incoming weights move along a few directions that all units of the layer share, each unit by itself: a
    matrix-variate normal distribution (Dawid 1981) of full rank among units and of low rank among inputs. The
    directions are those in which the layer's inputs pin the weights least, and so cost the function least; they restore
    the spread far from the data. Cost: ``rank`` rows of the matrix.

    :param Block block: the matrix.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.directions = nn.Parameter(torch.zeros(block.rank, block.columns))
        self.scale = nn.Parameter(torch.ones(block.rows))
        self._unit: Tensor | None = None

    def forward(self, latent_SL: Tensor) -> Tensor:
        """Noise ``(S, rows * columns)`` from latents ``(S, rows * rank)``."""
        latent_SOK = latent_SL.unflatten(-1, (self.block.rows, self.block.rank))
        directions = self.directions if self._unit is None else self.directions * self._unit
        noise_SI: Tensor = ((latent_SOK * self.scale.unsqueeze(-1)) @ directions).flatten(-2)
        return noise_SI

    @torch.no_grad()
    def fit(self, residual_SN: Tensor) -> None:
        """Sets directions and scale by residuals of draws, ``(S, rows * columns)``.

        Directions are in units of their own size until :meth:`fold`, so that one learning rate fits all parameters.
        """
        residual_SOI = residual_SN.unflatten(-1, (self.block.rows, self.block.columns))
        variance_O = residual_SOI.square().mean((0, 2))
        scale_O = (variance_O / variance_O.mean().clamp_min(torch.finfo(variance_O.dtype).tiny)).sqrt()
        rows_NI = (residual_SOI / scale_O.clamp_min(1e-6).unsqueeze(-1)).flatten(0, 1)
        # By random projections (Halko, Martinsson & Tropp 2011): the covariance of a wide layer is no small thing.
        rank = self.block.rank
        _, size_K, vectors_IK = torch.svd_lowrank(rows_NI, q=min(rank + 8, *rows_NI.shape), niter=4)
        top = torch.zeros_like(self.directions)
        top[: len(size_K)] = (size_K / len(rows_NI) ** 0.5 * vectors_IK).mT[:rank]
        unit = top.square().mean().sqrt().clamp_min(torch.finfo(variance_O.dtype).tiny)
        self._unit = unit
        self.directions.copy_(top / unit)
        self.scale.copy_(scale_O)

    @torch.no_grad()
    def fold(self) -> None:
        """Puts the unit into the directions, for good."""
        if self._unit is not None:
            self.directions.mul_(self._unit)
            self._unit = None
