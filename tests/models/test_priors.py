# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Priors of networks' parameters, as a BNN has them."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.testing import assert_close

from pyro_apd.models.bnn import BNN
from pyro_apd.models.priors import parameter_priors

D = 3


def mlp(num_outputs=4):
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, num_outputs))


def sds(model):
    return {name.removeprefix("net."): prior.base_dist.scale.unique().tolist() for name, prior in model.priors.items()}


def test_prior_by_fan_in():
    net = nn.Sequential(nn.Conv2d(2, 3, 4), nn.Flatten(), nn.Linear(16, 2))
    expected = {"0.weight": [32**-0.5], "0.bias": [1.0], "2.weight": [0.25], "2.bias": [1.0]}
    for name, (sd,) in sds(BNN(net, prior_scale="fan_in")).items():
        assert sd == pytest.approx(expected[name][0])


def test_prior_by_name_the_longest_wins():
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(11)])
    model = BNN(net, prior_scale={"": 1.0, "1": 2.0, "1.bias": 3.0, "10.weight": 4.0, "2": "fan_in"})
    by_name = {name: sd for name, (sd,) in sds(model).items()}
    assert (by_name["0.weight"], by_name["1.weight"], by_name["1.bias"]) == (1.0, 2.0, 3.0)
    assert (by_name["10.weight"], by_name["10.bias"]) == (4.0, 1.0)
    assert (by_name["2.weight"], by_name["2.bias"]) == (pytest.approx(0.5**0.5), 1.0)


def test_prior_by_callable():
    seen = {}

    def prior(name, parameter):
        seen[name] = tuple(parameter.shape)
        return dist.Laplace(0.0, 2.0) if name.endswith("weight") else 0.5

    model = BNN(mlp(), prior_scale=prior)
    assert seen == {"0.weight": (5, D), "0.bias": (5,), "2.weight": (4, 5), "2.bias": (4,)}
    value = torch.randn(5, D)
    assert_close(model.priors["net.0.weight"].log_prob(value), dist.Laplace(0.0, 2.0).log_prob(value).sum())
    assert_close(model.priors["net.2.bias"].base_dist.scale, torch.full((4,), 0.5))


@pytest.mark.parametrize(
    "prior",
    [
        dist.StudentT(3.0, 0.0, 1.0),
        dist.Normal(torch.arange(2.0), torch.ones(2)),
        dist.Normal(torch.zeros(3, 2), 1.0).to_event(1),
        dist.Normal(torch.zeros(3, 2), 1.0).to_event(2),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), torch.distributions.AffineTransform(torch.tensor(1.0), torch.tensor(2.0))
        ),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.0]))),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_prior_distributions_take_the_parameters_shape(prior):
    model = BNN(nn.Linear(2, 3, bias=False), prior_scale=prior)
    fitted = model.priors["net.weight"]
    assert (fitted.batch_shape, fitted.event_shape) == ((), (3, 2))
    value = torch.randn(3, 2)
    assert_close(fitted.log_prob(value), prior.log_prob(value).sum())
    assert fitted.support.check(value).all()
    double = model.double().priors["net.weight"]
    assert double.sample().dtype == torch.float64
    assert_close(double.log_prob(value.double()), prior.log_prob(value).sum().double(), rtol=1e-5, atol=1e-5)


def test_prior_distributions_take_the_parameters_dtype():
    mask = torch.tensor([True, False, True])
    prior = dist.Normal(0.0, torch.ones(3)).mask(mask)
    names = {"weight": "weight", "bias": "bias"}
    spec = {"": dist.Normal(0.0, 1.0), "bias": prior}
    found = parameter_priors(nn.Linear(2, 3, dtype=torch.float64), names, spec)
    assert found["weight"].sample().dtype == torch.float64
    assert found["bias"].base_dist._mask.dtype == torch.bool
    assert found["bias"].sample().dtype == torch.float64


def test_independent_prior_draws():
    model = BNN(nn.Linear(2, 3), prior_scale=2.0)
    traces = [poutine.trace(model).get_trace(torch.zeros(1, 2)) for _ in range(2000)]
    draws = torch.stack([trace.nodes["net.weight"]["value"] for trace in traces])
    assert len(draws.unique()) > 11_000
    assert_close(draws.std(0), torch.full((3, 2), 2.0), atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "density"),
    [
        ({}, dist.HalfCauchy(1.0)),
        ({"noise_prior": "half_normal", "noise_prior_scale": 0.3}, dist.HalfNormal(0.3)),
        ({"noise_prior_scale": 2}, dist.HalfCauchy(2.0)),
        ({"noise_prior": dist.Gamma(2.0, 3.0)}, dist.Gamma(2.0, 3.0)),
    ],
)
def test_noise_prior(kwargs, density):
    model = BNN(nn.Linear(2, 1), "gaussian", **kwargs)
    assert_close(model.priors["noise_scale"].log_prob(torch.tensor(0.4)), density.log_prob(torch.tensor(0.4)))


def test_numbers_of_numpy_count():
    model = BNN(nn.Linear(2, 1), "gaussian", np.float32(0.5), noise_prior_scale=np.int64(2), subsample_size=np.int64(4))
    assert sds(model)["weight"] == [0.5]
    assert type(model.subsample_size) is int
    assert BNN(nn.Linear(2, 1), "gaussian", noise_scale=np.float64(0.3)).noise_scale == 0.3


@pytest.mark.parametrize(
    ("net", "kwargs", "error", "match"),
    [
        (mlp, {"prior_scale": 0.0}, ValueError, r"'0.weight'\]=0.0 must be a positive finite number"),
        (mlp, {"prior_scale": True}, ValueError, "=True must be a positive"),
        (mlp, {"prior_scale": float("nan")}, ValueError, "=nan must be a positive"),
        (mlp, {"prior_scale": "fan_out"}, ValueError, r"'0.weight'\]='fan_out' must be.*'fan_in' and distr"),
        (mlp, {"prior_scale": {"0": 1.0}}, ValueError, r"nothing for '2.weight'; add it, its layer, or ''"),
        (mlp, {"prior_scale": {"": 1.0, "layer": 2.0}}, ValueError, r"names \['layer'\].*'0.weight'"),
        (mlp, {"prior_scale": lambda name, parameter: None}, ValueError, "=None must be a positive"),
        (mlp, {"prior_scale": dist.Poisson(1.0)}, ValueError, "'0.weight', Poisson, is not continuous"),
        (mlp, {"prior_scale": dist.Normal(torch.zeros(7), 1.0)}, ValueError, r"batch shape \(7,\).*shape \(5, 3\)"),
        (mlp, {"prior_scale": dist.Dirichlet(torch.ones(7))}, ValueError, r"event shape \(7,\).*shape \(5, 3\)"),
        (mlp, {"prior_scale": torch.distributions.Normal(0.0, 1.0)}, ValueError, "use the same of pyro.distributions"),
        (mlp, {"likelihood": "gaussian", "noise_scale": -1}, ValueError, "noise_scale=-1 must be a positive"),
        (mlp, {"likelihood": "gaussian", "noise_prior": "cauchy"}, ValueError, r"noise_prior='cauchy' must be one of"),
        (mlp, {"likelihood": "gaussian", "noise_prior_scale": 0}, ValueError, "noise_prior_scale=0 must be a positive"),
        (mlp, {"likelihood": "gaussian", "noise_prior": dist.Normal(1.0, 1.0)}, ValueError, "positive numbers; Normal"),
    ],
)
def test_bad_priors(net, kwargs, error, match):
    with pytest.raises(error, match=match):
        BNN(net(), **kwargs)
