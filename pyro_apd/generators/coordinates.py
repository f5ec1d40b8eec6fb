# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Principal coordinates of draws: the few directions of weight space along which a chain varied most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_apd.generators.draw_blocks import DrawBlocks


@dataclass(frozen=True)
class PrincipalCoordinates:
    """A basis of weight space in which draws have mean zero and unit covariance.

    :ivar Tensor location_D: mean of the draws.
    :ivar Tensor coordinates_SR: the draws in that basis.
    :ivar DrawBlocks draws: the draws, read again whenever the basis is made.
    :ivar Tensor left_SR: eigenvectors of their Gram matrix.
    """

    location_D: Tensor
    coordinates_SR: Tensor
    draws: DrawBlocks
    left_SR: Tensor

    @cached_property
    def basis_RD(self) -> Tensor:
        """Directions, each as long as the draws' standard deviation along it."""
        basis_RD = self.location_D.new_empty(self.left_SR.shape[1], len(self.location_D))
        for span, part_RW in self.basis_parts():
            basis_RD[:, span] = part_RW
        return basis_RD

    def basis_parts(self, spans: Sequence[slice] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The same in blocks ``(R, W)``, for a basis that is not held in memory as a whole.

        :param spans: the columns of each block, as in :meth:`DrawBlocks.columns`.
        """
        left_RS = self.left_SR.to(self.location_D).mT
        for span, part_SW in self.draws.columns(spans):
            yield span, left_RS @ part_SW.sub_(self.location_D[span]) / len(self.draws) ** 0.5


def principal_coordinates(theta_SD: Tensor | DrawBlocks, rank: int) -> PrincipalCoordinates:
    """The ``rank`` directions of largest variance, from the ``S x S`` Gram matrix: nothing is ever ``D x D``.

    Directions without variance are left out, so that there may be fewer than ``rank``. The draws are read in blocks of
    columns, and once more for the basis.

    :param theta_SD: draws, as a tensor or in blocks.
    :param int rank: largest number of directions.
    :raises ValueError: if all draws are the same.
    """
    draws = theta_SD if isinstance(theta_SD, DrawBlocks) else DrawBlocks(theta_SD.unsqueeze(0))
    num_draws, size = len(draws), draws.shape[2]
    location_D = torch.empty(size, dtype=draws.dtype, device=draws.device)
    # In double precision, since squaring halves the number of correct digits of directions of small variance.
    gram_SS = torch.zeros(num_draws, num_draws, dtype=torch.float64, device=draws.device)
    differs = torch.zeros((), dtype=torch.bool, device=draws.device)
    for span, part_SW in draws.columns():
        differs |= (part_SW != part_SW[0]).any()
        location_D[span] = part_SW.mean(0)
        centred_SW = part_SW.sub_(location_D[span])
        gram_SS += centred_SW @ centred_SW.mT
    left_SR = _leading(gram_SS.div_(num_draws), rank, num_draws * torch.finfo(draws.dtype).eps)
    # The draws are compared: the mean of equal ones may be off by its rounding, which would pass for a direction.
    if not bool(differs) or left_SR.shape[1] == 0:
        raise ValueError("All draws are the same, so there is no posterior to distil. Check that the chain moved.")
    return PrincipalCoordinates(location_D, (num_draws**0.5 * left_SR).to(location_D), draws, left_SR)


def _leading(gram_SS: Tensor, rank: int, resolution: float) -> Tensor:
    """Eigenvectors ``(S, R)`` of the largest eigenvalues, without those below ``resolution`` relative to the first."""
    variance, vectors = torch.linalg.eigh(gram_SS)
    rank = min(rank, int((variance > resolution * variance[-1]).sum()))
    left_SR = vectors[:, len(vectors) - rank :].flip(1)
    basis_SR: Tensor = left_SR * _sign(left_SR)
    return basis_SR


def _sign(vectors: Tensor) -> Tensor:
    """Eigenvectors are defined up to a sign. Here the entry of largest absolute value is positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors.gather(0, largest).sign()
