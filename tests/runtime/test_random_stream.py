# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import threading

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from pyro_apd.predictive.vmap_draws import _FreshNoise, vmap_conditions
from pyro_apd.runtime import random_stream
from pyro_apd.runtime.random_stream import RandomStream
from tests.support.processes import on_ranks

HALVES = torch.full((3, 4), 0.5)
DRAWN = {
    "randn": lambda: torch.randn(3),
    "rand_like": lambda: torch.rand_like(HALVES) + torch.randn_like(HALVES) + torch.randint_like(HALVES, 2, 9),
    "randperm": lambda: torch.randperm(9) + torch.randint(5, (9,)),
    "normal": lambda: dist.Normal(HALVES, 1.0)(),
    "gamma": lambda: dist.Gamma(HALVES, HALVES)(),
    "dirichlet": lambda: dist.Dirichlet(HALVES)(),
    "categorical": lambda: dist.Categorical(HALVES)(),
    "bernoulli": lambda: dist.Bernoulli(HALVES)(),
    "poisson": lambda: dist.Poisson(HALVES)() + dist.Binomial(3, HALVES)(),
    "student": lambda: dist.StudentT(3 * HALVES)() + dist.HalfCauchy(HALVES)() + dist.Exponential(HALVES)(),
    "linear": lambda: nn.Linear(3, 4).weight + nn.init.orthogonal_(torch.empty(4, 3)),
    "dropout": lambda: functional.dropout(HALVES) + nn.AlphaDropout()(HALVES),
    "lstm": lambda: nn.LSTM(4, 4, 2, dropout=0.5)(HALVES)[0],
    "attention": lambda: nn.MultiheadAttention(4, 2, dropout=0.5)(HALVES, HALVES, HALVES)[0],
    "gumbel": lambda: functional.gumbel_softmax(HALVES) + nn.RReLU()(-HALVES),
    "svd": lambda: torch.svd_lowrank(HALVES + torch.eye(3, 4))[0],
    "loader": lambda: torch.cat([row for (row,) in DataLoader(TensorDataset(torch.arange(9)), shuffle=True)]),
    "split": lambda: torch.tensor(random_split(range(9), [4, 5])[0].indices),
}


@pytest.mark.parametrize("name", DRAWN)
def test_numbers_are_those_after_manual_seed_and_the_global_generator_stays(name):
    torch.manual_seed(5)
    expected, after = DRAWN[name](), torch.rand(2)
    state = torch.get_rng_state()
    with RandomStream(5):
        assert torch.equal(DRAWN[name](), expected)
        assert torch.equal(torch.rand(2), after)
    assert torch.equal(torch.get_rng_state(), state)


VECTORISED = {
    "like": lambda _: torch.rand_like(HALVES[0]) + torch.randn_like(HALVES[0]),
    "integers": lambda _: torch.randint_like(HALVES[0], 10_000),
    "bernoulli": lambda _: torch.bernoulli(HALVES),
    "gamma": lambda _: dist.Gamma(HALVES[0], 1.0)(),
    "dropout": lambda _: functional.dropout(torch.ones(30)),
    "laplace": lambda _: dist.Laplace(HALVES[0], 1.0)(),
    "cauchy": lambda _: dist.HalfCauchy(HALVES[0])(),
}


@pytest.mark.parametrize("name", VECTORISED)
def test_draws_differ_under_vmap(name):
    def draws():
        with vmap_conditions(), _FreshNoise():
            return torch.vmap(VECTORISED[name], randomness="different")(torch.zeros(6, 4))

    torch.manual_seed(5)
    expected = draws()
    with RandomStream(5):
        found = draws()
    assert torch.equal(found, expected)
    assert len(found.flatten(1).unique(dim=0)) == 6


def test_it_goes_on_where_it_stopped_and_an_inner_one_has_its_own_numbers():
    stream = RandomStream(1)
    with stream:
        first = torch.rand(2)
        with RandomStream(2):
            inner = torch.rand(2)
    state = stream.get_state()
    with stream:
        second = torch.rand(2)
    stream.set_state(state)
    with stream:
        assert torch.equal(torch.rand(2), second)
    with RandomStream(1):
        assert torch.equal(torch.rand(4), torch.cat([first, second]))
    with RandomStream(2):
        assert torch.equal(torch.rand(2), inner)


def test_a_generator_that_is_given_is_used():
    with RandomStream(1):
        found = torch.rand(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_another_thread_keeps_its_numbers():
    torch.manual_seed(3)
    expected = torch.rand(40)
    torch.manual_seed(3)
    found = []
    with RandomStream(5):
        thread = threading.Thread(target=lambda: found.append(torch.rand(40)))
        thread.start()
        own = torch.rand(40)
        thread.join()
    assert torch.equal(found[0], expected)
    with RandomStream(5):
        assert torch.equal(torch.rand(40), own)


def test_a_forked_process_does_not_repeat_the_numbers(tmp_path):
    def draw(rank):
        torch.manual_seed(rank)
        return torch.rand(2).tolist()

    with RandomStream(5):
        first, second = on_ranks(draw, 2, tmp_path)
    assert first != second


def test_what_draws_without_a_generator_is_known():
    known = {function.__name__ for function in random_stream._WITHOUT_GENERATOR}
    assert {"dropout", "feature_alpha_dropout", "native_dropout", "lstm", "gru", "gumbel_softmax"} <= known
    assert {"scaled_dot_product_attention", "multi_head_attention_forward", "fractional_max_pool2d"} <= known


def test_the_inner_of_two_streams_gives_the_numbers_of_functions_without_a_generator():
    alone, outer, inner = (RandomStream(seed) for seed in (1, 0, 1))
    x = torch.ones(20)
    with alone:
        wanted = torch.nn.functional.dropout(x)
    before = outer.states()
    with outer, inner:
        assert torch.equal(torch.nn.functional.dropout(x), wanted)
    assert outer.states() == before
    assert inner.states() == alone.states()
