# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of other drivers and kernels, as Pyro's statistics and as a hook, in memory of fixed size."""

import copy

import pyro.infer
import pytest
import torch
from pyro.infer import NUTS
from pyro.infer.mcmc import StreamingMCMC
from pyro.ops.streaming import CountStats

from pyro_apd import MCMC, SGLD, OnlineDistillation, distill
from pyro_apd.distillation.budget import TrainingBudget
from tests.support.models import Conjugate, constrained

pytestmark = pytest.mark.slow

MODEL = Conjugate(num_data=30)
DATA = (MODEL.x, MODEL.y)
OPTIONS = {"num_steps": 0, "seed": 0, "progress": False}


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch):
    """What is tested here does not hang on how finely generators are compared, and that is most of the time."""
    monkeypatch.setattr(
        TrainingBudget, "of", classmethod(lambda cls, *args: cls(num_probes=8, num_evaluation_draws=40))
    )


def online(model=MODEL.full, data=DATA, **options):
    return OnlineDistillation(model, data, **{**OPTIONS, **options})


def sampler(kind):
    return NUTS(MODEL.full) if kind == "nuts" else SGLD(MODEL.full, 5e-3, seed=3)


def buffered(statistics):
    """Draws there are, ``(count, D)`` by chain."""
    return {chain: store.theta_CSD[0, : store.counts[0]] for chain, store in statistics._buffers.items()}


def feed(statistics, num_draws, chains=(0,), shift=0.0):
    generator = torch.Generator().manual_seed(7)
    for _ in range(num_draws):
        value = torch.randn(3, generator=generator)
        statistics.update({(chain, "w"): value + shift + chain for chain in chains})


def same(first, second):
    one, other = first.get_samples(5, seed=1), second.get_samples(5, seed=1)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("kind", ["nuts", "sgld"])
def test_statistics_of_pyros_streaming_driver(kind, num_chains):
    statistics = online(buffer_size=16)
    mcmc = StreamingMCMC(
        sampler(kind), num_samples=20, warmup_steps=5, num_chains=num_chains, statistics=statistics,
        disable_progbar=True,
    )  # fmt: skip
    mcmc.run(*DATA)
    posterior = mcmc.get_statistics()
    metadata = posterior.metadata
    # Every second of 20.
    assert (metadata["num_chains"], metadata["num_draws"], metadata["draws_seen"]) == (num_chains, 10, 20)
    assert (metadata["online"], metadata["space"]) == (True, "functions")
    assert posterior.get_samples(7)["w"].shape == (7, 3)


def test_it_is_the_distillation_of_the_draws_that_it_kept():
    statistics = online(buffer_size=100)
    draws = torch.randn(40, 3)
    for draw_D in draws:
        statistics.update({"w": draw_D})
    assert same(statistics.get(), distill({"w": draws}, MODEL.full, data=DATA, **OPTIONS))


def test_more_draws_change_what_is_given_and_asking_changes_nothing():
    statistics = online(buffer_size=100)
    feed(statistics, 30)
    first = statistics.get()
    assert same(statistics.get(), first)
    feed(statistics, 30, shift=5.0)
    assert not same(statistics.get(), first)
    assert statistics.get().metadata["draws_seen"] == 60


@pytest.mark.parametrize("driver", ["pyro", "sequential", "vectorized"])
def test_as_a_hook_it_sees_what_the_driver_keeps(driver):
    statistics = online(buffer_size=64)
    if driver == "pyro":
        mcmc = pyro.infer.MCMC(NUTS(MODEL.full), 12, warmup_steps=4, hook_fn=statistics.hook, disable_progbar=True)
    else:
        mcmc = MCMC(
            sampler("sgld"), 12, warmup_steps=8, num_chains=3, hook_fn=statistics.hook, chain_method=driver,
            disable_progbar=True,
        )  # fmt: skip
    mcmc.run(*DATA)
    w = mcmc.get_samples(group_by_chain=True)["w"]
    found = buffered(statistics)
    assert list(found) == list(range(len(w)))
    torch.testing.assert_close(torch.stack(list(found.values())), w)
    assert statistics.get().metadata["num_chains"] == len(w)


