# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Rounding of coordinates; and of bases and null parts, without a copy of all of them in floating point."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyro_apd.generators.precision import to_int8

# Numbers that are rounded together.
_NUMBERS_AT_ONCE = 2**22


def with_left_inverse(coordinates_CTR: Tensor, is_rounded: bool) -> tuple[Tensor, Tensor]:
    """Coordinates, which are orthogonal with a mean square of one, and their left inverse ``(C, R, T)``.

    :param bool is_rounded: round them to what a file of precision ``"int8"`` keeps unchanged: where nothing is left
        out, that would be the largest error. They are not quite orthogonal then.
    """
    if not is_rounded:
        return coordinates_CTR, coordinates_CTR.mT / coordinates_CTR.shape[1]
    integers_NR, scale_N = to_int8(coordinates_CTR.flatten(0, 1))
    rounded_CTR = (integers_NR * scale_N.unsqueeze(1)).view_as(coordinates_CTR).to(coordinates_CTR.dtype)
    return rounded_CTR, torch.linalg.pinv(rounded_CTR.double()).to(coordinates_CTR.dtype)


def scaled_bases(basis_CROK: Tensor, step: float, rows: slice) -> Tensor:
    """Some rows of bases in steps, with chains and coordinates joined."""
    return basis_CROK[:, :, rows].flatten(0, 1) / step


def rounded(integers_ROK: Tensor, scaled: Callable[[slice], Tensor], is_dithered: bool = False) -> Tensor:
    """Rounds a block of rows at a time into ``integers``; returns what their magnitudes lose, ``(R,)``.

    Numbers are rarer the larger they are, so that more magnitudes are rounded up than down. Those of integers that are
    not zero therefore lose their mean excess when they are decoded.

    :param callable scaled: returns some rows ``(R, O, K)`` in steps.
    :param bool is_dithered: round at random, up or down; magnitudes then lose nothing.
    """
    excess_R = torch.zeros(len(integers_ROK), dtype=torch.float64, device=integers_ROK.device)
    count_R = torch.zeros_like(excess_R, dtype=torch.long)
    for rows in row_blocks(integers_ROK):
        scaled_ROK = scaled(rows)
        if is_dithered:
            integers_ROK[:, rows] = (scaled_ROK + torch.rand_like(scaled_ROK) - 0.5).round().to(integers_ROK.dtype)
            continue
        rounded_ROK = scaled_ROK.round()
        integers_ROK[:, rows] = rounded_ROK.to(integers_ROK.dtype)
        is_nonzero = rounded_ROK != 0
        excess_R += ((rounded_ROK.abs() - scaled_ROK.abs()) * is_nonzero).sum((1, 2))
        count_R += is_nonzero.sum((1, 2))
    return (excess_R / count_R.clamp_min(1)).clamp(0.0, 0.5)


def row_blocks(integers_ROK: Tensor) -> Iterator[slice]:
    """Rows in order, in blocks of at most about four million numbers."""
    num_coordinates, num_rows, num_columns = integers_ROK.shape
    length = max(1, _NUMBERS_AT_ONCE // (num_coordinates * num_columns))
    for start in range(0, num_rows, length):
        yield slice(start, start + length)
