# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The one reader of draws: what users give as a posterior, and what is refused."""

from itertools import pairwise

import hypothesis.strategies as st
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given

from pyro_apd.chains import MCMC
from pyro_apd.chains.stores.base import MemoryStore
from pyro_apd.generators import PaperGenerator
from pyro_apd.kernels import SGLD
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import (
    DrawSource,
    all_finite,
    check_chunk_size,
    check_draws,
    evenly_spaced,
    kernel_of,
    read_chains,
    read_draws,
    run_arguments,
    spread_draws,
    take_draws,
)
from tests.support.small_posteriors import StubMCMC

BY_CHAIN = {"a": torch.arange(24.0).reshape(2, 6, 2), "b": torch.arange(12.0).reshape(2, 6)}
POOLED = {name: value.flatten(0, 1) for name, value in BY_CHAIN.items()}


def generator():
    return DistilledPosterior(Layout({"a": (2,), "b": ()}), PaperGenerator(3, 2, 4))


def line(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w * x, 1.0), obs=x)


def driver(cls, kernel=None):
    kernel = pyro.infer.NUTS(line) if kernel is None else kernel
    return cls(kernel, num_samples=3, warmup_steps=1, disable_progbar=True)


def store():
    layout = Layout({"a": (2,), "b": ()})
    kept = MemoryStore(layout, 2, 6, torch.zeros(3))
    theta_CSD = torch.cat([BY_CHAIN["a"], BY_CHAIN["b"].unsqueeze(-1)], -1)
    for step in range(6):
        kept.write(0, step, theta_CSD[:, step], dict.fromkeys(("potential", "grad_norm", "step_size"), torch.zeros(2)))
    return kept


class OnDemand:
    """A sampler of a user's own, with the least it must have."""

    def get_samples(self, num_samples):
        return {"a": torch.randn(5 if num_samples is None else num_samples, 2)}


@pytest.mark.parametrize("make", [lambda: StubMCMC(BY_CHAIN, None), store])
def test_chains_of_a_run_and_of_a_store(make):
    chains = read_chains(make())
    assert (chains.num_chains, chains.num_draws, chains.num_bytes, chains.bytes_per_draw) == (2, 6, 144, 12)
    for name, value in BY_CHAIN.items():
        assert torch.equal(chains.values[name], value)
        assert torch.equal(read_draws(make())[name], POOLED[name])
    assert chains.pooled([1, 4])["b"].tolist() == [1, 4, 7, 10]
    assert chains.at([1, 0], [0, 5])["b"].tolist() == [6, 5]


def test_the_name_of_chains_is_that_of_their_kernel():
    assert read_chains(StubMCMC(BY_CHAIN, None)).name == "SGLD"
    assert read_chains(store()).name == "MemoryStore"
    assert read_chains(POOLED).name == "chain"


def test_the_form_of_a_dict_is_told_by_the_shape_of_a_draw():
    assert read_chains(BY_CHAIN, shapes={"a": (2,), "b": ()}).num_chains == 2
    assert read_chains(BY_CHAIN, group_by_chain=True).num_chains == 2
    assert read_chains(BY_CHAIN, shapes={"a": (6, 2), "b": (6,)}).num_chains == 1
    assert read_chains(BY_CHAIN).num_draws == 2
    # One site of another form, and it is not by chain.
    assert read_chains({"a": torch.zeros(4, 5, 2), "b": torch.zeros(4)}, shapes={"a": (5, 2), "b": ()}).num_chains == 1


@pytest.mark.parametrize("make", [lambda: StubMCMC(BY_CHAIN, None), store, lambda: POOLED])
def test_spread_draws_of_chains_are_evenly_spaced(make):
    found = spread_draws(make(), 4, seed=0)
    expected = [1, 4, 7, 10] if make() is not POOLED else list(range(12))
    assert found["b"].tolist() == expected


def test_draws_of_a_generator_are_fresh_and_follow_the_seed():
    posterior = generator()
    streamed = spread_draws(posterior, 4, seed=3)
    assert isinstance(streamed, DrawSource)
    assert torch.equal(streamed.part(0, 4)["a"], posterior.get_samples(4, seed=3)["a"])
    before = torch.get_rng_state()
    first = read_draws(posterior, 4, seed=1)["a"]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, read_draws(posterior, 4, seed=1)["a"])
    assert not torch.equal(first, read_draws(posterior, 4, seed=2)["a"])
    assert len(read_draws(posterior)["a"]) == posterior.num_samples
    assert not first.requires_grad


def test_a_sampler_of_ones_own_needs_a_number_only():
    assert len(read_draws(OnDemand())["a"]) == 5
    assert len(read_draws(OnDemand(), 7)["a"]) == len(take_draws(OnDemand(), 7)["a"]) == 7
    assert len(spread_draws(OnDemand(), 7, seed=0)["a"]) == 7
    with pytest.raises(TypeError, match=r"`mcmc` must be an MCMC after run.*OnDemand does not group by chain"):
        read_chains(OnDemand())


def test_a_part_of_a_dict_is_spread_evenly_over_its_chains():
    """Chains follow each other in a dict, so that its first draws are all of one chain."""
    assert read_draws(POOLED, 3)["b"].tolist() == [2, 6, 10]
    assert read_draws(POOLED, 4)["a"].tolist() == POOLED["a"][[1, 4, 7, 10]].tolist()
    assert read_draws(POOLED, 99)["b"].tolist() == read_draws(POOLED)["b"].tolist() == list(range(12))


READERS = [
    read_chains,
    read_draws,
    lambda source: take_draws(source, 3),
    lambda source: spread_draws(source, 3, seed=0),
]


