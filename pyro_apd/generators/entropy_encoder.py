# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The encoder of :mod:`.entropy_code`: beside tensors and code, memory holds one block of entries."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_apd.generators.entropy_tables import (
    BITS,
    CLASSES,
    ESCAPE,
    LOW,
    SHIFTS,
    WORD,
    Array,
    Coded,
    blocks,
    class_table,
    num_lanes,
    table_index,
)


def encode(tensors: Sequence[Tensor]) -> bytes:
    """The code of ``int8`` and ``int16`` tensors; the same tensors always give the same bytes."""
    entries = _Entries(tensors)
    counts = _counts(entries)
    tables = np.stack([_frequencies(row) for row in counts])
    side = _side(entries, tables)
    plain, escaped = _left_of_symbols(entries, counts)
    state_L = _start(len(entries))
    words = [part.tobytes() for part in _words(entries, tables, state_L)]
    text = [state_L.astype("<u4").tobytes(), *reversed(words)]
    head = struct.pack("<4I", len(side), len(plain), len(escaped), sum(len(part) for part in text))
    return b"".join([head, side, plain, escaped, *text])


def encoded_size(tensors: Sequence[Tensor]) -> int:
    """Bytes that :func:`encode` returns, without the memory that they take."""
    entries = _Entries(tensors)
    counts = _counts(entries)
    tables = np.stack([_frequencies(row) for row in counts])
    state_L = _start(len(entries))
    num_words = sum(len(words) for words in _words(entries, tables, state_L))
    num_plain = -(-sum(_plain_totals(counts)) // 8)
    num_escaped = int(counts[:, ESCAPE].sum())
    return 16 + len(_side(entries, tables)) + num_plain + 2 * num_escaped + 4 * len(state_L) + 2 * num_words


class _Entries:
    """Entries of tensors one after the other, of which a block at a time is computed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.factors = [np.zeros(0, np.int64)]
        self._tensors: list[tuple[Array, Array]] = []
        starts = [0]
        for tensor in tensors:
            dims = Coded(tuple(tensor.shape), tensor.dtype).dims
            values = tensor.detach().cpu().contiguous().numpy().reshape(dims)
            factors = _factors(values)
            self.factors += factors
            self._tensors.append((values, class_table(*factors)))
            starts.append(starts[-1] + values.size)
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def block(self, block: slice) -> tuple[Array, Array, Array]:
        """Of some entries: classes, symbols, and the entries with the sign as lowest bit."""
        classes, folded = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint16)]
        for i in range(int(np.searchsorted(self._starts, block.start, "right")) - 1, len(self._tensors)):
            (values, table), start = self._tensors[i], int(self._starts[i])
            if block.stop <= start:
                break
            place = slice(max(block.start - start, 0), min(block.stop - start, values.size))
            if place.start < place.stop:
                wide = values.reshape(-1)[place].astype(np.int16, copy=False)
                folded.append(((wide << 1) ^ (wide >> 15)).view(np.uint16))
                classes.append(_some_classes(table, values.shape[1], place))
        class_B, folded_B = np.concatenate(classes), np.concatenate(folded)
        return class_B, np.minimum(folded_B >> SHIFTS[class_B], ESCAPE).astype(np.uint8), folded_B


def _counts(entries: _Entries) -> Array:
    """How often each symbol occurs, by class."""
    counts = np.zeros(len(CLASSES) * (ESCAPE + 1), np.int64)
    for block in blocks(len(entries)):
        class_B, symbol_B, _ = entries.block(block)
        counts += np.bincount(table_index(class_B, symbol_B), minlength=len(counts))
    return counts.reshape(len(CLASSES), -1)


def _side(entries: _Entries, tables: Array) -> bytes:
    return zlib.compress(np.concatenate(entries.factors).astype(np.int8).tobytes() + _packed_tables(tables), 9)


def _plain_totals(counts: Array) -> list[int]:
    """How many entries have a lowest plain bit, a second one, and so on."""
    whole = counts[:, :ESCAPE].sum(1)
    return [int(whole[bit < SHIFTS].sum()) for bit in range(SHIFTS.max())]


def _left_of_symbols(entries: _Entries, counts: Array) -> tuple[bytes, bytes]:
    """The lowest bits of all entries that have some, then the next ones, and so on; and entries written in full."""
    totals = _plain_totals(counts)
    next_bit = np.cumsum([0, *totals])
    plain_M, escaped = np.zeros(-(-sum(totals) // 8), np.uint8), []
    for block in blocks(len(entries)):
        class_B, symbol_B, folded_B = entries.block(block)
        is_escaped_B = symbol_B == ESCAPE
        escaped.append(folded_B[is_escaped_B].astype("<u2"))
        shift_B = np.where(is_escaped_B, 0, SHIFTS[class_B])
        for bit in range(int(shift_B.max(initial=0))):
            bits = (folded_B[shift_B > bit] >> bit & 1).astype(np.uint8)
            first, before = divmod(int(next_bit[bit]), 8)
            packed = np.packbits(np.concatenate([np.zeros(before, np.uint8), bits]))
            plain_M[first : first + len(packed)] |= packed
            next_bit[bit] += len(bits)
    return plain_M.tobytes(), b"".join(part.tobytes() for part in escaped)


def _factors(values: Array) -> tuple[Array, Array]:
    """Factors of the first and of the last index, in quarters of octaves."""
    first_sums, last_sums = np.zeros(values.shape[0], np.int64), np.zeros(values.shape[2], np.int64)
    width = max(1, values.shape[1] * values.shape[2])
    for block in blocks(len(values) * width, width):
        rows = slice(block.start // width, block.stop // width)
        magnitudes = np.abs(values[rows].astype(np.int32))
        first_sums[rows] = magnitudes.sum((1, 2))
        last_sums += magnitudes.sum((0, 1))

    def quarters(means: NDArray[np.float64]) -> Array:
        return np.clip(np.round(4 * np.log2(np.maximum(means, 2.0**-16))), -100, 100).astype(np.int64)

    if values.size == 0:
        return first_sums, last_sums
    mean = max(float(first_sums.sum()) / values.size, 2.0**-16)
    first, last = first_sums * len(first_sums) / values.size, last_sums * len(last_sums) / values.size
    return quarters(first), quarters(last / mean)


def _some_classes(table: Array, between: int, place: slice) -> Array:
    """A slice of :func:`_classes`, which is not empty."""
    length = table.shape[1]
    row = np.arange(place.start // length, -(-place.stop // length))
    start = int(row[0]) * length
    classes: Array = table[row // between].reshape(-1)[place.start - start : place.stop - start]
    return classes


def _frequencies(counts: Array) -> Array:
    """Frequencies that add up to ``2 ** BITS``, none of them zero where the count is not; zeros without counts."""
    total = int(counts.sum())
    if total == 0:
        return np.zeros_like(counts)
    found = np.where(counts > 0, np.maximum(1, counts * (1 << BITS) // total), 0)
    found[int(found.argmax())] += (1 << BITS) - int(found.sum())
    return found


def _packed_tables(tables: Array) -> bytes:
    """For each class the number of symbols up to the last that occurs, then their frequencies."""
    lengths = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in tables]
    rows = [row[:length].astype("<u2").tobytes() for row, length in zip(tables, lengths, strict=True)]
    return np.array(lengths, "<u2").tobytes() + b"".join(rows)


def _start(count: int) -> Array:
    """States of the lanes of so many entries before the first step."""
    return np.full(num_lanes(count), LOW, np.int64)


def _words(entries: _Entries, tables: Array, state_L: Array) -> Iterator[Array]:
    """Words of all steps, the last step first; states are changed in place. Entry i is step ``i // lanes`` of lane
    ``i % lanes``."""
    frequency_T, start_T = tables.reshape(-1), (np.cumsum(tables, 1) - tables).reshape(-1)
    lanes = len(state_L)
    for block in reversed(list(blocks(len(entries), lanes))):
        index_B = table_index(*entries.block(block)[:2])
        for first in reversed(range(0, len(index_B), lanes)):
            index = index_B[first : first + lanes]
            frequency, start = frequency_T[index], start_T[index]
            state = state_L[: len(index)]
            is_large = state >= frequency << (2 * WORD - BITS)
            yield (state[is_large] & (LOW - 1)).astype("<u2")
            state = np.where(is_large, state >> WORD, state)
            quotient = state // frequency
            state_L[: len(index)] = (quotient << BITS) + (state - quotient * frequency) + start