@pytest.mark.parametrize("num_chains", [1, 2])
def test_a_hook_gets_constrained_values(num_chains):
    y = torch.randn(20)
    statistics = online(constrained, (y,), buffer_size=64)
    kernel = SGLD(constrained, 1e-3, seed=1)
    mcmc = MCMC(kernel, 20, warmup_steps=5, num_chains=num_chains, hook_fn=statistics.hook, disable_progbar=True)
    mcmc.run(y)
    samples = mcmc.get_samples(group_by_chain=True)
    for chain, theta_SD in buffered(statistics).items():
        kept = statistics._buffers[chain].layout.split(theta_SD)
        for name, value in kept.items():
            torch.testing.assert_close(value, samples[name][chain])
    drawn = statistics.get().get_samples(30)
    assert (drawn["scale"] > 0).all()
    torch.testing.assert_close(drawn["mix"].sum(-1), torch.ones(30))
    assert drawn["corr"].shape == (30, 2, 2)


def test_constrained_values_of_the_streaming_driver():
    y = torch.randn(20)
    statistics = online(constrained, (y,), buffer_size=64)
    kernel = SGLD(constrained, 1e-3, seed=1)
    StreamingMCMC(kernel, 20, warmup_steps=5, statistics=statistics, disable_progbar=True).run(y)
    drawn = statistics.get().get_samples(30)
    assert (drawn["scale"] > 0).all()
    torch.testing.assert_close(drawn["mix"].sum(-1), torch.ones(30))


def test_warm_up_is_not_kept():
    statistics = online()
    statistics.hook(object(), {"w": torch.ones(3)}, "Warmup", 0)
    statistics.hook(object(), {"w": torch.ones(3)}, "Warmup [1]", 0)
    assert buffered(statistics) == {}
    statistics.hook(object(), {"w": torch.ones(3)}, "Sample [1]", 0)
    assert list(buffered(statistics)) == [1]


def test_memory_does_not_grow():
    statistics = online(buffer_size=8)
    feed(statistics, 3, chains=(0, 1))
    places = [store.theta_CSD.data_ptr() for store in statistics._buffers.values()]
    feed(statistics, 500, chains=(0, 1))
    assert [store.theta_CSD.data_ptr() for store in statistics._buffers.values()] == places
    assert [tuple(store.theta_CSD.shape) for store in statistics._buffers.values()] == [(1, 8, 3)] * 2
    assert statistics.get().metadata["draws_seen"] == 503


def test_a_draw_is_copied():
    statistics, value = online(), torch.zeros(3)
    statistics.update({"w": value})
    value += 1
    assert not buffered(statistics)[0].any()


def test_merged_statistics_have_the_chains_of_both():
    first, second = online(buffer_size=32), online(buffer_size=32)
    feed(first, 20, chains=(0, 1))
    feed(second, 15, shift=5.0)
    merged = first.merge(second)
    assert [len(draws) for draws in buffered(merged).values()] == [20, 20, 15]
    posterior = merged.merge(online()).get()
    # Three chains of 15 are more than two of 20.
    assert (posterior.metadata["num_chains"], posterior.metadata["num_draws"]) == (3, 15)
    assert posterior.metadata["draws_seen"] == 15
    assert same(merged.get(), posterior)  # and the options are those of the first


def test_a_chain_cut_short_is_left_out_rather_than_all_cut_to_it():
    statistics = online(buffer_size=64)
    feed(statistics, 30, chains=(0, 1))
    feed(statistics, 2, chains=(2,))
    metadata = statistics.get().metadata
    assert (metadata["num_chains"], metadata["num_draws"], metadata["draws_seen"]) == (2, 30, 30)


def test_copies_share_no_draws():
    statistics = online()
    feed(statistics, 12)
    other = copy.deepcopy(statistics)
    feed(other, 3)
    assert (len(buffered(statistics)[0]), len(buffered(other)[0])) == (12, 15)


def test_without_draws():
    with pytest.raises(ValueError, match="There are no draws yet: run the chain first"):
        online().get()


def test_with_too_few_draws():
    statistics = online()
    feed(statistics, 3)
    with pytest.raises(ValueError, match="too few draws: 3"):
        statistics.get()


@pytest.mark.parametrize("size", [1, 0, 2.0, True, "9"])
def test_buffer_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=f"buffer_size={size!r} must be an integer >= 2"):
        online(buffer_size=size)


def test_statistics_of_another_kind_cannot_be_merged():
    with pytest.raises(TypeError, match="`other` must be an OnlineDistillation; got CountStats"):
        online().merge(CountStats())
