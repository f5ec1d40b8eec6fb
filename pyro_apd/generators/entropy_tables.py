# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What encoder and decoder of :mod:`.entropy_code` have in common: classes of entries, tables of symbols, lanes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

# Classes of expected magnitudes, half an octave apart. In each, entries are divided by a power of two such that about
# sixteen different symbols are left; what is below that is written as plain bits.
CLASSES = range(-12, 24)
_SPLIT_FROM = 6
# Frequencies add up to this power of two. Symbols are bytes; the last one announces an entry that is written in full.
BITS = 12
ESCAPE = 255
# Steps of a lane. Each lane costs four bytes, and each step a few microseconds.
_STEPS = 2048
LOW, WORD = 1 << 16, 16
# Entries that are computed at a time: beside tensors and code, memory holds two bytes an entry while decoding.
_BLOCK = 2**18
# Plain bits of an entry, by its class.
SHIFTS = np.maximum((np.arange(len(CLASSES)) + CLASSES.start - _SPLIT_FROM) >> 1, 0).astype(np.uint8)


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


def blocks(count: int, multiple: int = 1) -> Iterator[slice]:
    """Entries in order, in blocks of a multiple of some number."""
    length = multiple * max(1, _BLOCK // multiple)
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


def table_index(class_N: Array, symbol_N: Array) -> Array:
    """Where a class and symbol lie in tables that are one row."""
    index_N: Array = class_N.astype(np.int64) * (ESCAPE + 1) + symbol_N
    return index_N


def class_table(first: Array, last: Array) -> Array:
    """Classes by first and last index."""
    sums = (first[:, None] + last[None, :] + 1) >> 1
    table: Array = np.clip(sums - CLASSES.start, 0, len(CLASSES) - 1).astype(np.uint8)
    return table


def num_lanes(count: int) -> int:
    """Lanes of so many entries."""
    return max(1, -(-count // _STEPS))
