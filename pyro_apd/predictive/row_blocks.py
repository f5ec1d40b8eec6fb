# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Cutting the data of a model into blocks of rows that a CPU's caches hold, several draws of each at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_apd.runtime.trees import tree_flatten, tree_leaves, tree_unflatten

# The largest intermediate result of one block of rows and draws has so many bytes. Blocks of fewer rows spend their
# time outside of matrix products, and more draws together gain nothing.
_TILE_BYTES, _TILE_ROWS, _TILE_DRAWS = 8 * 2**20, 1024, 8
# A cut is found valid at the price of one more draw.
_MIN_DRAWS = 8


@dataclass(frozen=True)
class RowCut:
    """How rows are cut.

    :ivar int num_rows: rows of the arguments in all.
    :ivar int block_rows: rows of a block.
    :ivar int num_draws: draws evaluated together with a block.
    :ivar int num_data: data of the observed site in all, a multiple of ``num_rows``.
    """

    num_rows: int
    block_rows: int
    num_draws: int
    num_data: int = 0

    def spans(self) -> list[slice]:
        """The blocks."""
        starts = range(0, self.num_rows, self.block_rows)
        return [slice(start, min(start + self.block_rows, self.num_rows)) for start in starts]

    def of(
        self, span: slice, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these rows only, where they have rows."""
        leaves, spec = tree_flatten((args, dict(kwargs)))
        cut: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten([self._rows(leaf, span) for leaf in leaves], spec)
        return cut

    def _rows(self, leaf: Any, span: slice) -> Any:
        return leaf[span] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == self.num_rows else leaf


def plan_cut(
    largest: int, num_draws: int, chunk_size: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> RowCut | None:
    """A cut that would pay, or None. Rows are those of the first tensor among the arguments, on the CPU.

    :param int largest: bytes of the largest intermediate result of one draw and all rows.
    :param int num_draws: draws wanted.
    :param int chunk_size: draws evaluated together, where the caller says so.
    """
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or tensors[0].device.type != "cpu" or num_draws < _MIN_DRAWS:
        return None
    num_rows = tensors[0].shape[0]
    row_bytes = max(1, largest // max(1, num_rows))
    draws = chunk_size or min(_TILE_DRAWS, max(1, _TILE_BYTES // (_TILE_ROWS * row_bytes)))
    block_rows = max(8, _TILE_BYTES // (draws * row_bytes))
    return RowCut(num_rows, block_rows, draws) if num_rows > max(16, 3 * block_rows // 2) else None
