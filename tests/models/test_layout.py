# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions import constraints as pyro_constraints
from torch.distributions import constraints

from pyro_apd.models.layout import Layout

SUPPORTED = {
    "normal": dist.Normal(torch.zeros(3, 2), 1.0).to_event(2),
    "half_cauchy": dist.HalfCauchy(torch.ones(2)).to_event(1),
    "dirichlet": dist.Dirichlet(torch.ones(4)),
    "lkj": dist.LKJCholesky(3),
    "uniform": dist.Uniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 5.0])).to_event(1),
    "uniform_scalar": dist.Uniform(-2.0, 3.0),
    "beta": dist.Beta(1.0, 1.0),
    "gamma": dist.Gamma(1.0, 1.0),
    "log_normal": dist.LogNormal(0.0, 1.0),
    "mvn": dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
}


def layout_of(names):
    return Layout({n: SUPPORTED[n].shape() for n in names}, {n: SUPPORTED[n].support for n in names})


@given(st.lists(st.sampled_from(sorted(SUPPORTED)), unique=True), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_constrain_and_unconstrain_are_inverse(names, num_draws, seed):
    layout = layout_of(names)
    theta = torch.randn(num_draws, layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = layout.constrain(theta)
    assert set(draws) == set(names)
    for name, value in draws.items():
        assert value.shape == (num_draws, *SUPPORTED[name].shape())
        assert bool(SUPPORTED[name].support.check(value).all())
    if names:
        torch.testing.assert_close(layout.unconstrain(draws), theta)


def test_jacobian_is_that_of_the_transforms():
    layout = layout_of(sorted(SUPPORTED))
    theta = torch.randn(5, layout.size, dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    for site in layout:
        z = theta[:, site.start : site.stop].reshape(5, *site.unconstrained_shape)
        term = site.transform.log_abs_det_jacobian(z, site.transform(z))
        expected += term.reshape(5, -1).sum(-1)
    torch.testing.assert_close(layout.log_abs_det_jacobian(theta), expected)
    assert expected.abs().min() > 0


def test_exponential_jacobian_by_hand():
    layout = Layout({"s": (2,)}, {"s": constraints.independent(constraints.positive, 1)})
    theta = torch.tensor([[0.3, -1.2]])
    torch.testing.assert_close(layout.constrain(theta)["s"], theta.exp())
    torch.testing.assert_close(layout.log_abs_det_jacobian(theta), theta.sum(-1))


def test_json_round_trip_of_every_support():
    layout = Layout(
        {**{n: d.shape() for n, d in SUPPORTED.items()}, "ordered": (3,)},
        {**{n: d.support for n, d in SUPPORTED.items()}, "ordered": pyro_constraints.ordered_vector},
    )
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    theta = torch.randn(2, layout.size)
    for name, value in layout.constrain(theta).items():
        assert torch.equal(value, again.constrain(theta)[name])


@pytest.mark.parametrize(
    "description",
    [
        [{"name": "a"}],
        [{"name": "a", "shape": [2], "support": {"kind": "no such thing"}}],
        [{"name": "a", "shape": [-1], "support": {"kind": "real"}}],
        [{"name": "a", "shape": [1], "support": {"kind": "real"}}] * 2,
        [3],
    ],
)
def test_malformed_json_is_refused(description):
    with pytest.raises(ValueError, match=r"(?i)malformed|unknown support"):
        Layout.from_json(description)


def test_from_trace_leaves_out_observed_sites_and_plates():
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 5, subsample_size=2):
            pyro.sample("obs", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    trace = poutine.trace(model).get_trace()
    assert Layout.from_trace(trace).names == ("w",)
    with pytest.raises(ValueError, match="no latent sites"):
        Layout.from_trace(trace, ["v"])


def test_groups_are_layers():
    layout = Layout({"net.0.weight": (2, 3), "net.0.bias": (2,), "noise": ()})
    assert {name: [s.name for s in sites] for name, sites in layout.groups().items()} == {
        "net.0": ["net.0.weight", "net.0.bias"],
        "noise": ["noise"],
    }


def test_errors_name_the_site():
    layout = Layout({"w": (2, 3)})
    with pytest.raises(ValueError, match="lack site 'w'"):
        layout.unconstrain({"v": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"'w' has draws of shape \(4, 3, 2\)"):
        layout.unconstrain({"w": torch.zeros(4, 3, 2)})
    with pytest.raises(ValueError, match="discrete"):
        Layout({"k": ()}, {"k": dist.Bernoulli(0.5).support})


def test_a_mixture_has_the_support_of_its_components():
    def model(family):
        mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), family)
        pyro.sample("w", mixture.to_event(1))

    scales = torch.tensor([0.1, 1.0]).expand(3, 2)
    real = Layout.from_trace(poutine.trace(model).get_trace(dist.Normal(0.0, scales)))
    assert real.is_real
    positive = Layout.from_trace(poutine.trace(model).get_trace(dist.LogNormal(0.0, scales)))
    assert (positive.constrain(torch.randn(5, 3))["w"] > 0).all()
    assert Layout.from_json(positive.to_json()) == positive
    with pytest.raises(ValueError, match=r"'w' is a mixture of components with different supports"):
        Layout.from_trace(poutine.trace(model).get_trace(dist.Uniform(torch.zeros(3, 2), scales)))
