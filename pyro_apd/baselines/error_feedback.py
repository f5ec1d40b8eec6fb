# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Rounds draws to a few bits per weight, such that the outputs of layers change as little as possible.

Columns of a matrix are rounded one after the other. The error that a column makes in the layer's outputs is passed on
to the columns that are not yet rounded, and at last to the bias, as well as these can correct it for the inputs that
the layer has on the data.

**References**

Frantar, Ashkboos, Hoefler and Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers*, ICLR 2023, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_apd.distillation.layer_inputs import LayerInputs
from pyro_apd.generators.weight_matrices import WeightMatrix
from pyro_apd.models.layout import Layout, Site

#: Steps by bits, of which a Gaussian of unit variance is rounded best; levels lie at odd multiples of half a step.
STEPS = {2: 0.996, 3: 0.586, 4: 0.335}

# Added to the second moments of inputs, relative to their mean.
_DAMPING = 0.02
# Columns after which the errors are passed on beyond these columns.
_BLOCK = 56
# Bytes of a scale, which is rounded to bfloat16.
_SCALE_BYTES = 2
_LEVELS = 127
# Sites with shorter rows have one scale in int8.
_MIN_COLUMNS = 16
# Chains have means of their own if the variance between chains is more than this share of that within, and there are
# so many draws per chain. On eight chains of the digits, in 8 networks of int2, they lower the error of NLL from 21 to
# 6 per cent.
_APART, _DRAWS_PER_MEAN = 0.25, 2


def rounded_to_nearest(values_RI: Tensor, bits: int) -> Tensor:
    """Rows as they decode from ``bits`` bits per entry and one scale per row, without error feedback."""
    step_R1 = _steps(values_RI, bits)
    half = 2 ** (bits - 1)
    return ((values_RI / step_R1).floor().clamp(-half, half - 1) + 0.5) * step_R1


@torch.no_grad()
def rounded_with_feedback(values_RI: Tensor, moment_II: Tensor, bits: int, num_kept: int = 0) -> Tensor:
    """The same with error feedback; the last ``num_kept`` columns are corrected, but not rounded.

    :param values_RI: rows, of which each gives one output of the layer: ``values @ inputs``.
    :param moment_II: mean of the outer products of the inputs.
    """
    num_rounded = values_RI.shape[1] - num_kept
    half = 2 ** (bits - 1)
    step_R = _steps(values_RI[:, :num_rounded], bits).squeeze(1)
    feedback_II = _feedback(moment_II).to(values_RI)
    left_IR = values_RI.mT.clone()
    for start in range(0, num_rounded, _BLOCK):
        stop = min(start + _BLOCK, num_rounded)
        error_BR = left_IR[start:stop].clone()
        for i in range(start, stop):
            rounded_R = ((left_IR[i] / step_R).floor().clamp(-half, half - 1) + 0.5) * step_R
            error_R = (left_IR[i] - rounded_R) / feedback_II[i, i]
            left_IR[i + 1 : stop] -= feedback_II[i, i + 1 : stop, None] * error_R
            left_IR[i] = rounded_R
            error_BR[i - start] = error_R
        left_IR[stop:] -= feedback_II[start:stop, stop:].mT @ error_BR
    return left_IR.mT


