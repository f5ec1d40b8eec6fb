# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Dropout as a posterior over the model's own sites."""

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pyro_apd as apd
from pyro_apd.baselines import mc_dropout
from pyro_apd.baselines.descent import init_to_layers
from pyro_apd.baselines.mc_dropout import _prepare
from pyro_apd.errors import ModelError
from tests.support.models import Classifier, Conjugate

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
PROBLEM = Conjugate()


def prepare(model, sites=None, batch_size=60):
    return _prepare(model, (X, Y), {}, 0.5, sites, batch_size, init_to_layers, 0)


def test_the_loss_is_that_of_a_dropout_layer_and_the_prior_of_whole_weights():
    model = Classifier()
    start, _ = prepare(model)
    rows, factor_L = start.potential.source.draw()
    assert set(factor_L.tolist()) == {0.0, 2.0}
    site = start.potential.layout.constrain(start.theta)
    hidden = torch.relu(X[rows] @ site["first.weight"].T + site["first.bias"]) * factor_L
    logits = hidden @ site["second.weight"].T + site["second.bias"]
    log_prior = sum(dist.Normal(0.0, 0.5).log_prob(value).sum() for value in site.values())
    expected = nn.functional.cross_entropy(logits, Y[rows], reduction="sum") - log_prior
    assert_close(start.potential.value(start.theta, (rows, factor_L)), expected)
    gradient, energy = start.potential.gradient(start.theta, (rows, factor_L))
    assert start.potential.path == "captured"
    assert_close(energy, expected)
    assert_close(gradient, start.potential.traced_gradient(start.theta, (rows, factor_L))[0])


def test_a_batch_counts_for_all_data():
    start, _ = prepare(Classifier(), batch_size=20)
    rows, factor_L = start.potential.source.draw()
    batch = start.potential.value(start.theta, (rows, factor_L))
    whole = sum(start.potential.value(start.theta, (part, factor_L)) for part in torch.arange(60).split(20)) / 3
    everything, _ = prepare(Classifier(), batch_size=60)
    assert_close(whole, everything.potential.value(start.theta, (torch.arange(60), factor_L)))
    assert not torch.equal(batch, whole)


@pytest.mark.slow
def test_training_learns_and_draws_disagree():
    model = Classifier((4, 40, 3), scale=2.0)
    settings = {"num_steps": 300, "batch_size": 30, "learning_rate": 0.2, "seed": 0, "progress": False}
    posterior = mc_dropout(model, X, Y, **settings)
    probs_SNK = apd.outputs(model, posterior.stream(50, seed=1), X).probs_SNK
    assert apd.metrics.accuracy(probs_SNK.mean(0), Y) > 0.85
    assert apd.uncertainty.mutual_information(probs_SNK).mean() > 0.005
    again = mc_dropout(model, X, Y, **settings)
    assert torch.equal(posterior.generator.weights, again.generator.weights)


def test_it_is_a_posterior_like_any_other(tmp_path):
    model = Classifier()
    posterior = mc_dropout(model, X, Y, num_steps=5, seed=0, progress=False)
    posterior.save(tmp_path / "dropout.safetensors")
    loaded = apd.DistilledPosterior.load(tmp_path / "dropout.safetensors")
    assert loaded.frozen.read == {}, "the model has no frozen weights, and the file says so"
    for name, value in posterior.get_samples(4, seed=1).items():
        assert torch.equal(value, loaded.get_samples(4, seed=1)[name])
    for predictive in (pyro.infer.Predictive, apd.Predictive):
        assert predictive(model, guide=loaded, num_samples=3)(X)["obs"].shape == (3, 60)
    columns = posterior.get_samples(30, seed=0)["second.weight"] == 0
    assert torch.equal(columns.any(1), columns.all(1)), "an input is left out for all outputs or for none"
    assert 0.3 < columns.double().mean() < 0.7


def test_sites_can_be_chosen():
    posterior = mc_dropout(Classifier(), X, Y, sites=["first.weight"], rate=0.25, num_steps=2, seed=0, progress=False)
    draws = posterior.get_samples(200, seed=0)
    assert (draws["first.weight"] == 0).double().mean().item() == pytest.approx(0.25, abs=0.04)
    assert (draws["second.weight"] != 0).all()
    both = ["second.weight", "first.weight"]
    assert prepare(Classifier(), both)[1].sites == both[::-1]


def test_convolutions_drop_channels():
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2))
    model, x = apd.BNN(net), torch.randn(20, 1, 2, 2)
    posterior = mc_dropout(model, x, torch.arange(20) % 2, sites=["net.0.weight"], num_steps=2, seed=0, progress=False)
    assert posterior.generator.config["layers"] == [[0, 3, 1, 4]]
    assert apd.Predictive(model, guide=posterior, num_samples=3)(x)["obs"].shape == (3, 20)


def constrained(x, y=None):
    first = pyro.sample("first", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    second = pyro.sample("second", dist.HalfNormal(1.0).expand([1, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((torch.relu(x @ first.T) @ second.T).squeeze(-1), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (Classifier(), {"rate": 1.0}, ValueError, "rate.*1.0"),
        (Classifier(), {"sites": ["third"]}, ValueError, r"names \['third'\].*first.weight"),
        (PROBLEM.full, {}, ModelError, "Nothing can be left out.*'w'"),
        (constrained, {}, ModelError, "second.*constrained"),
    ],
)
def test_what_is_refused(model, settings, error, message):
    y = Y if isinstance(model, nn.Module) else Y.float()
    x = X[:, :3] if model == PROBLEM.full else X
    with pytest.raises(error, match=message):
        mc_dropout(model, x, y, **settings, progress=False)


def test_rows_are_needed():
    with pytest.raises(ValueError, match="full data as tensors"):
        mc_dropout(Classifier(), [(X, Y)])
