# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Weights of rows and classes: the exact weighted sum, in every style of mini-batches, and what is refused."""

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import biject_to
from torch.testing import assert_close

import pyro_apd as apd
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.bnn import BNN
from pyro_apd.models.building import build_potential

N, D = 12, 3
WEIGHTS = torch.arange(N).double() / 4  # the first is 0


@pytest.fixture
def x():
    return torch.randn(N, D, dtype=torch.float64)


def linear(out=1):
    return nn.Linear(D, out).double()


def weighted_energy(model, values, x, y, scale):
    """-log prior - sum of weighted log-likelihoods, each row by itself."""
    draws = {name: value.unsqueeze(0) for name, value in values.items()}
    prior = sum(model.priors[name].log_prob(value).sum() for name, value in values.items())
    return -prior - (scale * apd.log_likelihood(model, draws, x, y)[0]).sum()


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_potential_is_the_exact_weighted_sum(batch_size, x):
    """Batches of an epoch together, each scaled by N/B, average to the sum over all rows."""
    y = torch.randn(N, dtype=torch.float64)
    model = BNN(linear(), "gaussian", noise_scale=0.5)
    potential, start = build_potential(model, (x, y, WEIGHTS), {}, batch_size=batch_size)
    theta = potential.layout.unconstrain(start)
    parts = [potential.gradient(theta, potential.source.draw()) for _ in range(1 if batch_size is None else 3)]
    assert potential.path == "captured"
    values = {name: value.clone().requires_grad_() for name, value in start.items()}
    with torch.enable_grad():
        trace = poutine.trace(poutine.condition(model, values)).get_trace(x)
        fn = trace.nodes["obs"]["fn"]
        energy = -sum(model.priors[n].log_prob(v) for n, v in values.items()) - (WEIGHTS * fn.log_prob(y)).sum()
        gradients = torch.autograd.grad(energy, list(values.values()))
    expected = torch.cat([gradient.reshape(-1) for gradient in gradients])
    assert_close(torch.stack([gradient for gradient, _ in parts]).mean(0), expected)
    assert_close(torch.stack([energy for _, energy in parts]).mean(), energy.detach())


def test_with_the_plate_of_the_model(x):
    y = torch.randn(N, dtype=torch.float64)
    model = BNN(linear(), "gaussian", noise_scale=0.5, subsample_size=3)
    potential, start = build_potential(model, (x, y, WEIGHTS), {})
    theta = potential.layout.unconstrain(start)
    energies = [potential.gradient(theta, potential.source.draw())[1] for _ in range(4)]
    assert_close(torch.stack(energies).mean(), weighted_energy(model, start, x, y, WEIGHTS))


@pytest.mark.parametrize(
    ("likelihood", "out", "options", "y"),
    [
        ("categorical", 3, {}, torch.arange(N) % 3),
        ("bernoulli", 1, {}, torch.arange(N) % 2),
        ("bernoulli", 1, {}, (torch.arange(N) % 2 == 1).unsqueeze(-1)),
        ("ordinal", 1, {"num_classes": 3}, torch.arange(N) % 3),
    ],
)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_class_weights_multiply_those_of_rows(likelihood, out, options, y, weights, x):
    of_class = [0.5, 2.0, 3.0][: int(y.max()) + 1]
    model = BNN(linear(out), likelihood, class_weight=of_class, **options)
    scale = torch.tensor(of_class, dtype=torch.float64)[y.reshape(-1).long()] * (1 if weights is None else weights)
    potential, start = build_potential(model, (x, y) if weights is None else (x, y, weights), {}, batch_size=4)
    theta = potential.layout.unconstrain(start)
    energies = [potential.gradient(theta, potential.source.draw())[1] for _ in range(3)]
    jacobian = potential.gradient(theta, potential.source.draw())[1] * 0
    for name, value in start.items():
        transform = biject_to(model.priors[name].support)
        jacobian = jacobian - transform.log_abs_det_jacobian(transform.inv(value), value).sum()
    assert potential.path == "captured"
    assert_close(torch.stack(energies).mean(), weighted_energy(model, start, x, y, scale) + jacobian)


def test_integer_weights_are_repeated_rows(x):
    y, weights = torch.randn(N, dtype=torch.float64), torch.arange(N) % 3
    model = BNN(linear(), "gaussian", noise_scale=0.5)
    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace(x, y, weights.double())
    values = {name: trace.nodes[name]["value"] for name in model.priors}
    repeated = poutine.trace(poutine.condition(model, values)).get_trace(
        x.repeat_interleave(weights, 0), y.repeat_interleave(weights)
    )
    assert_close(trace.log_prob_sum(), repeated.log_prob_sum())


def test_predictions_do_not_depend_on_weights(x):
    model = BNN(linear(3), class_weight=[1.0, 2.0, 3.0])
    draws = {name: prior.sample((2,)) for name, prior in model.priors.items()}
    assert_close(apd.outputs(model, draws, x).probs_SNK, apd.outputs(BNN(linear(3)), draws, x).probs_SNK)


def test_class_weights_follow_the_network(x):
    model = BNN(linear(2), class_weight=[1.0, 2.0]).float()
    trace = poutine.trace(model).get_trace(x.float(), torch.zeros(N, dtype=torch.long))
    assert trace.nodes["obs"]["scale"].dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(N, 1), r"weights must be a tensor of shape \(12,\), one for each row; got \(12, 1\)"),
        ([1.0] * N, r"weights must be a tensor of shape \(12,\).*got list"),
        (torch.linspace(-1, 1, N), "weights must be finite and not negative"),
        (torch.full((N,), torch.nan), "weights must be finite and not negative"),
    ],
)
def test_bad_weights(weights, match, x):
    with pytest.raises(DataError, match=match):
        BNN(linear(), "gaussian")(x, torch.zeros(N), weights)


@pytest.mark.parametrize(
    ("likelihood", "class_weight", "error", "match"),
    [
        ("gaussian", [1.0, 2.0], ValueError, "belongs to likelihood='categorical', 'bernoulli' or 'ordinal'; this one"),
        ("categorical", [1.0, 0.0, 1.0], ValueError, "must be one positive finite number for each class"),
        ("categorical", [[1.0]], ValueError, "must be one positive finite number for each class"),
        ("categorical", [1.0, 2.0], ModelError, "class_weight has 2 numbers, but the network gives 3 classes"),
        ("bernoulli", [1.0, 2.0], ModelError, "class_weight has 2 numbers, but the network gives no single class"),
    ],
)
def test_bad_class_weights(likelihood, class_weight, error, match, x):
    y = torch.zeros((N, 3) if likelihood == "bernoulli" else N, dtype=torch.long)
    with pytest.raises(error, match=match):
        BNN(linear(3), likelihood, class_weight=class_weight)(x, y)
