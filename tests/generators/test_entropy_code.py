# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A code gives back its tensors, is about as short as their entropy, and is refused where it is damaged."""

import itertools
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyro_apd.generators import entropy_tables
from pyro_apd.generators.entropy_code import Coded, CodeError, decode, encode, shares

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = st.sampled_from([np.int8, np.int16]).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))


def coded(tensors):
    return [Coded(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def assert_same(found, tensors):
    assert len(found) == len(tensors)
    for one, other in zip(found, tensors, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)


def laplace(scale, *shape, dtype=torch.int8, seed=0):
    """Integers as they occur: mostly small."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return (-scale * uniform.sign() * (1 - 2 * uniform.abs()).log()).round().clamp(-127, 127).to(dtype)


@given(st.lists(ARRAYS, max_size=3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_tensors_come_back(arrays):
    tensors = [torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)) for array in arrays]
    code = encode(tensors)
    assert_same(decode(code, coded(tensors)), tensors)
    assert encode(tensors) == code


def test_tensors_come_back_whatever_the_blocks(monkeypatch):
    rows = torch.tensor([0.02, 0.5, 4.0, 3000.0])[:, None, None]
    wide = (rows * torch.randn(4, 50, 30, generator=torch.Generator().manual_seed(1))).round().clamp(-32768, 32767)
    tensors = [wide.to(torch.int16), laplace(2.0, 7, 111), torch.tensor([-32768, 32767], dtype=torch.int16)]
    whole = encode(tensors)
    monkeypatch.setattr(entropy_tables, "_BLOCK", 97)
    assert encode(tensors) == whole
    assert_same(decode(whole, coded(tensors)), tensors)


def test_a_tensor_that_is_not_contiguous_comes_back():
    tensor = laplace(3.0, 20, 30)[:, ::2].mT
    assert_same(decode(encode([tensor]), coded([tensor])), [tensor])


@pytest.mark.parametrize("scale", [0.15, 0.5, 2.0, 20.0])
def test_the_size_is_near_the_entropy(scale):
    values = laplace(scale, 1, 200, 400)
    shares = torch.bincount(values.flatten().long() + 128).double() / values.numel()
    entropy = float(-torch.special.xlogy(shares, shares).sum()) / math.log(2)
    assert 8 * len(encode([values])) / values.numel() < 1.02 * entropy + 0.1


def test_rows_and_columns_of_different_sizes_have_tables_of_their_own():
    """Shuffled, the same integers take more."""
    by_row = torch.tensor([0.1, 1.0, 10.0])[:, None, None] * torch.linspace(0.2, 2, 64)
    values = (by_row * laplace(1.0, 3, 100, 64).double()).round().to(torch.int8)
    shuffled = values.flatten()[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))]
    assert len(encode([values])) < 0.85 * len(encode([shuffled.view(3, 100, 64)]))


def test_zeros_take_next_to_nothing():
    assert len(encode([torch.zeros(4, 100, 100, dtype=torch.int16)])) < 400


def test_shares_are_what_tensors_take_alone():
    tensors = [laplace(0.5, 1, 100, 60), laplace(300.0, 1, 100, 60, dtype=torch.int16), torch.zeros(2, 30, 4).char()]
    code = encode(tensors)
    found = shares(code, coded(tensors))
    assert sum(found) == pytest.approx(len(code))
    for share, tensor in zip(found, tensors, strict=True):
        assert share == pytest.approx(len(encode([tensor])), rel=0.05, abs=150)


EXAMPLE = [laplace(1.5, 3, 10, 20), laplace(40.0, 2, 30, dtype=torch.int16, seed=1)]
CODE = encode(EXAMPLE)


@given(st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_damaged_code_is_refused_or_gives_other_integers(data):
    changed = bytearray(CODE)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(CODE) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed) - 1)) :]
    try:
        found = decode(bytes(changed), coded(EXAMPLE))
    except CodeError:
        return
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in EXAMPLE]


def rebuilt(side=None, plain=None, escaped=None, words=None):
    """The example with other parts."""
    sizes = struct.unpack("<4I", CODE[:16])
    parts, start = [], 16
    for size, part in zip(sizes, (side, plain, escaped, words), strict=True):
        parts.append(CODE[start : start + size] if part is None else part)
        start += size
    return struct.pack("<4I", *map(len, parts)) + b"".join(parts)


def other_side(change):
    (length,) = struct.unpack("<I", CODE[:4])
    text = bytearray(zlib.decompress(CODE[16 : 16 + length]))
    change(text)
    return zlib.compress(bytes(text), 9)


NUM_FACTORS = 3 + 20 + 2 + 30  # before the lengths of the tables, two bytes each


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"", "too short"),
        (CODE[:-1], "do not add up"),
        (rebuilt(side=b"abc"), "is damaged"),
        (rebuilt(side=zlib.compress(bytes(10**6))), "not one of these integers"),
        (rebuilt(side=zlib.compress(b"")), "not one of these integers"),
        (rebuilt(side=CODE[16:40]), "not one of these integers"),
        (rebuilt(side=other_side(lambda text: text.__setitem__(NUM_FACTORS + 1, 9))), "tables .* are damaged"),
        (rebuilt(side=other_side(lambda text: text.__setitem__(-1, text[-1] ^ 1))), "frequencies .* are damaged"),
        (rebuilt(side=other_side(lambda text: text.__setitem__(0, 156))), "lacks a table|plain bits|is damaged"),
        (rebuilt(side=other_side(lambda text: None)[:-2]), "not one of these integers"),
        (rebuilt(words=CODE[-struct.unpack("<4I", CODE[:16])[3] :] + bytes(2)), "is damaged"),
        (rebuilt(plain=b""), "number of plain bits"),
        (rebuilt(escaped=b"12"), "other large entries"),
        (rebuilt(words=b"12"), "is cut off"),
        (rebuilt(words=CODE[-len(CODE) // 4 :]), "cut off|damaged"),
    ],
)
def test_what_is_wrong_is_said(code, message):
    with pytest.raises(CodeError, match=message):
        decode(code, coded(EXAMPLE))


def test_a_code_of_larger_integers_is_refused():
    large = torch.full((2, 3), 1000, dtype=torch.int16)
    with pytest.raises(CodeError, match=r"do not fit into torch\.int8"):
        decode(encode([large]), [Coded((2, 3), torch.int8)])


def documented(code, shapes):
    """Integers of a code, entry by entry, by ``docs/format.md``."""
    sizes = struct.unpack("<4I", code[:16])
    ends = list(itertools.accumulate(sizes, initial=16))
    side, plain, escaped, words = (code[a:b] for a, b in itertools.pairwise(ends))
    side = zlib.decompress(side)
    classes = []
    for shape in shapes:
        a, b, c = (shape[0], math.prod(shape[1:-1]), shape[-1]) if len(shape) > 1 else (1, 1, math.prod(shape))
        first, last = struct.unpack(f"{a}b{c}b", side[: a + c])[:a], struct.unpack(f"{a}b{c}b", side[: a + c])[a:]
        side = side[a + c :]
        classes += [min(max(((f + g + 1) >> 1) + 12, 0), 35) for f in first for _ in range(b) for g in last]
    lengths, side, tables = struct.unpack("<36H", side[:72]), side[72:], []
    for length in lengths:
        tables.append(struct.unpack(f"<{length}H", side[: 2 * length]))
        side = side[2 * length :]
    lanes = max(1, -(-len(classes) // 2048))
    states = list(struct.unpack(f"<{lanes}I", words[: 4 * lanes]))
    words = iter(struct.unpack(f"<{len(words[4 * lanes :]) // 2}H", words[4 * lanes :]))
    large = iter(struct.unpack(f"<{len(escaped) // 2}H", escaped))
    folded, widths = [], []
    for i, q in enumerate(classes):
        slot, x = states[i % lanes] % 4096, states[i % lanes]
        starts = list(itertools.accumulate(tables[q], initial=0))
        symbol = next(s for s in range(len(tables[q])) if starts[s] <= slot < starts[s + 1])
        x = tables[q][symbol] * (x >> 12) + slot - starts[symbol]
        states[i % lanes] = 65536 * x + next(words) if x < 65536 else x
        widths.append(0 if symbol == 255 else max((q - 18) >> 1, 0))
        folded.append(next(large) if symbol == 255 else symbol << widths[-1])
    assert (next(words, None), next(large, None), set(states)) == (None, None, {65536})
    bits = (byte >> place & 1 for byte in plain for place in range(7, -1, -1))
    for bit in range(max(widths)):
        for i, width in enumerate(widths):
            folded[i] += next(bits) << bit if width > bit else 0
    assert not any(bits)
    return [f // 2 if f % 2 == 0 else -(f + 1) // 2 for f in folded]


def test_the_code_is_as_documented():
    """Other readers rest on these bytes."""
    wide = torch.tensor([0.1, 3.0, 3000.0])[:, None, None] * torch.randn(
        3, 40, 9, generator=torch.Generator().manual_seed(1)
    )
    tensors = [wide.round().clamp(-32768, 32767).short(), laplace(2.0, 7, 200), torch.tensor([-300, 7]).short()]
    tensors.append(torch.full((5,), 3, dtype=torch.int8).index_fill(0, torch.tensor(2), 127))
    found = documented(encode(tensors), [tuple(tensor.shape) for tensor in tensors])
    assert found == torch.cat([tensor.flatten().long() for tensor in tensors]).tolist()


def test_factors_are_quarters_of_octaves_of_mean_magnitudes():
    code = encode([torch.tensor([[0, 1, -1, 2], [-2, 0, 0, 300]], dtype=torch.int16)])
    side = zlib.decompress(code[16 : 16 + struct.unpack("<I", code[:4])[0]])
    assert np.frombuffer(side[:6], np.int8).tolist() == [0, 25, -21, -25, -25, 8]
