# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Principal coordinates of draws: the few directions of weight space along which a chain really moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrincipalCoordinates:
    """A basis of weight space in which draws have mean zero and unit covariance.

    :ivar Tensor location_D: mean of the draws.
    :ivar Tensor basis_RD: directions, each as long as the draws' standard deviation along it.
    :ivar Tensor coordinates_SR: the draws in that basis.
    """

    location_D: Tensor
    basis_RD: Tensor
    coordinates_SR: Tensor


def principal_coordinates(theta_SD: Tensor, rank: int) -> PrincipalCoordinates:
    """The ``rank`` directions of largest variance, from the ``S x S`` Gram matrix: nothing is ever ``D x D``.

    Directions without variance are left out, so that the rank found may be smaller than asked for.

    :param Tensor theta_SD: draws.
    :param int rank: largest number of directions.
    :raises ValueError: if all draws are the same.
    """
    location_D = theta_SD.mean(0)
    centred_SD = theta_SD - location_D
    num_draws = len(theta_SD)
    # In double precision, since squaring halves the digits that small directions have.
    gram_SS = (centred_SD @ centred_SD.mT).double() / num_draws
    variance, vectors = torch.linalg.eigh(gram_SS)
    variance, vectors = variance.flip(0), vectors.flip(1)
    resolution = num_draws * torch.finfo(theta_SD.dtype).eps
    rank = min(rank, int((variance > resolution * variance[0]).sum()))
    if rank == 0:
        raise ValueError("All draws are the same, so there is no posterior to distil. Check that the chain moved.")
    left_SR = vectors[:, :rank] * _sign(vectors[:, :rank])
    basis_RD = left_SR.to(theta_SD).mT @ centred_SD / num_draws**0.5
    return PrincipalCoordinates(location_D, basis_RD, (num_draws**0.5 * left_SR).to(theta_SD))


def _sign(vectors: Tensor) -> Tensor:
    """Eigenvectors are defined up to a sign; this fixes it: the largest entry is positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors.gather(0, largest).sign()
