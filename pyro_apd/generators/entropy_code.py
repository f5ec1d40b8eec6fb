# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""An entropy code of integers: few bytes for tensors whose entries are mostly small.

Interleaved range asymmetric numeral systems (rANS; Duda 2009, Giesen 2014), vectorised over lanes. The expected
magnitude of an entry is the product of one factor for its first index and one for its last. Entries of nearly equal
expected magnitude are a class, and each class has a table of frequencies, shared by all tensors. The factors are in the
code, as one byte each.

The layout of the code is in ``docs/format.md``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# Classes of expected magnitudes, half an octave apart. In each, entries are divided by a power of two such that about
# sixteen different symbols are left; what is below that is written as plain bits.
_CLASSES = range(-12, 24)
_SPLIT_FROM = 6
# Frequencies add up to this power of two. Symbols are bytes; the last one announces an entry that is written in full.
_BITS = 12
_ESCAPE = 255
# Steps of a lane. Each lane costs four bytes, and each step a few microseconds.
_STEPS = 2048
_LOW, _WORD = 1 << 16, 16
_DTYPES = {torch.int8: np.int8, torch.int16: np.int16}
# Entries that are computed at a time: beside tensors and code, memory holds two bytes an entry (four while encoding).
_BLOCK = 2**18


class CodeError(ValueError):
    """A code is damaged, or is not one of the tensors that are asked for."""


