# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Where the matrices of weights lie within a draw: one row per unit, one column per input, the bias as last column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_apd.generators.base import is_entry

# Numbers of a matrix that are computed together, for all draws of a call.
_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class WeightMatrix:
    """A matrix of weights within a draw.

    :ivar int start: its first entry in the draw.
    :ivar int units: O, rows: one per output of the layer.
    :ivar int inputs: I without the bias: one per input, for a convolution per entry of its filter.
    :ivar int bias: first of the O entries of the bias; -1 where there is none.
    :ivar bool is_transposed: whether the draw has one row per input.
    """

    start: int
    units: int
    inputs: int
    bias: int = -1
    is_transposed: bool = False

    @classmethod
    def checked(cls, entry: Sequence[int], output_size: int) -> WeightMatrix:
        """From ``(start, units, inputs, bias, is_transposed)``.

        :raises ValueError: if these are not integers that fit into a draw of ``output_size`` numbers.
        """
        if not is_entry(entry, smallest=(0, 1, 1, -1, 0)) or entry[4] > 1:
            raise ValueError(f"A matrix must be (start, units, inputs, bias, is_transposed); got {entry!r:.80}.")
        start, units, inputs, bias, is_transposed = entry
        matrix = cls(start, units, inputs, bias, bool(is_transposed))
        if any(span.stop > output_size for span in matrix.spans):
            raise ValueError(f"Matrix {entry!r:.80} reaches beyond the {output_size} numbers of a draw.")
        return matrix

    @property
    def entry(self) -> tuple[int, int, int, int, int]:
        """As in the settings of a generator."""
        return (self.start, self.units, self.inputs, self.bias, int(self.is_transposed))

    @property
    def columns(self) -> int:
        """Columns with that of the bias."""
        return self.inputs + (self.bias >= 0)

    @property
    def spans(self) -> list[slice]:
        """Its entries within a draw: those of the weights, then those of the bias where there is one."""
        weights = slice(self.start, self.start + self.units * self.inputs)
        return [weights] + ([slice(self.bias, self.bias + self.units)] if self.bias >= 0 else [])

    def row_blocks(self, count: int) -> Iterator[slice]:
        """Rows in order, in blocks of at most about four million numbers for ``count`` draws."""
        length = self.units if self.is_transposed else max(1, _NUMBERS_AT_ONCE // max(1, count * self.columns))
        for start in range(0, self.units, length):
            yield slice(start, min(start + length, self.units))

    def row_spans(self, rows: slice) -> list[slice]:
        """Entries of some rows within a draw: weights, then bias. All rows of a transposed matrix."""
        if self.is_transposed:
            return self.spans
        weights = slice(self.start + rows.start * self.inputs, self.start + rows.stop * self.inputs)
        bias = [slice(self.bias + rows.start, self.bias + rows.stop)] if self.bias >= 0 else []
        return [weights, *bias]

    def gather(self, weights_SW: Tensor, bias_SO: Tensor | None = None) -> Tensor:
        """Rows ``(S, O, I)`` with the bias as last column, from the entries of :meth:`row_spans`."""
        if self.is_transposed:
            weights_SOI = weights_SW.unflatten(-1, (self.inputs, self.units)).mT
        else:
            weights_SOI = weights_SW.unflatten(-1, (-1, self.inputs))
        return weights_SOI if bias_SO is None else torch.cat([weights_SOI, bias_SO.unsqueeze(-1)], -1)

    def scatter(self, rows_SOI: Tensor, rows: slice, theta_SD: Tensor) -> None:
        """Writes rows into draws."""
        weights_SOI = rows_SOI[..., : self.inputs]
        if self.is_transposed:
            weights_SOI = weights_SOI.mT
        weights, *bias = self.row_spans(rows)
        theta_SD[:, weights] = weights_SOI.flatten(1)
        if bias:
            theta_SD[:, bias[0]] = rows_SOI[..., -1]


def other_spans(matrices: Sequence[WeightMatrix], output_size: int) -> list[slice]:
    """Entries of a draw that belong to no matrix, in order.

    :raises ValueError: if matrices overlap.
    """
    found, stop = [], 0
    for span in sorted((span for matrix in matrices for span in matrix.spans), key=lambda span: span.start):
        if span.start < stop:
            raise ValueError(f"Matrices overlap at entry {span.start} of a draw.")
        if span.start > stop:
            found.append(slice(stop, span.start))
        stop = span.stop
    if stop < output_size:
        found.append(slice(stop, output_size))
    return found
