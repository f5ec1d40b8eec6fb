# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A code of integers that ONNX can decode without a loop, so that it is decoded once, when a file is loaded.

A Rice code (Rice & Plaunt, 1971): an integer without its sign is a quotient by a power of two, in as many zeros and a
one, and a remainder in plain bits. The power follows from the expected magnitude of an entry, one byte for each first
and last index, as in :mod:`pyro_apd.generators.entropy_code`. The ones of all quotients are found together, and so are
the remainders: nothing waits for the entry before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# Plain bits that an entry may have.
_MOST_BITS = 15
# Halvings of the powers of two in one byte of a factor.
_PARTS = 4
# Smallest mean magnitude that is told from zero.
_LEAST = 2.0**-12
# Sums of factors below which entries may be sparse; the first means none.
_THRESHOLDS = (-(2**10), -8, -6, -4, -2, 0, 2)


@dataclass(frozen=True)
class RiceCode:
    """A coded tensor.

    Where entries are expected to be nearly all zero, only the others are coded, and the distances between them.

    :ivar first: factors of the first index ``(A,)``, in quarters of a bit, ``int8``.
    :ivar last: factors of the last index ``(C,)``.
    :ivar quotients: zeros and ones of all quotients, eight in a byte.
    :ivar remainders: plain bits, eight in a byte.
    :ivar shape: of the tensor.
    :ivar threshold: sum of factors below which entries are sparse.
    :ivar num_sparse: entries of these that are not zero.
    :ivar gap_bits: plain bits of a distance.
    """

    first: Array
    last: Array
    quotients: Array
    remainders: Array
    shape: tuple[int, ...]
    threshold: int
    num_sparse: int
    gap_bits: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in (self.first, self.last, self.quotients, self.remainders))

    @property
    def sums_N(self) -> Array:
        """Sum of the factors of each entry, in quarters of a bit."""
        sums_AC = self.first.astype(np.int64)[:, None] + self.last.astype(np.int64)[None, :]
        between = math.prod(self.shape) // sums_AC.size
        return np.repeat(sums_AC[:, None, :], between, 1).reshape(-1)


def encode(values: Array) -> RiceCode:
    """The shortest code of integers of 8 or 16 bits, of two dimensions or more and with one entry or more."""
    magnitude_ABC = np.abs(values.astype(np.int64)).reshape(values.shape[0], -1, values.shape[-1])
    mean = max(float(magnitude_ABC.mean()), _LEAST)
    # Plain bits that suit a geometric distribution of that mean: the sign is one more.
    first_A = _quarters(2 * magnitude_ABC.mean((1, 2)))
    last_C = _quarters(magnitude_ABC.mean((0, 1)) / mean)
    return min((_encoded(values, first_A, last_C, t) for t in _THRESHOLDS), key=lambda code: code.num_bytes)


def _encoded(values: Array, first_A: Array, last_C: Array, threshold: int) -> RiceCode:
    empty = np.zeros(0, np.uint8)
    code = RiceCode(first_A, last_C, empty, empty, values.shape, threshold, 0, 0)
    wide_N = values.astype(np.int64).reshape(-1)
    folded_N = (wide_N << 1) ^ (wide_N >> 63)
    is_sparse_N = code.sums_N < threshold
    sparse_M = folded_N[is_sparse_N]
    places_K = np.flatnonzero(sparse_M)
    gaps_K = np.diff(places_K, prepend=-1) - 1
    gap_bits = int(max(0, round(math.log2(max(1.0, 0.7 * float(gaps_K.mean() if len(gaps_K) else 0.0))))))
    dense_bits = _plain_bits(code.sums_N[~is_sparse_N])
    bits_E = np.concatenate([dense_bits, np.zeros(len(gaps_K), np.int64), np.full(len(gaps_K), gap_bits)])
    entries_E = np.concatenate([folded_N[~is_sparse_N], sparse_M[places_K] - 1, gaps_K])
    ends_E = np.cumsum((entries_E >> bits_E) + 1)
    quotients = np.zeros(int(ends_E[-1]) if len(ends_E) else 0, np.uint8)
    quotients[ends_E - 1] = 1
    starts_E = np.cumsum(bits_E) - bits_E
    remainders = np.zeros(int(bits_E.sum()), np.uint8)
    for bit in range(int(bits_E.max(initial=0))):
        has_bit_E = bits_E > bit
        remainders[starts_E[has_bit_E] + bit] = entries_E[has_bit_E] >> bit & 1
    return replace(
        code,
        quotients=np.packbits(quotients),
        remainders=np.packbits(remainders),
        num_sparse=len(gaps_K),
        gap_bits=gap_bits,
    )


