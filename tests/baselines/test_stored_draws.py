# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which draws are kept."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_apd as apd
from pyro_apd.baselines import stored_draws
from pyro_apd.baselines.stored_draws import herded, thinned
from tests.support.models import Classifier, Conjugate

DRAWS = {"w": torch.arange(20.0)[:, None].expand(20, 3)}


def test_thinned_draws_are_evenly_spaced():
    assert stored_draws(DRAWS, 5)["w"][:, 0].tolist() == [0.0, 5.0, 10.0, 14.0, 19.0]
    assert stored_draws(DRAWS, 20)["w"].equal(DRAWS["w"])


def test_chains_take_turns():
    by_chain = {"w": torch.arange(20.0).reshape(2, 10)}
    assert stored_draws(by_chain, 20, group_by_chain=True)["w"][:4].tolist() == [0.0, 10.0, 1.0, 11.0]


@pytest.mark.parametrize(("num_chains", "num_draws"), [(8, 49), (3, 7), (5, 4), (4, 40), (1, 3)])
def test_chains_give_equally_many_draws(num_chains, num_draws):
    number_K = thinned(num_chains, 10, num_draws)
    assert len(number_K.unique()) == num_draws
    counts = torch.bincount(number_K % num_chains, minlength=num_chains)
    assert counts.max() - counts.min() <= 1


def test_herding_begins_in_the_middle_and_then_spreads():
    values_SNF = torch.tensor([-10.0, -9.0, 0.5, 9.0, 10.0]).reshape(5, 1, 1)
    order = herded(values_SNF, 5).tolist()
    assert order[0] == 2
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_herding_takes_from_each_of_two_modes():
    values_SNF = torch.cat([torch.randn(10, 4, 1), 50 + torch.randn(10, 4, 1)])
    chosen = herded(values_SNF, 2)
    assert sorted((chosen < 10).tolist()) == [False, True]


def test_herded_draws_fit_better_than_chance():
    problem = Conjugate()
    draws = {"w": torch.distributions.MultivariateNormal(problem.mean, problem.covariance).sample((200,))}
    kept = stored_draws(draws, 10, method="herded", model=problem.full, data=(problem.x, problem.y), seed=0)["w"]
    again = stored_draws(draws, 10, method="herded", model=problem.full, data=(problem.x, problem.y), seed=0)["w"]
    assert kept.equal(again)
    error = (kept.mean(0) - draws["w"].mean(0)).norm()
    by_chance = [(draws["w"][torch.randperm(200)[:10]].mean(0) - draws["w"].mean(0)).norm() for _ in range(100)]
    assert error < torch.stack(by_chance).median()


X = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) @ torch.randn(20, 20)
DTYPES = ("int8", "int4", "int3", "int2")


