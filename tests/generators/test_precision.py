# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_apd.generators import precision

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
# Largest error of an entry, relative to the largest of its row.
ERROR = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.51 / 127}


def tensors(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    rows = torch.logspace(-3, 2, 12).unsqueeze(1)
    return {
        "basis": scale * rows * torch.randn(12, 700, generator=generator),
        "location": torch.randn(700, generator=generator),
        "small": torch.randn(6, 30, generator=generator),
        "count": torch.tensor([3, 4]),
    }


def rounded(values, dtype):
    return precision.decode(precision.encode(values, dtype), dtype)


@pytest.mark.parametrize("dtype", precision.DTYPES)
def test_what_is_lost(dtype):
    values = tensors()
    again = rounded(values, dtype)
    assert set(again) == set(values)
    for name in ("basis", "location", "small"):
        error = (again[name] - values[name]).abs().amax(-1) / values[name].abs().amax(-1)
        assert float(error.max()) <= ERROR[dtype if name == "basis" or dtype != "int8" else "float16"]
        assert again[name].dtype == torch.float32
    assert torch.equal(again["count"], values["count"])


@pytest.mark.parametrize("dtype", precision.DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e-36, 1e6])
def test_what_was_rounded_stays_as_it_is(dtype, scale):
    once = precision.encode(tensors(scale), dtype)
    again = precision.encode(precision.decode(once, dtype), dtype)
    assert set(once) == set(again)
    for name, value in once.items():
        assert value.dtype == again[name].dtype
        assert torch.equal(value, again[name])


@pytest.mark.parametrize("dtype", precision.DTYPES)
def test_bytes_a_number(dtype):
    stored = precision.encode(tensors(), dtype)
    assert stored["basis"].element_size() == BYTES[dtype]
    assert stored["location"].element_size() == max(2, BYTES[dtype])
    assert stored["count"].dtype == torch.int64
    assert set(stored) - set(tensors()) == ({"basis#scale"} if dtype == "int8" else set())


def test_integers_are_known_exactly():
    values = torch.zeros(2, 8192)
    values[0, :3] = torch.tensor([127.0, -64.0, 0.6])
    stored = precision.encode({"a": values}, "int8")
    assert stored["a"][0, :4].tolist() == [127, -64, 1, 0]
    assert stored["a#scale"].tolist() == [1.0, 0.0]
    assert precision.decode(stored, "int8")["a"][1].abs().max() == 0


def test_numbers_beyond_float16_keep_their_digits():
    values = {"large": torch.tensor([1e5, 1.0]), "tiny": torch.tensor([1e-6, 3e-7]), "zero": torch.zeros(3)}
    stored = precision.encode(values, "float16")
    assert {name: value.dtype for name, value in stored.items()} == {
        "large": torch.float32,
        "tiny": torch.float32,
        "zero": torch.float16,
    }
    assert torch.equal(stored["large"], values["large"])


@given(exponent=st.floats(-4.5, 0.0), share=st.floats(-5.9, 0.0))
def test_small_scales_beside_large_ones_do_not_become_zero(exponent, share):
    values = 10**exponent * torch.tensor([1.0, 10**share])
    narrow = precision.decode(precision.encode({"a": values}, "float16"), "float16")["a"]
    torch.testing.assert_close(narrow, values, atol=0, rtol=0.07)


def test_double_precision_is_kept_by_float32_only():
    values = {"a": torch.randn(3, 9000, dtype=torch.float64)}
    assert precision.encode(values, "float32")["a"].dtype == torch.float64
    for dtype in ("float16", "bfloat16", "int8"):
        assert rounded(values, dtype)["a"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float64", "", None, torch.float16, 8])
def test_unknown_precisions(dtype):
    for function in (precision.encode, precision.decode):
        with pytest.raises(ValueError, match="'float32', 'float16', 'bfloat16', 'int8'; got"):
            function({}, dtype)


def test_products_are_exact():
    """Of scales with 16 significant bits, which is what makes the way back exact."""
    values = {"a": torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))}
    stored = precision.encode(values, "int8")
    exact = stored["a"].double() * stored["a#scale"].double().unsqueeze(1)
    assert torch.equal(precision.decode(stored, "int8")["a"].double(), exact)