@dataclass(frozen=True)
class Coded:
    """What is decoded: the shape and dtype of a tensor, ``int8`` or ``int16``."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def dims(self) -> tuple[int, int, int]:
        """First dimension, all between, and last: the first and the last index have factors."""
        if len(self.shape) < 2:
            return (1, 1, int(np.prod(self.shape)))
        return (self.shape[0], int(np.prod(self.shape[1:-1])), self.shape[-1])

    @property
    def count(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape))


def encode(tensors: Sequence[Tensor]) -> bytes:
    """The code of ``int8`` and ``int16`` tensors; the same tensors always give the same bytes."""
    total = sum(tensor.numel() for tensor in tensors)
    class_N, folded_N, factors, start = np.empty(total, np.uint8), np.empty(total, np.uint16), [], 0
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().numpy().reshape(Coded(tuple(tensor.shape), tensor.dtype).dims)
        first, last = _factors(values)
        factors.append(np.concatenate([first, last]))
        place, flat = slice(start, start + values.size), values.reshape(-1)
        class_N[place] = _classes(first, last, values.shape[1])
        for block in _blocks(values.size):
            wide = flat[block].astype(np.int16, copy=False)
            folded_N[start + block.start : start + block.stop] = ((wide << 1) ^ (wide >> 15)).view(np.uint16)
        start = place.stop
    symbol_N = np.empty(len(class_N), np.uint8)
    counts = np.zeros(len(_CLASSES) * (_ESCAPE + 1), np.int64)
    for block in _blocks(len(class_N)):
        symbol_N[block] = np.minimum(folded_N[block] >> _SHIFTS[class_N[block]], _ESCAPE)
        counts += np.bincount(_table_index(class_N[block], symbol_N[block]), minlength=len(counts))
    tables = np.stack([_frequencies(row) for row in counts.reshape(len(_CLASSES), -1)])
    plain = _plain_bits(class_N, symbol_N, folded_N)
    escaped = folded_N[symbol_N == _ESCAPE].astype("<u2").tobytes()
    del folded_N
    side = zlib.compress(_joined(factors).astype(np.int8).tobytes() + _packed_tables(tables), 9)
    words = _encoded(class_N, symbol_N, tables)
    head = struct.pack("<4I", len(side), len(plain), len(escaped), len(words))
    return b"".join([head, side, plain, escaped, words])


def decode(code: bytes, coded: Sequence[Coded]) -> list[Tensor]:
    """The tensors of a code; nothing is allocated beyond what these take.

    :raises CodeError: if the code is damaged, or not one of these tensors.
    """
    class_N, symbol_N, _, parts = _opened(code, coded)
    left = _Left(class_N, symbol_N, parts[1], parts[2])
    found, start = [], 0
    for one in coded:
        values_N = np.empty(one.count, _DTYPES[one.dtype])
        for block in _blocks(one.count):
            values_N[block] = left.values(slice(start + block.start, start + block.stop), one.dtype)
        start += one.count
        found.append(torch.from_numpy(values_N.reshape(one.shape)))
    return found


def shares(code: bytes, coded: Sequence[Coded]) -> list[float]:
    """Bytes of a code that each tensor takes, which add up to its length.

    :raises CodeError: as :func:`decode`.
    """
    class_N, symbol_N, tables, _ = _opened(code, coded)
    bits = _BITS - np.log2(np.maximum(tables, 1)) + _SHIFTS[:, None]
    bits[:, _ESCAPE] += 16.0 - _SHIFTS
    bits_T, found, start = bits.reshape(-1), [], 0
    for one in coded:
        blocks = [slice(start + block.start, start + block.stop) for block in _blocks(one.count)]
        start += one.count
        sums = [float(bits_T[_table_index(class_N[block], symbol_N[block])].sum()) for block in blocks]
        found.append(sum(sums) + 8.0 * (one.dims[0] + one.dims[2]))
    return [len(code) * size / sum(found) for size in found]


def _opened(code: bytes, coded: Sequence[Coded]) -> tuple[Array, Array, Array, list[memoryview]]:
    """Classes and symbols of all entries, tables, and the four parts of a code."""
    if len(code) < 16:
        raise CodeError("the code of integers is too short")
    sizes = struct.unpack("<4I", code[:16])
    if 16 + sum(sizes) != len(code):
        raise CodeError("the parts of the code of integers do not add up to its length")
    parts, start = [], 16
    for size in sizes:
        parts.append(memoryview(code)[start : start + size])
        start += size
    factors, tables = _unpacked(parts[0], coded)
    class_N = _joined(
        [
            _classes(both[: one.dims[0]], both[one.dims[0] :], one.dims[1])
            for one, both in zip(coded, factors, strict=True)
        ]
    )
    return class_N, _decoded(class_N, tables, parts[3]), tables, parts


class _Left:
    """Entries from their symbols and what is left beside these: plain bits, and entries that are written in full.

    Blocks of entries are to be asked for in order.
    """

    def __init__(self, class_N: Array, symbol_N: Array, plain: memoryview, escaped: memoryview) -> None:
        counts = np.zeros(len(_CLASSES), np.int64)
        for block in _blocks(len(class_N)):
            counts += _class_counts(class_N[block][symbol_N[block] != _ESCAPE])
        totals = [int(counts[bit < _SHIFTS].sum()) for bit in range(_SHIFTS.max())]
        if len(plain) != -(-sum(totals) // 8):
            raise CodeError("the code of integers has another number of plain bits")
        if len(escaped) != 2 * (len(class_N) - int(counts.sum())):
            raise CodeError("the code of integers has other large entries than it states")
        self._class_N, self._symbol_N = class_N, symbol_N
        self._plain_M = np.frombuffer(plain, np.uint8)
        self._next_bit = np.cumsum([0, *totals])
        self._escaped_M, self._next_escaped = np.frombuffer(escaped, "<u2"), 0

    def values(self, block: slice, dtype: torch.dtype) -> Array:
        """Some entries.

        :raises CodeError: if they are too large for ``dtype``.
        """
        symbol_B, shift_B = self._symbol_N[block], _SHIFTS[self._class_N[block]]
        is_escaped_B = symbol_B == _ESCAPE
        folded_B = symbol_B.astype(np.int32) << shift_B
        shift_B[is_escaped_B] = 0
        for bit in range(int(shift_B.max(initial=0))):
            is_wide_B = shift_B > bit
            start = int(self._next_bit[bit])
            self._next_bit[bit] += int(is_wide_B.sum())
            first, stop = start // 8, -(-int(self._next_bit[bit]) // 8)
            bits_M = np.unpackbits(self._plain_M[first:stop])[start - 8 * first :]
            folded_B[is_wide_B] += bits_M[: int(is_wide_B.sum())].astype(np.int32) << bit
        stop = self._next_escaped + int(is_escaped_B.sum())
        folded_B[is_escaped_B] = self._escaped_M[self._next_escaped : stop]
        self._next_escaped = stop
        if int(folded_B.max(initial=0)) > 2 * torch.iinfo(dtype).max + 1:
            raise CodeError(f"the code has integers that do not fit into {dtype}")
        values_B: Array = (folded_B >> 1) ^ -(folded_B & 1)
        return values_B


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def _class_counts(class_N: Array) -> Array:
    return np.bincount(class_N, minlength=len(_CLASSES))


def _table_index(class_N: Array, symbol_N: Array) -> Array:
    """Where a class and symbol lie in tables that are one row."""
    index_N: Array = class_N.astype(np.int64) * (_ESCAPE + 1) + symbol_N
    return index_N


def _joined(arrays: Sequence[Array]) -> Array:
    joined: Array = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.zeros(0, np.uint8)
    return joined


def _factors(values: Array) -> tuple[Array, Array]:
    """Factors of the first and of the last index, in quarters of octaves."""
    first_sums, last_sums = np.zeros(values.shape[0], np.int64), np.zeros(values.shape[2], np.int64)
    length = max(1, _BLOCK // max(1, values.shape[1] * values.shape[2]))
    for start in range(0, len(values), length):
        magnitudes = np.abs(values[start : start + length].astype(np.int32))
        first_sums[start : start + length] = magnitudes.sum((1, 2))
        last_sums += magnitudes.sum((0, 1))

    def quarters(means: NDArray[np.float64]) -> Array:
        return np.clip(np.round(4 * np.log2(np.maximum(means, 2.0**-16))), -100, 100).astype(np.int64)

    if values.size == 0:
        return first_sums, last_sums
    mean = max(float(first_sums.sum()) / values.size, 2.0**-16)
    first, last = first_sums * len(first_sums) / values.size, last_sums * len(last_sums) / values.size
    return quarters(first), quarters(last / mean)


def _classes(first: Array, last: Array, between: int) -> Array:
    sums = (first[:, None] + last[None, :] + 1) >> 1
    classes = np.clip(sums - _CLASSES.start, 0, len(_CLASSES) - 1).astype(np.uint8)
    return np.broadcast_to(classes[:, None, :], (len(first), between, len(last))).reshape(-1)


# Plain bits of an entry, by its class.
_SHIFTS = np.maximum((np.arange(len(_CLASSES)) + _CLASSES.start - _SPLIT_FROM) >> 1, 0).astype(np.uint8)


def _plain_bits(class_N: Array, symbol_N: Array, folded_N: Array) -> bytes:
    """The lowest bits of all entries that have some, then the next ones, and so on."""
    bits = [
        (folded_N[block][is_wide_B] >> bit & 1).astype(np.uint8)
        for bit in range(_SHIFTS.max())
        for block in _blocks(len(class_N))
        for is_wide_B in [(_SHIFTS[class_N[block]] > bit) & (symbol_N[block] != _ESCAPE)]
    ]
    return bytes(np.packbits(_joined(bits)))


def _frequencies(counts: Array) -> Array:
    """Frequencies that add up to ``2 ** _BITS``, none of them zero where the count is not; zeros without counts."""
    total = int(counts.sum())
    if total == 0:
        return np.zeros_like(counts)
    found = np.where(counts > 0, np.maximum(1, counts * (1 << _BITS) // total), 0)
    found[int(found.argmax())] += (1 << _BITS) - int(found.sum())
    return found


def _packed_tables(tables: Array) -> bytes:
    """For each class the number of symbols up to the last that occurs, then their frequencies."""
    lengths = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in tables]
    rows = [row[:length].astype("<u2").tobytes() for row, length in zip(tables, lengths, strict=True)]
    return np.array(lengths, "<u2").tobytes() + b"".join(rows)


def _unpacked(side: memoryview, coded: Sequence[Coded]) -> tuple[list[Array], Array]:
    """Factors of each tensor, and the tables."""
    counts = [one.dims[0] + one.dims[2] for one in coded]
    most = sum(counts) + 2 * len(_CLASSES) * (_ESCAPE + 2)
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(side, most + 1)
    except zlib.error as error:
        raise CodeError(f"the code of integers is damaged ({error})") from error
    if len(text) > most or len(text) < sum(counts) + 2 * len(_CLASSES) or not decoder.eof:
        raise CodeError("the code is not one of these integers")
    both = np.frombuffer(text[: sum(counts)], np.int8).astype(np.int64)
    factors = np.split(both, np.cumsum(counts)[:-1]) if counts else []
    text = text[sum(counts) :]
    lengths = np.frombuffer(text[: 2 * len(_CLASSES)], "<u2").astype(np.int64)
    text = text[2 * len(_CLASSES) :]
    if int(lengths.max(initial=0)) > _ESCAPE + 1 or len(text) != 2 * int(lengths.sum()):
        raise CodeError("the tables of the code of integers are damaged")
    tables, values = np.zeros((len(_CLASSES), _ESCAPE + 1), np.int64), np.frombuffer(text, "<u2").astype(np.int64)
    for row, length, stop in zip(tables, lengths, np.cumsum(lengths), strict=True):
        row[:length] = values[stop - length : stop]
    if not np.isin(tables.sum(1), (0, 1 << _BITS)).all():
        raise CodeError("the frequencies of the code of integers are damaged")
    return factors, tables


def _num_lanes(count: int) -> int:
    return max(1, -(-count // _STEPS))


def _encoded(class_N: Array, symbol_N: Array, tables: Array) -> bytes:
    """States of the lanes, then the words of all steps. Entry i is step ``i // lanes`` of lane ``i % lanes``."""
    frequency_T, start_T = tables.reshape(-1), (np.cumsum(tables, 1) - tables).reshape(-1)
    lanes = _num_lanes(len(symbol_N))
    state_L = np.full(lanes, _LOW, np.int64)
    words = []
    for first in reversed(range(0, len(symbol_N), lanes)):
        step = slice(first, first + lanes)
        index = _table_index(class_N[step], symbol_N[step])
        frequency, start = frequency_T[index], start_T[index]
        state = state_L[: len(frequency)]
        is_large = state >= frequency << (2 * _WORD - _BITS)
        words.append((state[is_large] & (_LOW - 1)).astype("<u2"))
        state = np.where(is_large, state >> _WORD, state)
        quotient = state // frequency
        state_L[: len(frequency)] = (quotient << _BITS) + (state - quotient * frequency) + start
    return b"".join([state_L.astype("<u4").tobytes(), *(part.tobytes() for part in reversed(words))])


