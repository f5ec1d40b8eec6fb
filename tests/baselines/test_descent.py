# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient descent finds the maximum, and says so where it does not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_apd.baselines import map_estimate
from pyro_apd.baselines.descent import Best, Descent, Start, descend, init_to_layers
from pyro_apd.metrics import accuracy
from pyro_apd.models.bnn import BNN
from pyro_apd.predictive.predictive import outputs
from tests.support.models import Conjugate


def start(problem, batch_size=None, num_networks=None, model=None):
    return Start.prepare(model or problem.full, (problem.x, problem.y), {}, batch_size, None, 0, num_networks)


def test_one_step_is_that_of_the_equation():
    problem = Conjugate(dtype=torch.float64)
    begun = start(problem)
    theta = begun.theta.clone()
    gradient = theta - problem.x.T @ (problem.y - problem.x @ theta)
    list(Descent(1, 0.1).positions(begun, "", False))
    assert_close(begun.theta, theta - 0.1 * gradient / 200)


def test_momentum_adds_up():
    problem = Conjugate(dtype=torch.float64)
    plain, heavy = start(problem), start(problem)
    list(Descent(2, 0.1).positions(plain, "", False))
    list(Descent(2, 0.1, momentum=0.5).positions(heavy, "", False))
    first = start(problem)
    list(Descent(1, 0.1).positions(first, "", False))
    assert_close(heavy.theta - plain.theta, 0.5 * (first.theta - start(problem).theta))


def test_networks_side_by_side_are_each_as_alone():
    problem = Conjugate()
    together, alone = start(problem, 20, num_networks=3), start(problem, 20)
    list(Descent(30, 0.05).positions(together, "", False))
    list(Descent(30, 0.05).positions(alone, "", False))
    assert_close(together.theta[0], alone.theta)
    assert not torch.equal(together.theta[1], together.theta[0])


def test_running_away_is_said():
    with pytest.raises(RuntimeError, match="smaller learning_rate than 1000"):
        list(Descent(200, 1000.0).positions(start(Conjugate()), "", False))


def test_the_best_state_on_validation_is_kept():
    problem = Conjugate()
    begun = start(problem)
    best = Best(problem.full, begun, (problem.x, problem.y))
    for scale in (0.0, 1.0, 3.0):
        begun.theta.copy_(scale * problem.mean)
        best.look()
    assert_close(best.theta, problem.mean)
    with pytest.raises(TypeError, match=r"tuple of the model's arguments.*Tensor"):
        descend(begun, Descent(1, 0.1), "", False, problem.full, problem.x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps.*0"),
        ({"learning_rate": 0.0}, "learning_rate.*0.0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"momentum": 1.0}, "momentum.*1.0"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Descent(**{"num_steps": 10, "learning_rate": 0.1, **settings})


def test_where_networks_start():
    def model():
        pyro.sample("weight", dist.Normal(7.0, 1.0).expand([300, 200]).to_event(2))
        pyro.sample("bias", dist.Normal(7.0, 1.0).expand([300]).to_event(1))
        pyro.sample("norm.weight", dist.Normal(7.0, 1.0).expand([300]).to_event(1))
        pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("number", dist.Normal(7.0, 0.1))

    nodes = pyro.poutine.trace(pyro.infer.autoguide.initialization.InitMessenger(init_to_layers)(model)).get_trace()
    value = {name: nodes.nodes[name]["value"] for name in ("weight", "bias", "norm.weight", "scale", "number")}
    assert value["weight"].mean().abs() < 0.01
    assert value["weight"].std().item() == pytest.approx(0.1, rel=0.02)
    assert (value["bias"] == 0).all()
    assert (value["norm.weight"] == 1).all()
    assert value["scale"] > 0
    assert value["number"] > 6


@pytest.mark.slow
def test_networks_with_normalisation_layers_learn():
    x = torch.randn(200, 5)
    y = x[:, :3].argmax(-1)
    net = nn.Sequential(
        nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)
    )
    bnn = BNN(net, prior_scale="fan_in")
    mode = map_estimate(bnn, x, y, num_steps=200, learning_rate=0.05, seed=0, progress=False)
    assert accuracy(outputs(bnn, mode, x).probs_SNK[0], y) > 0.9