def _feedback(moment_II: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moment."""
    moment_II = moment_II.double()
    damping = (_DAMPING * moment_II.diagonal().mean()).clamp_min(1e-300)
    damped_II = moment_II + damping * torch.eye(len(moment_II), dtype=moment_II.dtype, device=moment_II.device)
    factor_II: Tensor = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    return factor_II


def _steps(values_RI: Tensor, bits: int) -> Tensor:
    step_R1 = STEPS[bits] * values_RI.square().mean(1, keepdim=True).sqrt()
    return step_R1.bfloat16().to(values_RI).clamp_min(torch.finfo(values_RI.dtype).tiny)


def rounded_to_int8(values_RI: Tensor) -> Tensor:
    """Rows as they decode from integers of -127 to 127 and one scale per row."""
    scale_R1 = (values_RI.abs().amax(1, keepdim=True) / _LEVELS).bfloat16().to(values_RI)
    scale_R1 = scale_R1.clamp_min(torch.finfo(values_RI.dtype).tiny)
    return (values_RI / scale_R1).round().clamp(-_LEVELS, _LEVELS) * scale_R1


@dataclass(frozen=True)
class DrawRounding:
    """How draws are rounded, and how many bytes they then take.

    :ivar Layout layout: of the draws.
    :ivar int bits: per weight of the matrices in ``inputs``; all other numbers take eight.
    :ivar inputs: matrices with the second moments of their inputs; empty if all is in int8.
    :ivar int number_bytes: of a number that is not rounded.
    """

    layout: Layout
    bits: int = 8
    inputs: Sequence[LayerInputs] = ()
    number_bytes: int = 4

    @property
    def matrices(self) -> list[WeightMatrix]:
        """Where weights with error feedback are."""
        return [one.matrix for one in self.inputs]

    def num_bytes(self, num_draws: int, num_means: int = 1) -> int:
        """Bytes of integers and scales; names and shapes are not counted.

        Weights with error feedback: ``bits`` each, and a scale of two bytes per row and draw; and their means in int8,
        once per chain with a mean of its own, with one more byte per draw where there are several. All else: one byte
        each, and a scale per row.
        """
        weights = sum(matrix.units * matrix.inputs for matrix in self.matrices)
        rows = sum(matrix.units for matrix in self.matrices)
        means = num_means * (weights + _SCALE_BYTES * rows)
        others = sum(self._int8_bytes(site) for site in self._other_sites())
        numbers = num_draws * (_SCALE_BYTES * rows + others + (num_means > 1))
        return means + numbers + -(-num_draws * weights * self.bits // 8)

    def most_draws(self, budget: float, num_means: int = 1) -> int:
        """The largest number of draws within a number of bytes; 0 if not even one fits."""
        fixed = self.num_bytes(0, num_means)
        count = max(0, int((budget - fixed) / max(1, self.num_bytes(1, num_means) - fixed)) + 1)
        while count and self.num_bytes(count, num_means) > budget:
            count -= 1
        return count

    def pays_for_means(self, theta_CTD: Tensor, num_draws: int) -> bool:
        """Whether each chain has a mean of its own: where chains are apart, and enough draws share a mean."""
        if len(theta_CTD) == 1 or num_draws < _DRAWS_PER_MEAN * len(theta_CTD):
            return False
        within = between = 0.0
        for span in (matrix.spans[0] for matrix in self.matrices):
            part_CTW = theta_CTD[:, :, span]
            within += float(part_CTW.var(1, correction=0).sum())
            between += float(part_CTW.mean(1).var(0, correction=0).sum() * len(theta_CTD))
        return between > _APART * within

    @torch.no_grad()
    def rounded(self, theta_KD: Tensor, means_MD: Tensor, mean_K: Tensor) -> Tensor:
        """Draws as they decode.

        :param means_MD: what matrices are stored as differences from, in int8.
        :param mean_K: which of the means, for each draw.
        """
        theta_KD = theta_KD.clone()
        for one in self.inputs:
            for rows in one.matrix.row_blocks(len(theta_KD)):
                self._round_rows(one, rows, theta_KD, means_MD, mean_K)
        for site in self._other_sites():
            if site.size > 1:
                part_KW = theta_KD[:, site.start : site.stop]
                rounded_RI = rounded_to_int8(part_KW.reshape(len(theta_KD) * _num_rows(site), -1))
                theta_KD[:, site.start : site.stop] = rounded_RI.reshape(part_KW.shape)
        return theta_KD

    def _round_rows(self, one: LayerInputs, rows: slice, theta_KD: Tensor, means_MD: Tensor, mean_K: Tensor) -> None:
        weights, *bias = one.matrix.row_spans(rows)
        values_KOI = one.matrix.gather(theta_KD[:, weights], theta_KD[:, bias[0]] if bias else None)
        means_MOI = one.matrix.gather(means_MD[:, weights], None)
        means_MOI = rounded_to_int8(means_MOI.flatten(0, 1)).reshape(means_MOI.shape)
        if bias:
            means_MOI = torch.cat([means_MOI, means_MOI.new_zeros(*means_MOI.shape[:2], 1)], -1)
        mean_KOI = means_MOI[mean_K]
        deviation_RI = (values_KOI - mean_KOI).flatten(0, 1)
        rounded_RI = rounded_with_feedback(deviation_RI, one.moment_II, self.bits, len(bias))
        one.matrix.scatter(mean_KOI + rounded_RI.reshape(values_KOI.shape), rows, theta_KD)

    def _other_sites(self) -> list[Site]:
        starts = {matrix.start for matrix in self.matrices}
        return [site for site in self.layout if site.start not in starts]

    def _int8_bytes(self, site: Site) -> int:
        """Bytes of one draw. A single number is not rounded, since its scale would be the number itself."""
        return self.number_bytes if site.size == 1 else site.size + _SCALE_BYTES * _num_rows(site)


def _num_rows(site: Site) -> int:
    """Rows with a scale of their own in int8."""
    first = site.unconstrained_shape[0]
    return first if site.size // max(1, first) >= _MIN_COLUMNS else 1