def _packed_slots(tables: Array) -> Array:
    """For each slot of each class: frequency, place within the symbol's slots, and symbol; in one number, so that a
    step looks up once."""
    starts = np.cumsum(tables, 1) - tables
    rows = []
    for row, start in zip(tables, starts, strict=True):
        symbol_T = np.repeat(np.arange(_ESCAPE + 1), row) if row.any() else np.zeros(1 << _BITS, np.int64)
        place_T = np.arange(1 << _BITS) - start[symbol_T]
        rows.append(row[symbol_T] << 32 | place_T << 8 | symbol_T)
    return np.concatenate(rows)


def _decoded(class_N: Array, tables: Array, text: memoryview) -> Array:
    """Symbols of :func:`_encoded`."""
    lanes = _num_lanes(len(class_N))
    if len(text) < 4 * lanes or (len(text) - 4 * lanes) % 2:
        raise CodeError("the code of integers is cut off")
    has_table = np.asarray(tables.any(1))
    if not all(bool(has_table[class_N[block]].all()) for block in _blocks(len(class_N))):
        raise CodeError("the code of integers lacks a table")
    state_L = np.frombuffer(text[: 4 * lanes], "<u4").astype(np.int64)
    word_M = np.frombuffer(text[4 * lanes :], "<u2")
    packed_T = _packed_slots(tables)
    symbol_N = np.empty(len(class_N), np.uint8)
    at = 0
    for first in range(0, len(class_N), lanes):
        base = class_N[first : first + lanes].astype(np.int64) << _BITS
        state = state_L[: len(base)]
        packed = packed_T[base + (state & ((1 << _BITS) - 1))]
        symbol_N[first : first + lanes] = packed & _ESCAPE
        state = (packed >> 32) * (state >> _BITS) + (packed >> 8 & 0xFFFFFF)
        short = np.flatnonzero(state < _LOW)
        if at + len(short) > len(word_M):
            raise CodeError("the code of integers is cut off")
        state[short] = (state[short] << _WORD) | word_M[at : at + len(short)]
        at += len(short)
        state_L[: len(base)] = state
    if at != len(word_M) or not (state_L == _LOW).all():
        raise CodeError("the code of integers is damaged")
    return symbol_N
