# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The frame of a matrix: which directions of its inputs are pinned, and how fine it is."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_apd.generators.subspace import dual_frame

#: Largest integer in 16 bits, with a margin for rounding.
LARGEST_INT16 = 32000
# Frames have at least this share of their matrix's columns less than all; else they have all.
_ALMOST_ALL = 0.8
# Frames are so fine that outputs of a layer whose pinned coordinates are all noise have this variance at most, relative
# to what it should be.
_MOST_LEAKED = 1.1

# Columns have scales where one deviates less than this, relative to the root mean square of all: such a column is next
# to nothing where functions are compared, but not for those who read weights. Those of ordinary networks deviate alike,
# within a third or so. No scale is smaller than 2 to this power.
_NARROW, _SMALLEST_EXPONENT = 1 / 8, -20.0


def short(values: Tensor) -> Tensor:
    """To eight binary digits, which every precision of a file keeps: units need not be exact, but must not change."""
    return values.bfloat16().to(values.dtype)


def num_pinned(size: int, pinned: int) -> int:
    """Of a matrix with ``size`` columns, where at most about ``pinned`` are wanted."""
    return size if size * _ALMOST_ALL <= pinned else pinned


def fitted_frame(moment_II: Tensor, pinned: int, frame_step: float, rows_NI: Tensor) -> tuple[Tensor, float]:
    """Integers ``(K, I)`` of the principal directions of a layer's inputs, and their step.

    Rounded directions are not orthogonal, so that noise of a coordinate of which outputs hardly depend leaks into those
    on which they depend. Inputs whose mean is many times their deviation need finer frames than others.

    :param int pinned: K.
    :param float frame_step: coarsest step, relative to the root mean square of their entries.
    :param rows_NI: deviations of rows of the weights from their means, which tell how far coordinates vary.
    """
    size = len(moment_II)
    values_I, vectors_II = torch.linalg.eigh(moment_II)
    vectors_IK = vectors_II[:, -pinned:].flip(1)
    largest = vectors_IK.abs().argmax(0, keepdim=True)
    vectors_KI = (vectors_IK * vectors_IK.gather(0, largest).sign()).mT
    variance_K = (rows_NI.double() @ vectors_KI.mT).square().mean(0)
    accepted = _MOST_LEAKED * (variance_K * values_I[-pinned:].flip(0).clamp_min(0)).sum()
    finest = float(vectors_KI.abs().amax()) / LARGEST_INT16
    step = max(frame_step / size**0.5, float(vectors_KI.abs().amax()) / 127)
    while True:
        step = float(short(torch.tensor(max(step, 1.01 * finest), dtype=torch.float64)))
        integers_KI = (vectors_KI / step).round()
        dual_KI = dual_frame(integers_KI * step)
        found = (variance_K * ((dual_KI @ moment_II) * dual_KI).sum(1)).sum()
        if bool(found <= accepted) or step <= 1.02 * finest:
            return integers_KI.to(torch.int16), step
        step /= 4


def scale_exponents(rows_CTOI: Tensor) -> Tensor | None:
    """Exponents ``(I,)`` of powers of two near the deviations of columns, relative to the root mean square of all.

    :param rows_CTOI: rows of the weights in some draws of each chain.
    :returns: None where no column deviates far less than the others.
    """
    # From the first draw, since a mean of equal numbers may differ from them in the last place.
    square_I = (rows_CTOI - rows_CTOI[:, :1]).double().square().mean((0, 1, 2))
    relative_I = square_I / square_I.mean().clamp_min(1e-300)
    if not bool(square_I.any()) or float(relative_I.amin()) >= _NARROW**2:
        return None
    return (relative_I.log2() / 2).round().clamp_min(_SMALLEST_EXPONENT)
