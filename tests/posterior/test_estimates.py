# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Estimates by sampling, and their errors, against laws that are known."""

import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_apd.models.layout import Layout
from pyro_apd.posterior import estimates

S = 400


def normal(repetitions=200, num_samples=S):
    return torch.randn(repetitions, num_samples, generator=torch.Generator().manual_seed(0))


def test_stated_errors_are_the_errors_made():
    """Of estimates from 400 draws of a standard normal, repeated 200 times."""
    draws = normal()
    layout = Layout({"x": (len(draws),)})
    found = estimates.quantiles(layout, draws.T, [0.05, 0.5])
    for value, error, level in zip(found["x"], found.error["x"], (0.05, 0.5), strict=True):
        assert_close(value.mean(), torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(level)), atol=0.03, rtol=0.0)
        assert_close(error.mean(), value.std(), rtol=0.2, atol=0.0)


def test_quantiles_are_torchs(monkeypatch):
    monkeypatch.setattr(estimates, "_BLOCK", 2)
    theta = torch.randn(31, 5)
    found = estimates.quantiles(Layout({"x": (5,)}), theta, [0.0, 0.3, 1.0])["x"]
    assert_close(found, theta.quantile(torch.tensor([0.0, 0.3, 1.0]), dim=0))


def test_quantiles_live_where_the_site_does():
    layout = Layout({"scale": (), "mix": (3,)}, {"scale": constraints.positive, "mix": constraints.simplex})
    theta = torch.randn(101, layout.size)
    found = estimates.quantiles(layout, theta, [0.1, 0.5])
    assert_close(found["scale"], theta[:, 0].exp().quantile(torch.tensor([0.1, 0.5])), rtol=1e-4, atol=1e-4)
    assert_close(found["mix"].sum(-1), torch.ones(2))


@pytest.mark.parametrize("levels", [[], [1.5], [-0.1], "0.5", None, ["a"], torch.tensor([2.0])])
def test_levels_that_are_none(levels):
    with pytest.raises(ValueError, match=r"must be numbers from 0 to 1"):
        estimates.check_levels(levels)


def test_levels():
    assert estimates.check_levels(0.5) == [0.5]
    assert estimates.check_levels(torch.tensor([0.25, 1.0])) == [0.25, 1.0]
