# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Distances between two samples, and the spread of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SumOfDistances(torch.autograd.Function):
    """Sum over pairs of Euclidean distances ``(P,)`` between ``(P, S, F)`` and ``(P, T, F)``, with its gradient.

    Value and gradient come from one matrix of inverse distances, by matrix products; differentiating
    :func:`torch.cdist` takes many times as long. With ``is_same`` a draw is not paired with itself.
    """

    @staticmethod
    def forward(ctx: Any, first_PSF: Tensor, second_PTF: Tensor, is_same: bool) -> Tensor:
        first_PS, second_PT = first_PSF.square().sum(-1), second_PTF.square().sum(-1)
        squares_PST = first_PS.unsqueeze(-1) + second_PT.unsqueeze(-2)
        # Smaller squares are rounding errors.
        floor = torch.finfo(squares_PST.dtype).eps * (first_PS.mean() + second_PT.mean())
        squares_PST.baddbmm_(first_PSF, second_PTF.mT, alpha=-2)
        inverse_PST = squares_PST.clamp_(min=floor + torch.finfo(squares_PST.dtype).tiny).rsqrt_()
        if is_same:
            inverse_PST.diagonal(dim1=1, dim2=2).zero_()
        of_first_PSF = first_PSF * inverse_PST.sum(-1, keepdim=True) - inverse_PST @ second_PTF
        of_second_PTF = second_PTF * inverse_PST.sum(-2).unsqueeze(-1) - inverse_PST.mT @ first_PSF
        ctx.save_for_backward(of_first_PSF, of_second_PTF)
        # Euler: a function that is homogeneous of degree one equals its gradient times its argument.
        return (first_PSF * of_first_PSF).sum((1, 2)) + (second_PTF * of_second_PTF).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer_P: Tensor) -> tuple[Tensor, Tensor, None]:
        of_first_PSF, of_second_PTF = ctx.saved_tensors
        return outer_P[:, None, None] * of_first_PSF, outer_P[:, None, None] * of_second_PTF, None


def spread(values_PSF: Tensor) -> Tensor:
    """Mean distance between two different draws, ``(P,)``."""
    num_draws = values_PSF.shape[1]
    centred_PSF = values_PSF - values_PSF.detach().mean(1, keepdim=True)
    total_P: Tensor = _SumOfDistances.apply(centred_PSF, centred_PSF, True)  # type: ignore[no-untyped-call]
    return total_P / (num_draws * (num_draws - 1))


def energy_distance(fake_PSF: Tensor, real_PTF: Tensor, spread_P: Tensor | None = None) -> Tensor:
    """Energy distance between two samples, ``(P,)``, without bias (Szekely & Rizzo 2013).

    2 E|x - y| - E|x - x'| - E|y - y'| is zero exactly where the distributions agree. It is the value of the best critic
    among functions of bounded norm, which is known in closed form, so that no critic has to be trained (Bellemare et
    al. 2017). Pairs of a draw with itself are left out, since they would favour a generator with too little spread.

    :param spread_P: that of ``real``, where it is known.
    """
    # Centred values lose no digits when they are squared.
    centre = real_PTF.mean(1, keepdim=True)
    fake_PSF, real_PTF = fake_PSF - centre, real_PTF - centre
    across_P: Tensor = _SumOfDistances.apply(fake_PSF, real_PTF, False)  # type: ignore[no-untyped-call]
    num_pairs = fake_PSF.shape[1] * real_PTF.shape[1]
    return 2 * across_P / num_pairs - spread(fake_PSF) - (spread(real_PTF) if spread_P is None else spread_P)


def nearest_neighbour_distance(fake_SR: Tensor, real_TR: Tensor) -> Tensor:
    """Mean distance to the nearest draw of the other sample, over both directions.

    Generator draws away from the chain raise one direction; parts of the chain without generator draws raise the other.
    """
    distance_ST = torch.cdist(fake_SR, real_TR)
    return 0.5 * (distance_ST.amin(1).mean() + distance_ST.amin(0).mean())