@pytest.mark.parametrize("read", READERS)
def test_what_holds_no_draws_is_refused_by_every_reader(read):
    for source in (3, [1.0], None):
        with pytest.raises(TypeError, match=r"must be an MCMC after run\(\).*get_samples.* got (int|list|NoneType)"):
            read(source)
    for make in (driver(pyro.infer.MCMC), driver(MCMC, SGLD(line, 0.1)), StubMCMC(BY_CHAIN, None)):
        make._samples = None
        with pytest.raises(ValueError, match=r"has no draws yet: call mcmc\.run"):
            read(make)
    for source, message in (
        ({}, "at least one site"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, r"different numbers of draws.*'a': 3, 'b': 4"),
        ({"a": torch.zeros(0, 2)}, "zero draws"),
        ({"a": torch.tensor(1.0)}, r"\['a'\]` must be a tensor with the draws.*shape \(\)"),
        ({"a": [1.0, 2.0]}, "got list"),
    ):
        with pytest.raises(ValueError, match=message):
            read(source)


@pytest.mark.parametrize("read", [read_chains, read_draws, lambda source: spread_draws(source, 3, seed=0)])
def test_draws_that_are_not_finite_are_counted_by_site(read):
    spoiled = POOLED["a"].clone()
    spoiled[3, 0], spoiled[5, 1] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="site 'a' hold 2 NaN or infinite numbers"):
        read({**POOLED, "a": spoiled})
    assert read({"count": torch.arange(5)}) is not None


def test_chains_that_sites_disagree_about():
    with pytest.raises(ValueError, match=r"different numbers of chains and draws: .*\(2, 6\).*\(2, 5\)"):
        read_chains({**BY_CHAIN, "b": torch.zeros(2, 5)}, "source", group_by_chain=True)
    with pytest.raises(ValueError, match=r"`source\['b'\]` must be a tensor with chains and draws.*\(C, S, \.\.\.\)"):
        read_chains({**BY_CHAIN, "b": torch.zeros(2)}, "source", group_by_chain=True)


@pytest.mark.parametrize("make", [lambda: driver(pyro.infer.MCMC), lambda: driver(MCMC, SGLD(line, 0.1, seed=0))])
def test_what_is_read_of_pyros_driver_is_still_there(make):
    """Draws and arguments are in private attributes: a Pyro that has them elsewhere must be noticed here."""
    mcmc, x = make(), torch.ones(4)
    assert mcmc._samples is None
    assert run_arguments(mcmc) is None
    mcmc.run(x)
    args, kwargs = run_arguments(mcmc)
    assert args[0] is x
    assert (len(args), kwargs) == (1, {})
    assert kernel_of(mcmc).model is line
    assert torch.equal(mcmc._samples["w"], read_chains(mcmc).values["w"])


def test_without_pyros_private_attributes():
    """The public face is enough: a run without draws is refused, and its arguments count as unknown."""

    class Bare:
        def __init__(self, draws):
            self.draws = draws

        def get_samples(self, num_samples=None, group_by_chain=False):
            return self.draws

    assert run_arguments(Bare(BY_CHAIN)) is None
    assert kernel_of(Bare(BY_CHAIN)) is None
    assert read_chains(Bare(BY_CHAIN)).num_chains == 2
    for read in READERS:
        with pytest.raises(ValueError, match="has no draws yet"):
            read(Bare(None))


@given(st.integers(1, 300), st.integers(1, 300))
def test_evenly_spaced_indices(available, wanted):
    index = evenly_spaced(available, wanted)
    assert len(index) == min(available, wanted) == len(set(index))
    assert set(index) <= set(range(available))
    gaps = [b - a for a, b in pairwise(index)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    # As far from one end as from the other, to the rounding.
    assert abs(index[0] - (available - 1 - index[-1])) <= 1


def test_chunk_sizes():
    for accepted in (None, 1, 7):
        check_chunk_size(accepted)
    for refused in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"chunk_size=.* must be a positive integer.*None"):
            check_chunk_size(refused)


def test_number_of_draws():
    assert check_draws({"a": torch.ones(3, 2), "b": torch.ones(3)}) == 3
    with pytest.raises(ValueError, match="`samples` must be a dict"):
        check_draws(None, "samples")


def test_a_choice_of_stored_draws_keeps_sites_together():
    draws = {"a": torch.arange(30.0), "b": -torch.arange(30.0)}
    chosen = take_draws(draws, 10, seed=1)
    assert (chosen["a"].diff() > 0).all(), "in their order, each once"
    assert len(chosen["a"]) == 10
    assert torch.equal(chosen["a"], -chosen["b"])
    assert torch.equal(chosen["a"], take_draws(draws, 10, seed=1)["a"])
    assert not torch.equal(chosen["a"], take_draws(draws, 10, seed=2)["a"])
    assert torch.equal(take_draws(draws, 31)["a"], draws["a"])


def test_fresh_draws_of_a_generator_leave_the_global_generator_alone():
    layout = Layout({"a": (3,)})
    posterior = DistilledPosterior(layout, PaperGenerator(3, 2, 4))
    before = torch.get_rng_state()
    first = take_draws(posterior, 5, seed=1)["a"]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, take_draws(posterior, 5, seed=1)["a"])
    assert not torch.equal(take_draws(posterior, 5)["a"], take_draws(posterior, 5)["a"])


@pytest.mark.parametrize("shape", [(), (7,), (1, 50, 4), (3, 40, 2), (0, 3)])
def test_all_finite(shape, monkeypatch):
    monkeypatch.setattr("pyro_apd.predictive.draws._BLOCK_BYTES", 40)
    values = torch.zeros(shape)
    assert all_finite(values)
    for place in range(values.numel()):
        values.view(-1)[place] = torch.nan
        assert not all_finite(values)
        values.view(-1)[place] = 0.0
