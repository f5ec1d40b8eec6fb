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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_apd.generators.entropy_encoder import encode, encoded_size
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

__all__ = ["CodeError", "Coded", "decode", "encode", "encoded_size", "shares"]

_DTYPES = {torch.int8: np.int8, torch.int16: np.int16}


class CodeError(ValueError):
    """A code is damaged, or is not one of the tensors that are asked for."""


def decode(code: bytes, coded: Sequence[Coded]) -> list[Tensor]:
    """The tensors of a code; nothing is allocated beyond what these take.

    :raises CodeError: if the code is damaged, or not one of these tensors.
    """
    class_N, symbol_N, _, parts = _opened(code, coded)
    left = _Left(class_N, symbol_N, parts[1], parts[2])
    found, start = [], 0
    for one in coded:
        values_N = np.empty(one.count, _DTYPES[one.dtype])
        for block in blocks(one.count):
            values_N[block] = left.values(slice(start + block.start, start + block.stop), one.dtype)
        start += one.count
        found.append(torch.from_numpy(values_N.reshape(one.shape)))
    return found


def shares(code: bytes, coded: Sequence[Coded]) -> list[float]:
    """Bytes of a code that each tensor takes, which add up to its length.

    :raises CodeError: as :func:`decode`.
    """
    class_N, symbol_N, tables, _ = _opened(code, coded)
    bits = BITS - np.log2(np.maximum(tables, 1)) + SHIFTS[:, None]
    bits[:, ESCAPE] += 16.0 - SHIFTS
    bits_T, found, start = bits.reshape(-1), [], 0
    for one in coded:
        spans = [slice(start + block.start, start + block.stop) for block in blocks(one.count)]
        start += one.count
        sums = [float(bits_T[table_index(class_N[span], symbol_N[span])].sum()) for span in spans]
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
    classes = [
        _classes(both[: one.dims[0]], both[one.dims[0] :], one.dims[1])
        for one, both in zip(coded, factors, strict=True)
    ]
    class_N = np.concatenate(classes) if classes else np.zeros(0, np.uint8)
    return class_N, _decoded(class_N, tables, parts[3]), tables, parts


class _Left:
    """Entries from their symbols and what is left beside these: plain bits, and entries that are written in full.

    Blocks of entries are to be asked for in order.
    """

    def __init__(self, class_N: Array, symbol_N: Array, plain: memoryview, escaped: memoryview) -> None:
        counts = np.zeros(len(CLASSES), np.int64)
        for block in blocks(len(class_N)):
            counts += _class_counts(class_N[block][symbol_N[block] != ESCAPE])
        totals = [int(counts[bit < SHIFTS].sum()) for bit in range(SHIFTS.max())]
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
        symbol_B, shift_B = self._symbol_N[block], SHIFTS[self._class_N[block]]
        is_escaped_B = symbol_B == ESCAPE
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


def _class_counts(class_N: Array) -> Array:
    return np.bincount(class_N, minlength=len(CLASSES))


def _classes(first: Array, last: Array, between: int) -> Array:
    table = class_table(first, last)
    return np.broadcast_to(table[:, None, :], (len(first), between, len(last))).reshape(-1)


def _unpacked(side: memoryview, coded: Sequence[Coded]) -> tuple[list[Array], Array]:
    """Factors of each tensor, and the tables."""
    counts = [one.dims[0] + one.dims[2] for one in coded]
    most = sum(counts) + 2 * len(CLASSES) * (ESCAPE + 2)
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(side, most + 1)
    except zlib.error as error:
        raise CodeError(f"the code of integers is damaged ({error})") from error
    if len(text) > most or len(text) < sum(counts) + 2 * len(CLASSES) or not decoder.eof:
        raise CodeError("the code is not one of these integers")
    both = np.frombuffer(text[: sum(counts)], np.int8).astype(np.int64)
    factors = np.split(both, np.cumsum(counts)[:-1]) if counts else []
    text = text[sum(counts) :]
    lengths = np.frombuffer(text[: 2 * len(CLASSES)], "<u2").astype(np.int64)
    text = text[2 * len(CLASSES) :]
    if int(lengths.max(initial=0)) > ESCAPE + 1 or len(text) != 2 * int(lengths.sum()):
        raise CodeError("the tables of the code of integers are damaged")
    tables, values = np.zeros((len(CLASSES), ESCAPE + 1), np.int64), np.frombuffer(text, "<u2").astype(np.int64)
    for row, length, stop in zip(tables, lengths, np.cumsum(lengths), strict=True):
        row[:length] = values[stop - length : stop]
    if not np.isin(tables.sum(1), (0, 1 << BITS)).all():
        raise CodeError("the frequencies of the code of integers are damaged")
    return factors, tables


def _packed_slots(tables: Array) -> Array:
    """For each slot of each class: frequency, place within the symbol's slots, and symbol; in one number, so that a
    step looks up once."""
    starts = np.cumsum(tables, 1) - tables
    rows = []
    for row, start in zip(tables, starts, strict=True):
        symbol_T = np.repeat(np.arange(ESCAPE + 1), row) if row.any() else np.zeros(1 << BITS, np.int64)
        place_T = np.arange(1 << BITS) - start[symbol_T]
        rows.append(row[symbol_T] << 32 | place_T << 8 | symbol_T)
    return np.concatenate(rows)


def _decoded(class_N: Array, tables: Array, text: memoryview) -> Array:
    """Symbols of the entries, from states of the lanes and the words of all steps."""
    lanes = num_lanes(len(class_N))
    if len(text) < 4 * lanes or (len(text) - 4 * lanes) % 2:
        raise CodeError("the code of integers is cut off")
    has_table = np.asarray(tables.any(1))
    if not all(bool(has_table[class_N[block]].all()) for block in blocks(len(class_N))):
        raise CodeError("the code of integers lacks a table")
    state_L = np.frombuffer(text[: 4 * lanes], "<u4").astype(np.int64)
    word_M = np.frombuffer(text[4 * lanes :], "<u2")
    packed_T = _packed_slots(tables)
    symbol_N = np.empty(len(class_N), np.uint8)
    at = 0
    for first in range(0, len(class_N), lanes):
        base = class_N[first : first + lanes].astype(np.int64) << BITS
        state = state_L[: len(base)]
        packed = packed_T[base + (state & ((1 << BITS) - 1))]
        symbol_N[first : first + lanes] = packed & ESCAPE
        state = (packed >> 32) * (state >> BITS) + (packed >> 8 & 0xFFFFFF)
        short = np.flatnonzero(state < LOW)
        if at + len(short) > len(word_M):
            raise CodeError("the code of integers is cut off")
        state[short] = (state[short] << WORD) | word_M[at : at + len(short)]
        at += len(short)
        state_L[: len(base)] = state
    if at != len(word_M) or not (state_L == LOW).all():
        raise CodeError("the code of integers is damaged")
    return symbol_N