@pytest.fixture(scope="module")
def networks():
    """Draws of a classifier around a network, and the model."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"first.weight": (12, 20), "first.bias": (12,), "second.weight": (5, 12), "second.bias": (5,)}
    draws = {}
    for name, shape in shapes.items():
        centre, deviations = (torch.randn(*size, generator=generator) for size in (shape, (40, *shape)))
        draws[name] = 0.4 * centre + 0.05 * deviations
    return draws, Classifier((20, 12, 5))


def kept(networks, *args, **settings):
    draws, model = networks
    return stored_draws(draws, *args, model=model, data=(X,), seed=0, **settings)


def test_fewer_bits_take_fewer_bytes_and_err_more(networks):
    draws, model = networks
    exact_SNK = apd.outputs(model, draws, X).probs_SNK
    sizes, errors = [], []
    for dtype in DTYPES:
        found = kept(networks, 40, dtype=dtype)
        sizes.append(found.num_bytes)
        errors.append(float((apd.outputs(model, found, X).probs_SNK - exact_SNK).abs().mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    # Of each draw: 240 weights, 12 scales, and 12 + 60 + 5 numbers in int8 with a scale each.
    assert sizes[1] == 240 + 24 + 40 * (120 + 24 + 77 + 6)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_matrix_and_biases_are_in_int8(networks, dtype):
    found = kept(networks, 10, dtype=dtype)
    near = stored_draws(networks[0], 10, dtype="int8")
    for name in ("second.weight", "second.bias"):
        assert found[name].equal(near[name])
    integers_SO = found["first.bias"] / (found["first.bias"].abs().amax(1, keepdim=True) / 127)
    assert (integers_SO - integers_SO.round()).abs().max() < 0.01


def test_as_many_draws_as_fit_into_the_budget(networks):
    network = 4 * (240 + 12 + 60 + 5)
    found = kept(networks, byte_budget=2.0, dtype="int2")
    assert found.num_bytes <= 2 * network < kept(networks, found.num_draws + 1, dtype="int2").num_bytes
    assert (
        kept(networks, byte_budget=2 * network, dtype="int2").num_draws == found.num_draws == len(found["first.bias"])
    )
    assert kept(networks, byte_budget=5.5).num_draws == 5
    assert kept(networks, byte_budget=1000.0).num_bytes == 40 * network


def test_it_is_a_dict_with_its_size(networks):
    found = copy.deepcopy(kept(networks, 4, dtype="int4"))
    assert isinstance(found, dict)
    assert (found.dtype, found.num_draws) == ("int4", 4)
    labels = apd.Predictive(networks[1], posterior_samples=found)(X)["obs"]
    assert labels.shape == (4, 50)


def test_the_same_seed_gives_the_same_draws(networks):
    before = torch.random.get_rng_state()
    first, again = (kept(networks, 6, dtype="int3", method="herded") for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)
    assert before.equal(torch.random.get_rng_state())


def test_chains_that_are_apart_have_their_own_means(networks):
    draws, model = networks
    by_chain = {name: torch.stack([value, 5 - value]) for name, value in draws.items()}
    found = stored_draws(by_chain, 20, dtype="int4", model=model, data=(X,), group_by_chain=True, seed=0)
    assert found.num_bytes == 2 * (240 + 24) + 20 * (120 + 24 + 77 + 6 + 1)
    exact = stored_draws(by_chain, 20, group_by_chain=True)
    assert (found["first.weight"] - exact["first.weight"]).abs().max() < 0.2


def test_constrained_values_stay_in_their_support():
    def model(x, y=None):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(30)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ share, scale), obs=y)

    draws = {"scale": torch.rand(20) + 1e-4, "share": dist.Dirichlet(0.1 * torch.ones(30)).sample((20,)) + 1e-6}
    draws["share"] /= draws["share"].sum(-1, keepdim=True)
    found = stored_draws(draws, 20, dtype="int8", model=model, data=(torch.randn(5, 30),))
    torch.testing.assert_close(found["scale"], draws["scale"])
    assert bool((found["share"] > 0).all())
    torch.testing.assert_close(found["share"].sum(-1), torch.ones(20))
    assert (found["share"] - draws["share"]).abs().max() < 0.03
    assert found.num_bytes == 20 * (4 + 29 + 2)


def test_a_model_without_hidden_layers_is_in_int8(caplog):
    problem = Conjugate()
    draws = {"w": torch.randn(12, len(problem.mean))}
    few = stored_draws(draws, 12, dtype="int2", model=problem.full, data=(problem.x, problem.y))
    assert few["w"].equal(stored_draws(draws, 12, dtype="int8")["w"])
    assert "all weights are stored in int8" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 0}, "num_draws.*0"),
        ({"num_draws": 21}, "at most 20.*21"),
        ({"num_draws": 3, "method": "best"}, "method='best'.*thinned.*herded"),
        ({"num_draws": 3, "method": "herded"}, "give .model. and .data."),
        ({"num_draws": 3, "dtype": "int3"}, "dtype='int3'.*give .model. and .data."),
        ({"num_draws": 3, "dtype": "int5"}, "dtype='int5'.*float32.*int8.*int4.*int3.*int2"),
        ({}, "either .num_draws.*or .byte_budget.*None and None"),
        ({"num_draws": 3, "byte_budget": 2.0}, "either .num_draws.*or .byte_budget.*3 and 2.0"),
        ({"byte_budget": 0.0}, "byte_budget.*0.0"),
        ({"byte_budget": 0.9}, "byte_budget=0.9: one draw in float32 takes 12 bytes"),
        ({"byte_budget": 2, "dtype": "int8"}, "byte_budget=2: one draw in int8 takes 5 bytes"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stored_draws(DRAWS, **settings)
