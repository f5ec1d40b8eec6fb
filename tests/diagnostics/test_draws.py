# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from pyro_apd.diagnostics.draws import (
    draw_posterior,
    draw_shapes,
    evenly_spaced,
    flat,
    kernel_settings,
    posterior_bytes,
    read_chain,
)
from pyro_apd.models.layout import Layout


@given(st.integers(1, 300), st.integers(1, 300))
def test_evenly_spaced_indices(available, wanted):
    index = evenly_spaced(available, wanted)
    assert len(index) == min(available, wanted) == len(set(index))
    assert set(index) <= set(range(available))
    gaps = [b - a for a, b in pairwise(index)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    # As far from one end as from the other, to the rounding.
    assert abs(index[0] - (available - 1 - index[-1])) <= 1


def test_pooling_keeps_chains_together():
    chain = read_chain({"a": torch.arange(12.0).reshape(2, 6)}, group_by_chain=True)
    assert (chain.num_chains, chain.num_draws, chain.num_bytes, chain.bytes_per_draw) == (2, 6, 48, 4)
    assert chain.pooled([1, 4])["a"].tolist() == [1, 4, 7, 10]


def test_the_form_of_a_dict_is_told_by_the_shape_of_a_draw():
    draws = {"a": torch.zeros(4, 5, 2), "b": torch.zeros(4, 5)}
    assert read_chain(draws, {"a": (2,), "b": ()}).num_chains == 4
    pooled = {"a": torch.zeros(4, 5, 2), "b": torch.zeros(4)}
    assert read_chain(pooled, {"a": (5, 2), "b": ()}).num_chains == 1
    assert read_chain(pooled).num_draws == 4


def test_shapes_without_drawing(case):
    class Shipped:
        layout = Layout({"a": (2, 3)})

        def get_samples(self, num_samples=None):
            raise AssertionError("drew")

    assert draw_shapes(Shipped()) == {"a": (2, 3)}
    assert draw_shapes(case.posterior())["out.weight"] == (3, 4)
    assert draw_shapes({"a": torch.zeros(7, 2)}) == {"a": (2,)}
    assert draw_shapes(None) is None


def test_draws_follow_the_seed_alone(case):
    state = torch.get_rng_state()
    first = draw_posterior(case.posterior(), 5, seed=1)["out.bias"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, draw_posterior(case.posterior(), 5, seed=1)["out.bias"])
    assert not torch.equal(first, draw_posterior(case.posterior(), 5, seed=2)["out.bias"])


def test_bytes(case):
    assert posterior_bytes(case.posterior(num_bytes=77)) == 77
    assert posterior_bytes({"a": torch.zeros(3, 2), "b": torch.zeros(3, dtype=torch.float64)}) == 48
    with pytest.raises(ValueError, match="num_bytes"):
        posterior_bytes(object())


def test_settings_are_what_the_constructor_took(case):
    mcmc = case.StubMCMC(case.chain(2, 5), case.model)
    assert kernel_settings(mcmc) == {
        **{"kernel": "SGLD", "step_size": 1e-3, "temperature": 1.0},
        **{"num_chains": 2, "num_samples": 5},
    }
    assert kernel_settings({}) == {}


def test_flat_puts_sites_side_by_side():
    theta = flat({"b": torch.zeros(3), "a": torch.ones(3, 2, 2)}, ["a", "b"])
    assert theta.tolist() == [[1, 1, 1, 1, 0]] * 3