def _plain_bits(sums: Array) -> Array:
    bits: Array = np.clip(sums, 0, _PARTS * _MOST_BITS) // _PARTS
    return bits


def _quarters(means: Array) -> Array:
    quarters: Array = np.clip(np.round(_PARTS * np.log2(np.maximum(means, _LEAST))), -60, 60).astype(np.int8)
    return quarters


def nodes(name: str, code: RiceCode) -> tuple[dict[str, Array], list[Any]]:
    """Initialisers by name, and nodes that make ``name`` of them, as ``int32`` of the tensor's shape."""
    graph = _Nodes(name)
    sums_N = _sums(graph, code)
    is_dense_N = graph.add("GreaterOrEqual", sums_N, graph.scalar(code.threshold))
    size, num_dense = len(code.sums_N), int((code.sums_N >= code.threshold).sum())
    dense_D = graph.where_true(is_dense_N, size, num_dense)
    clipped_N = graph.add("Clip", sums_N, graph.scalar(0), graph.scalar(_PARTS * _MOST_BITS))
    bits_D = graph.add("Gather", graph.add("Div", clipped_N, graph.scalar(_PARTS)), dense_D)
    num_sparse = code.num_sparse
    bits_E = graph.add(
        "Concat", bits_D, graph.repeated(0, num_sparse), graph.repeated(code.gap_bits, num_sparse), axis=0
    )
    entries_E = _entries(graph, code, bits_E, num_dense + 2 * num_sparse)
    zeros_N = graph.add("Sub", sums_N, sums_N)
    split = graph.split(entries_E, num_dense, num_sparse)
    folded_N = graph.add("ScatterElements", zeros_N, dense_D, split[0])
    if num_sparse:
        sparse_M = graph.where_true(graph.add("Not", is_dense_N), size, size - num_dense)
        steps_K = graph.add("Add", split[2], graph.scalar(1))
        places_K = graph.add("Sub", graph.add("CumSum", steps_K, graph.scalar(0)), graph.scalar(1))
        at_K = graph.add("Gather", sparse_M, places_K)
        folded_N = graph.add("ScatterElements", folded_N, at_K, graph.add("Add", split[1], graph.scalar(1)))
    half_N = graph.add("Div", graph.add("Add", folded_N, graph.scalar(1)), graph.scalar(2))
    is_odd_N = graph.add("Mod", folded_N, graph.scalar(2))
    sign_N = graph.add("Sub", graph.scalar(1), graph.add("Mul", is_odd_N, graph.scalar(2)))
    graph.add("Reshape", graph.add("Mul", half_N, sign_N), graph.ints(code.shape), output=name)
    return graph.initializers, graph.made


def _sums(graph: _Nodes, code: RiceCode) -> str:
    """Sum of the factors of each entry."""
    first_A1 = graph.add("Unsqueeze", graph.whole(code.first, "first"), graph.ints([1]))
    sums_AC = graph.add("Add", first_A1, graph.whole(code.last, "last"))
    sums_A1C = graph.add("Unsqueeze", sums_AC, graph.ints([1]))
    between = math.prod(code.shape) // (len(code.first) * len(code.last))
    sums_ABC = graph.add("Expand", sums_A1C, graph.ints([len(code.first), between, len(code.last)]))
    return graph.add("Reshape", sums_ABC, graph.ints([-1]))


def _entries(graph: _Nodes, code: RiceCode, bits_E: str, count: int) -> str:
    """What is coded, from its plain bits."""
    # Where the ones are, and how many zeros are between two of them.
    stream_M = graph.unpacked(code.quotients, "quotients")
    is_end_M = graph.add("Equal", stream_M, graph.constant(np.array(1, np.uint8), "one"))
    ends_E = graph.where_true(is_end_M, 8 * len(code.quotients), count)
    but_last_E = graph.add("Slice", ends_E, graph.ints([0]), graph.ints([-1]))
    before_E = graph.add("Concat", graph.repeated(-1, 1), but_last_E, axis=0)
    quotient_E = graph.add("Sub", graph.add("Sub", ends_E, before_E), graph.scalar(1))
    entries_E = graph.add("Mul", quotient_E, graph.power(bits_E))
    if not len(code.remainders):
        return entries_E
    stream_M = graph.unpacked(code.remainders, "remainders")
    starts_E = graph.add("Sub", graph.add("CumSum", bits_E, graph.scalar(0)), bits_E)
    dense_N = code.sums_N[code.sums_N >= code.threshold]
    for bit in range(max(code.gap_bits, int(_plain_bits(dense_N).max(initial=0)))):
        entries_E = graph.add("Add", entries_E, graph.bit(stream_M, starts_E, bits_E, bit))
    return entries_E


