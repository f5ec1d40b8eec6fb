# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A function of one draw for all draws: how often it is called, with what, and what happens where vmap fails."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pyro_apd.errors import ModelError
from pyro_apd.predictive import vmap_draws
from pyro_apd.predictive.vmap_draws import Footprint, map_draws, parameters_valid, vmap_conditions


@settings(deadline=None)
@given(num_draws=st.integers(1, 12), chunk_size=st.integers(1, 14), differentiable=st.booleans())
def test_chunks(num_draws, chunk_size, differentiable):
    calls = []

    def function(values, vectorised):
        calls.append(vectorised)
        return {"square": values["a"] ** 2, "constant": torch.ones(2), "whole": torch.arange(3), "same": values["a"]}

    a = torch.randn(num_draws, 2, requires_grad=differentiable)
    result = map_draws(function, {"a": a}, num_draws, chunk_size, function)
    assert calls == [True] * -(-num_draws // chunk_size)
    assert_close(result["square"], a**2)
    assert_close(result["constant"], torch.ones(num_draws, 2))
    assert result["whole"].dtype == torch.long
    assert result["square"].requires_grad == differentiable
    before = a.detach().clone()
    with torch.no_grad():
        result["constant"][0] = 5.0
        result["same"].zero_()
    assert (result["constant"][1:] == 1).all(), "draws share memory"
    assert torch.equal(a, before), "a result shares memory with the draws"


def test_no_latents():
    result = map_draws(lambda values, vectorised: {"noise": torch.rand(2)}, {}, 5, 2, model=None)
    assert len(result["noise"].unique()) == 10


def test_one_by_one_says_why_and_validates(caplog):
    seen = []

    def function(values, vectorised):
        seen.append((vectorised, dist.is_validation_enabled()))
        return {"sign": torch.tensor(1 if values["a"] > 0 else -1)}

    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        result = map_draws(function, {"a": torch.tensor([1.0, -1.0])}, 2, 10, function)
    assert result["sign"].tolist() == [1, -1]
    assert seen == [(True, False), (True, False), (False, True), (False, True)]
    assert "Evaluating draws one by one" in caplog.text
    assert "control flow" in caplog.text


def test_an_error_of_the_function_itself_comes_through():
    def function(values, vectorised):
        return {"product": values["a"] @ torch.ones(4)}

    with pytest.raises(RuntimeError, match=r"size mismatch|inconsistent tensor size") as caught:
        map_draws(function, {"a": torch.ones(2, 3)}, 2, 10, function)
    assert "vmap" not in str(caught.value)


def test_a_model_error_is_not_tried_again():
    calls = []

    def function(values, vectorised):
        calls.append(vectorised)
        raise ModelError("as written")

    with pytest.raises(ModelError, match="as written"):
        map_draws(function, {}, 2, 1, function)
    assert calls == [True]


@pytest.mark.parametrize("validate", [False, True])
def test_conditions_are_lifted_after_an_error(validate):
    def run():
        with vmap_conditions():
            assert not dist.is_validation_enabled()
            raise KeyError("the model's own")

    with pyro.validation_enabled(validate):
        with pytest.raises(KeyError, match="the model's own"):
            run()
        assert dist.is_validation_enabled() == validate


def test_footprint_counts_the_largest_new_result(monkeypatch):
    x = torch.randn(10, 6)
    with Footprint() as footprint:
        hidden = x.flatten(1) @ torch.ones(6, 3)  # a view of the data costs nothing a draw
        hidden.relu().sum()
    assert footprint.largest == 10 * 3 * 4
    monkeypatch.setattr(vmap_draws, "_CHUNK_BYTES", vmap_draws._ALIVE * 120 * 7)
    assert footprint.chunk_size(100) == 7
    assert footprint.chunk_size(5) == 5
    assert footprint.chunk_size(100, times=3) == 2
    monkeypatch.setattr(vmap_draws, "_CHUNK_BYTES", 1)
    assert footprint.chunk_size(100) == 1


@pytest.mark.parametrize(
    ("make", "good"),
    [
        (lambda: dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])), True),
        (lambda: dist.Normal(torch.zeros(2), torch.tensor([1.0, -2.0])), False),
        (lambda: dist.Normal(torch.tensor([0.0, torch.nan]), 1.0).to_event(1), False),
        (lambda: dist.Categorical(logits=torch.tensor([0.0, torch.nan])).mask(True), False),
        (lambda: dist.LogNormal(0.0, -1.0), False),
        (lambda: dist.Dirichlet(torch.ones(3)).expand([4]), True),
        (lambda: dist.Delta(torch.zeros(3)), True),
    ],
)
def test_parameters_are_held_to_what_a_validating_constructor_accepts(make, good):
    if not good:
        with pytest.raises(ValueError, match="constraint"):
            make()
    with pyro.validation_enabled(False):
        fn = make()
    assert bool(parameters_valid(fn)) == good
