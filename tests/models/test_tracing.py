# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of a model: what a trace shows, and errors that name the site and the fix."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_apd.data.minibatch import Call
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.building import build_potential
from pyro_apd.models.tracing import (
    StartMessenger,
    check_densities,
    observed_sites,
    run_from_prior,
    run_model,
    subsampled_plates,
)
from tests.support.models import Classifier

N = 60


def model(y: Tensor):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("whole", len(y)):
        pyro.sample("obs", dist.Normal(w, 1.0), obs=y)
    with pyro.plate("part", len(y), subsample_size=4) as rows:
        pyro.sample("other", dist.Normal(w, 1.0), obs=y[rows])


def test_a_run_takes_values_and_indices():
    y = torch.arange(10.0)
    rows = torch.tensor([1, 3, 5, 7])
    trace = run_model(model, Call((y,), {}, {"part": rows}), {"w": torch.tensor(0.5)})
    assert float(trace.nodes["w"]["value"]) == 0.5
    assert torch.equal(trace.nodes["other"]["value"], y[rows])
    assert not subsampled_plates(trace), "its indices are given"
    assert set(observed_sites(trace)) == {"w", "obs", "other"}, "a latent with a given value counts as observed"
    check_densities(trace)
    free = run_model(model, Call((y,), {}))
    assert subsampled_plates(free) == {"part": (10, 4)}
    assert set(observed_sites(free)) == {"obs", "other"}


@pytest.mark.parametrize("settings", [{}, {"batch_size": 20}])
def test_network_called_inside_the_data_plate(settings):
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    with pytest.raises(ModelError, match=r"'first\.weight' is drawn inside plate 'data'.*before `with pyro\.plate"):
        build_potential(Classifier(is_net_inside=True), (x, y), {}, **settings)


def test_labels_outside_the_likelihood():
    x = torch.randn(8, 4)
    with pytest.raises(DataError, match="'obs'"):
        build_potential(Classifier(), (x, torch.full((8,), 3)), {})


def test_a_prior_that_cannot_be_drawn_from_names_the_fix():
    def improper(y):
        w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    with pytest.raises(ModelError, match="init_strategy="):
        build_potential(improper, (torch.zeros(3),), {})


def test_a_strategy_draws_nothing_for_sites_that_are_given():
    asked = []

    def strategy(site):
        asked.append(site["name"])
        return torch.tensor(2.0)

    def model():
        return pyro.sample("a", dist.Normal(0.0, 1.0)) + pyro.sample("b", dist.Normal(0.0, 1.0))

    starting = StartMessenger(strategy)(model)
    trace = run_model(starting, Call((), {}), {"a": torch.tensor(0.5)})
    assert asked == ["b"]
    assert float(trace.nodes["_RETURN"]["value"]) == 2.5
    run_model(starting, Call((), {}))
    assert asked == ["b", "a", "b"]


def test_a_draw_that_the_likelihood_cannot_take_is_drawn_again():
    def model(y, least):
        scale = pyro.sample("scale", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(0.0, scale - least), obs=y)

    call = Call((torch.zeros(()), 0.5), {})
    for _ in range(5):
        assert float(run_from_prior(model, call).nodes["scale"]["value"]) > 0.5
    with pytest.raises(DataError, match="to satisfy the constraint"):
        run_from_prior(model, Call((torch.zeros(()), 50.0), {}))