class _Nodes:
    """Nodes of a graph that is being made; values have numbers for names."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.initializers: dict[str, Array] = {}
        self.made: list[Any] = []

    def add(self, operation: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """A node; returns the name of its output."""
        from onnx import helper

        output = f"{self._name}/{len(self.made)}" if output is None else output
        self.made.append(helper.make_node(operation, list(inputs), [output], **attributes))
        return output

    def constant(self, value: Array, name: str) -> str:
        self.initializers[f"{self._name}/{name}"] = value
        return f"{self._name}/{name}"

    def ints(self, values: Any) -> str:
        return self.constant(np.array(values, np.int64), "of_" + "_".join(map(str, values)))

    def repeated(self, value: int, count: int) -> str:
        """``count`` times a number."""
        return self.add("Expand", self.scalar(value), self.ints([count]))

    def where_true(self, condition_N: str, size: int, count: int) -> str:
        """Places of ``count`` of ``size`` entries that are true.

        Not by ``NonZero``, which onnxruntime does not compute when it loads a file, as it does all that has a known
        size.
        """
        from onnx import TensorProto

        rank_N = self.add("CumSum", self.add("Cast", condition_N, to=TensorProto.INT32), self.scalar(0))
        past = self.scalar(count)  # where the places of all others go
        to_N = self.add("Where", condition_N, self.add("Sub", rank_N, self.scalar(1)), past)
        ones_N = self.repeated(1, size)
        place_N = self.add("Sub", self.add("CumSum", ones_N, self.scalar(0)), self.scalar(1))
        found = self.add("ScatterElements", self.repeated(0, count + 1), to_N, place_N)
        return self.add("Slice", found, self.ints([0]), self.ints([count]))

    def split(self, entries_E: str, num_dense: int, num_sparse: int) -> tuple[str, str, str]:
        """Dense entries, sparse ones, and the distances between these."""
        bounds = (0, num_dense, num_dense + num_sparse, num_dense + 2 * num_sparse)
        first, second, third = (
            self.add("Slice", entries_E, self.ints([start]), self.ints([stop])) for start, stop in pairwise(bounds)
        )
        return first, second, third

    def scalar(self, value: int) -> str:
        return self.constant(np.array(value, np.int32), f"scalar_{value}")

    def whole(self, value: Array, name: str) -> str:
        """A constant of few bits, as ``int32``."""
        from onnx import TensorProto

        return self.add("Cast", self.constant(value, name), to=TensorProto.INT32)

    def unpacked(self, packed: Array, name: str) -> str:
        """The bits of bytes, one after the other, as bytes."""
        shifts = self.constant(np.arange(7, -1, -1, dtype=np.uint8), "shifts")
        bytes_M1 = self.add("Unsqueeze", self.constant(packed, name), self.ints([1]))
        shifted_M8 = self.add("BitShift", bytes_M1, shifts, direction="RIGHT")
        bit_M8 = self.add("BitwiseAnd", shifted_M8, self.constant(np.array(1, np.uint8), "one"))
        return self.add("Reshape", bit_M8, self.ints([-1]))

    def power(self, bits_N: str) -> str:
        """Two to the power of these, which are at most 15."""
        table = self.constant(2 ** np.arange(_MOST_BITS + 1, dtype=np.int32), "powers")
        return self.add("Gather", table, bits_N)

    def bit(self, stream_M: str, starts_N: str, bits_N: str, bit: int) -> str:
        """What one plain bit adds to the entries that have it."""
        from onnx import TensorProto

        has_bit_N = self.add("Greater", bits_N, self.scalar(bit))
        place_N = self.add("Add", starts_N, self.scalar(bit))
        safe_N = self.add("Where", has_bit_N, place_N, self.scalar(0))
        taken_N = self.add("Cast", self.add("Gather", stream_M, safe_N), to=TensorProto.INT32)
        weighted_N = self.add("Mul", taken_N, self.scalar(2**bit))
        return self.add("Where", has_bit_N, weighted_N, self.scalar(0))
