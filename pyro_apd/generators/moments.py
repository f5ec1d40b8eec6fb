# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit of the default generator finds about a part of the draws, a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_apd.generators.subspace import Part


@dataclass(frozen=True)
class Moments:
    """Of pinned coordinates about the centres of chains: means, bases, and the mean variance within chains."""

    mean_COK: Tensor
    basis_CROK: Tensor
    variance_OK: Tensor

    @classmethod
    def empty(cls, part: Part, left_CRT: Tensor) -> Moments:
        """To be filled block by block."""
        num_chains, rank, _ = left_CRT.shape
        shape = part.mean.shape[1:]
        return cls(
            left_CRT.new_empty(num_chains, *shape),
            left_CRT.new_empty(num_chains, rank, *shape),
            left_CRT.new_empty(shape),
        )

    def set(self, rows: slice, mean_COK: Tensor, basis_CROK: Tensor, variance_OK: Tensor) -> None:
        """Of some rows."""
        self.mean_COK[:, rows] = mean_COK
        self.basis_CROK[:, :, rows] = basis_CROK
        self.variance_OK[rows] = variance_OK


@dataclass(frozen=True)
class NullMoments:
    """Of a null part: integers of mean and path with a fine step, and its variance by row and by column."""

    integers: Tensor
    row_O: Tensor
    column_I: Tensor


def moments_of_block(values_SOI: Tensor, left_CRT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of chains ``(C, O, I)``, bases ``(C, R, O, I)`` and variance ``(O, I)``; values are changed in place."""
    values_CTW = values_SOI.flatten(1).unflatten(0, (len(left_CRT), -1))
    mean_C1W = values_CTW.mean(1, keepdim=True)
    values_CTW -= mean_C1W
    shape = values_SOI.shape[1:]
    basis_CROI = (left_CRT @ values_CTW).unflatten(-1, shape)
    return mean_C1W.reshape(-1, *shape), basis_CROI, values_CTW.square_().mean((0, 1)).reshape(shape)


def gram_of_functions(functions_CTF: Tensor) -> Tensor:
    """Products of draws ``(C, T, T)`` as functions, with a mean square of one as for a layer's weights."""
    centred_CTF = functions_CTF.double() - functions_CTF.double().mean(1, keepdim=True)
    gram_CTT = centred_CTF @ centred_CTF.mT
    return gram_CTT / gram_CTT.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300)
