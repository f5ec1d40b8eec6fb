# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Where chains start: by a strategy, or by the values that a user gives."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch.distributions import constraints

import pyro_apd as apd
from pyro_apd.errors import ModelError
from pyro_apd.kernels.engine.starts import checked_start, checked_strategy, starting_at
from pyro_apd.models.layout import Layout

X, Y = torch.randn(20, 2), torch.randn(20)


def flat(x, y):
    w = pyro.sample("w", dist.ImproperUniform(constraints.real, (), (2,)))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, scale), obs=y)


START = {"w": np.array([0.5, -0.5], dtype="float32"), "scale": 1.0}


@pytest.mark.parametrize("num_chains", [None, 2])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_flat_priors_start_where_they_are_told_to(num_chains, batch_size):
    kernel = apd.SGLD(flat, 1e-4, batch_size=batch_size, seed=0, capture=False, compile=False)
    given = START if num_chains is None else {name: torch.as_tensor(v)[None] * 1.0 for name, v in START.items()}
    if num_chains:
        given = {name: torch.cat([value, value + 0.1]) for name, value in given.items()}
    mcmc = apd.MCMC(kernel, 2, 0, initial_params=given, num_chains=num_chains or 1, disable_progbar=True)
    mcmc.run(X, Y)
    draws = mcmc.get_samples(group_by_chain=True)
    torch.testing.assert_close(draws["w"][0, 0], torch.tensor([0.5, -0.5]), atol=0.2, rtol=0)
    torch.testing.assert_close(draws["scale"][0, 0], torch.tensor(1.0).exp(), atol=0.2, rtol=0)


def test_flat_priors_without_a_start_are_refused():
    with pytest.raises(ModelError, match="initial_params="):
        apd.MCMC(apd.SGLD(flat, 1e-4, seed=0), 2, 0, disable_progbar=True).run(X, Y)
    with pytest.raises(ModelError, match="initial_params="):  # of one of two sites
        apd.MCMC(apd.SGLD(flat, 1e-4, seed=0), 2, 0, initial_params={"w": START["w"]}, disable_progbar=True).run(X, Y)


def test_given_values_are_for_sites_without_another_start():
    assert starting_at(init_to_sample, None, None) is init_to_sample
    start = starting_at(init_to_sample, {"w": torch.full((3,), 9.0), "scale": torch.zeros(2)}, None)
    drawn = start({"name": "w", "fn": dist.Normal(torch.zeros(3), 1.0).to_event(1), "infer": {}})
    assert not torch.equal(drawn, torch.full((3,), 9.0))
    value = start({"name": "scale", "fn": dist.ImproperUniform(constraints.positive, (), (2,)), "infer": {}})
    assert torch.equal(value, torch.ones(2))


def test_starts_are_checked():
    layout = Layout({"w": (2,)})
    assert torch.equal(checked_start({"w": [1, 2]}, layout, torch.zeros(2)), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="are unconstrained"):
        checked_start({"w": [1, 2, 3]}, layout, torch.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        checked_start({"w": [1, np.nan]}, layout, torch.zeros(2))


def test_a_strategy_must_be_callable():
    with pytest.raises(ValueError, match=r"init_strategy='median' must be a callable, such as .*init_to_median"):
        checked_strategy("median")
    assert checked_strategy(init_to_sample) is init_to_sample
