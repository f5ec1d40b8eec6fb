# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Values at a fixed point are those of plain Pyro, and taking them changes nothing."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pyro_apd.models.bnn import BNN
from pyro_apd.models.building import build_potential
from pyro_apd.models.fixed_point import _fixed_point, fixed_point_values
from pyro_apd.models.layout import Layout
from tests.support.models import Conjugate

PROBLEM = Conjugate(num_data=40)


def values_of(model, *args, dtype=torch.float32, **settings):
    potential, _ = build_potential(model, args, {}, **settings)
    return potential, fixed_point_values(potential, torch.empty(0, dtype=dtype))


def test_prior_and_likelihood_are_those_of_plain_pyro():
    potential, values = values_of(PROBLEM.full, PROBLEM.x, PROBLEM.y)
    point = _fixed_point(potential.layout, 3**0.5)
    trace = poutine.trace(poutine.condition(PROBLEM.full, {"w": point})).get_trace(PROBLEM.x, PROBLEM.y)
    trace.compute_log_prob()
    for name, site, gradient in (
        ("prior", "w", point),
        ("likelihood", "obs", PROBLEM.x.T @ (PROBLEM.x @ point - PROBLEM.y)),
    ):
        assert values[name]["energy"] == pytest.approx(-float(trace.nodes[site]["log_prob_sum"]), rel=1e-5)
        along = float(gradient @ point / point.norm())
        assert values[name]["gradient"]["w"] == pytest.approx([float(gradient.norm()), along], rel=1e-4)
        assert values[name]["length"] == pytest.approx(float(point.norm()))


@pytest.mark.parametrize("settings", [{"batch_size": 10}, {"batch_size": 10, "replacement": True}, {}])
def test_nothing_is_drawn_from_batches_or_global_generators(settings):
    potential, _ = build_potential(PROBLEM.full, (PROBLEM.x, PROBLEM.y), {}, **settings)
    source = potential.source
    source.start(torch.Generator().manual_seed(3))
    expected = [source.draw() for _ in range(6)]
    source.start(torch.Generator().manual_seed(3))
    before = torch.random.get_rng_state()
    found = [source.draw() for _ in range(3)]
    potential.model = lambda *args: (torch.rand(1), PROBLEM.full(*args))[1]
    fixed_point_values(potential, torch.empty(0))
    found += [source.draw() for _ in range(3)]
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_generators_of_a_loader_do_not_move():
    generator, of_sampler = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    data = TensorDataset(PROBLEM.x, PROBLEM.y)
    sampler = RandomSampler(data, generator=of_sampler)
    loader = DataLoader(data, batch_size=10, sampler=sampler, generator=generator)
    potential, values = values_of(PROBLEM.full, loader)
    before = generator.get_state(), of_sampler.get_state()
    assert fixed_point_values(potential, torch.empty(0)) == values
    assert values["likelihood"] is not None
    assert all(map(torch.equal, before, (generator.get_state(), of_sampler.get_state())))


def test_the_batches_of_a_loader_stay_the_chains():
    loader = DataLoader(TensorDataset(PROBLEM.x, PROBLEM.y), batch_size=10, shuffle=True)
    potential, values = values_of(PROBLEM.full, loader)
    source = potential.source
    source.start(torch.Generator().manual_seed(3))
    expected = [source.draw()[0] for _ in range(6)]
    source.start(torch.Generator().manual_seed(3))
    found = [source.draw()[0] for _ in range(2)]
    assert fixed_point_values(potential, torch.empty(0)) == values
    found += [source.draw()[0] for _ in range(4)]
    assert all(map(torch.equal, found, expected))


def test_mini_batches_are_scaled_to_all_rows():
    _, whole = values_of(PROBLEM.full, PROBLEM.x, PROBLEM.y)
    _, batch = values_of(PROBLEM.full, PROBLEM.x, PROBLEM.y, batch_size=20)
    assert batch["prior"] == whole["prior"]
    assert batch["likelihood"]["energy"] == pytest.approx(whole["likelihood"]["energy"], rel=0.3)


def test_constrained_sites_and_double_precision():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(0.0, scale), obs=y)

    y = torch.randn(20, dtype=torch.float64)
    potential, values = values_of(model, y, dtype=torch.float64)
    point = _fixed_point(potential.layout, 3**0.5).double()
    scale = point.exp()
    expected = -dist.Normal(0.0, scale).log_prob(y).sum() - point.sum()
    assert values["likelihood"]["energy"] + values["prior"]["energy"] == pytest.approx(
        float(expected - dist.HalfNormal(1.0).log_prob(scale)), rel=1e-6
    )


def test_a_smaller_point_is_taken_where_the_potential_is_not_finite():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1e-3).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Poisson(torch.exp(1e3 * x @ w)), obs=y)

    _, values = values_of(model, PROBLEM.x, torch.ones(40))
    assert values["likelihood"]["energy"] < math.inf
    assert values["prior"]["length"] < 0.1


def test_the_point_leaves_the_outputs_of_deep_networks_in_range():
    layers = [layer for _ in range(30) for layer in (nn.Linear(40, 40), nn.ReLU())]
    bnn = BNN(nn.Sequential(*layers, nn.Linear(40, 2)))
    _, values = values_of(bnn, torch.randn(20, 40), torch.arange(20) % 2)
    norms = [norm for norm, _ in values["likelihood"]["gradient"].values()]
    assert max(norms) < 100
    assert min(norms) > 1e-5


def test_the_point_is_the_same_on_all_machines():
    point = _fixed_point(Layout({"w": (2, 3), "b": (), "empty": (0,)}), 0.5)
    numbers = torch.rand(7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(point[:6], numbers[:6] * (0.5 / 3**0.5))
    assert len(point) == 7
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(_fixed_point(Layout({"w": (2, 3), "b": (), "empty": (0,)}), 0.5), point)
    finally:
        torch.set_default_dtype(before)
