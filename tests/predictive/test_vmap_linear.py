# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Linear layers under vmap give what one layer after another gives, wherever the draws are."""

import itertools

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from pyro_apd.predictive import vmap_linear
from pyro_apd.predictive.vmap_linear import DrawLinear


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("lead", [(7,), (2, 3)])
@pytest.mark.parametrize("where", [w for w in itertools.product([None, 0, 1], repeat=3) if set(w) != {None}])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(lead, where, has_bias):
    operands = [random(*lead, 5), random(4, 5), random(4)][: 3 if has_bias else 2]
    dims = where[: len(operands)]
    if set(dims) == {None}:
        pytest.skip("no draws in any operand")
    stacked = [
        x if d is None else torch.stack([x * (s + 1) for s in range(6)], dim=d)
        for x, d in zip(operands, dims, strict=True)
    ]
    with torch.no_grad(), DrawLinear():
        result = torch.vmap(functional.linear, in_dims=dims)(*stacked)
    expected = [
        functional.linear(*(x if d is None else x * (s + 1) for x, d in zip(operands, dims, strict=True)))
        for s in range(6)
    ]
    assert_close(result, torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_products_of_matrices():
    x, w_S = random(7, 5), random(6, 5, 4)
    with torch.no_grad(), DrawLinear():
        for product in (torch.matmul, lambda x, w: x @ w, torch.mm):
            assert_close(torch.vmap(product, in_dims=(None, 0))(x, w_S), x @ w_S)


def test_layers_in_a_row():
    x, first_S, second_S = random(7, 5), random(6, 3, 5), random(6, 2, 3)

    def network(first, second):
        return functional.linear(functional.linear(x, first).tanh(), second)

    with torch.no_grad(), DrawLinear():
        result = torch.vmap(network)(first_S, second_S)
    assert_close(result, torch.stack([network(a, b) for a, b in zip(first_S, second_S, strict=True)]))


def test_the_same_data_are_one_product(monkeypatch):
    shared, x, w_S, shapes = vmap_linear._shared, random(7, 5), random(6, 4, 5), []
    monkeypatch.setattr(vmap_linear, "_shared", lambda *args: shapes.append(args[1].shape) or shared(*args))
    with torch.no_grad(), DrawLinear():
        torch.vmap(lambda w: functional.linear(x, w))(w_S)
    assert shapes == [(6, 4, 5)]


def test_what_is_no_layer_is_left_alone():
    with torch.no_grad(), DrawLinear():
        assert_close(
            torch.vmap(torch.matmul, in_dims=(None, 0))(random(5), random(6, 5, 4)), random(5) @ random(6, 5, 4)
        )
        assert_close(functional.linear(random(5), random(4, 5)), random(4, 5) @ random(5))
        with pytest.raises(RuntimeError):
            random(3, 5) @ random(4, 3)
