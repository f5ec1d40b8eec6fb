# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The fixed part of a network is run once per datum, wherever many draws share it, and results are the same."""

import gc
import logging

import pyro.infer
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.testing import assert_close

import pyro_apd as apd
from pyro_apd.models import shared_features
from pyro_apd.models.shared_features import with_features

N = 40


class Body(nn.Module):
    """Counts the rows that it is run on."""

    rows = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        Body.rows += len(x)
        return self.linear(x).tanh()


@pytest.fixture
def x():
    Body.rows = 0
    return torch.randn(N, 3)


@pytest.fixture
def y():
    return torch.arange(N) % 4


def network():
    return nn.Sequential(Body(), nn.Linear(5, 4))


def run(kernel, *args, driver=apd.MCMC, **kwargs):
    mcmc = driver(kernel, num_samples=20, warmup_steps=2, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


@pytest.mark.parametrize("driver", [apd.MCMC, pyro.infer.MCMC])
def test_sampling_runs_the_fixed_part_once(x, y, driver):
    net = network()
    bnn = apd.BNN(net, bayesian="last_layer", prior_scale=0.5)
    mcmc = run(apd.SGLD(bnn, 1e-3, batch_size=8, seed=0), x, y, driver=driver)
    assert Body.rows <= N + 20  # a few rows show that rows do not depend on each other
    with_targets = Body.rows
    head = apd.BNN(nn.Sequential(nn.Identity(), net[1]), prior_scale=0.5)
    features = bnn.features(x)
    alone = run(apd.SGLD(head, 1e-3, batch_size=8, seed=0), features, y, driver=driver)
    assert set(mcmc.get_samples()) == {"net.1.weight", "net.1.bias"}
    for name, value in alone.get_samples().items():
        assert_close(mcmc.get_samples()[name], value)
    assert with_targets < 3 * N


def test_predictions_run_it_once_and_are_the_same(x, y):
    bnn = apd.BNN(network(), bayesian="last_layer")
    draws = {name: prior.sample((15,)) for name, prior in bnn.priors.items()}
    by_draw = [poutine.condition(bnn, {n: v[i] for n, v in draws.items()})(x).softmax(-1) for i in range(15)]
    Body.rows = 0
    for _ in range(3):
        assert_close(apd.outputs(bnn, draws, x).probs_SNK, torch.stack(by_draw))
        apd.Predictive(bnn, posterior_samples=draws)(x)
        apd.log_likelihood(bnn, draws, x, y)
    assert Body.rows <= N + 20


def test_features_can_be_given(x, y):
    bnn = apd.BNN(network(), bayesian="last_layer")
    features = bnn.features(x)
    given = run(apd.SGLD(bnn, 1e-3, batch_size=8, seed=0), features=features, y=y).get_samples()
    by_itself = run(apd.SGLD(bnn, 1e-3, batch_size=8, seed=0), x, y).get_samples()
    for name, value in by_itself.items():
        assert_close(given[name], value)


@pytest.mark.slow
def test_distillation_runs_it_once_and_knows_the_rest_of_the_network(x, y, tmp_path):
    bnn = apd.BNN(network(), bayesian="last_layer", prior_scale=0.5)
    mcmc = run(apd.SGLD(bnn, 1e-2, seed=0), x, y)
    Body.rows = 0
    posterior = apd.distill(mcmc, num_steps=5, seed=0)
    assert Body.rows <= N + 20
    assert posterior.metadata["space"] == "functions"
    assert posterior.metadata["data"] == apd.fingerprint(x, y)
    fixed = {f"net.0.linear.{name}" for name in ("weight", "bias")}
    assert set(posterior.frozen.read) == fixed
    posterior.save(tmp_path / "p.safetensors", frozen=True)
    loaded = apd.DistilledPosterior.load(tmp_path / "p.safetensors")
    other = apd.BNN(network(), bayesian="last_layer")
    with pytest.raises(apd.ArtifactError, match=r"net.0.linear"):
        apd.Predictive(other, guide=loaded, num_samples=5)(x)
    loaded.load_frozen(other)
    apd.Predictive(other, guide=loaded, num_samples=5)(x)
    assert_close(other.features(x), bnn.features(x))


def test_features_follow_inputs_and_network(x, y):
    bnn = apd.BNN(network(), bayesian="last_layer")
    first = with_features(bnn, (x, y), {})[1]["features"]
    assert with_features(bnn, (x,), {"y": y})[1]["features"] is first
    x += 1
    assert_close(with_features(bnn, (x, y), {})[1]["features"], bnn.features(x))
    bnn.net[0].linear.bias.data += 1  # not counted by torch
    changed = with_features(bnn, (x, y), {})[1]["features"]
    assert_close(changed, bnn.features(x))
    assert not torch.allclose(changed, first)
    bnn.double()
    assert with_features(bnn, (x.double(), y), {})[1]["features"].dtype == torch.float64


def test_features_are_forgotten_with_their_inputs(y):
    bnn = apd.BNN(network(), bayesian="last_layer")
    x = torch.randn(N, 3)
    with_features(bnn, (x, y), {})
    known = shared_features._KNOWN[bnn]
    assert len(known._entries) == 1
    del x
    gc.collect()
    assert not known._entries
    assert bnn in shared_features._KNOWN
    del bnn, known
    gc.collect()
    assert all(isinstance(key, apd.BNN) for key in shared_features._KNOWN)


def test_all_arguments_are_kept(x, y):
    bnn = apd.BNN(network(), bayesian="last_layer")
    weights = torch.rand(N)
    args, kwargs = with_features(poutine.scale(bnn, 0.5), (x, y, weights), {})
    assert args == ()
    assert kwargs["y"] is y
    assert kwargs["weights"] is weights
    draw = {name: prior.sample() for name, prior in bnn.priors.items()}
    traces = [
        poutine.trace(poutine.condition(bnn, draw)).get_trace(*a, **k)
        for a, k in (((x, y, weights), {}), (args, kwargs))
    ]
    assert_close(traces[0].log_prob_sum(), traces[1].log_prob_sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (apd.BNN(network()), (x,)),
        lambda x: (apd.BNN(network(), bayesian=["0", "1"]), (x,)),
        lambda x: (apd.BNN(network(), bayesian="last_layer"), (x.clone().requires_grad_(),)),
        lambda x: (apd.BNN(network(), bayesian="last_layer"), ()),
        lambda x: (apd.BNN(network(), bayesian="last_layer"), (x.numpy(),)),
        lambda x: (apd.BNN(nn.Sequential(nn.Flatten(), nn.Linear(3, 4))), (x,)),
        lambda x: (lambda x: None, (x,)),
    ],
    ids=["all latent", "two layers", "gradients of inputs", "nothing", "an array", "nothing fixed", "a function"],
)
def test_other_calls_are_left_alone(x, make):
    model, args = make(x)
    assert with_features(model, args, {})[0] is args


def test_a_network_without_features_is_run_in_full(x, y, caplog):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Body(), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.body(x)) + 1

    bnn = apd.BNN(Shifted(), bayesian="last_layer")
    with caplog.at_level(logging.INFO, "pyro_apd"):
        assert with_features(bnn, (x, y), {})[0] == (x, y)
    assert "run in full at every step: The outputs of layer 'head'" in caplog.text
    run(apd.SGLD(bnn, 1e-3, batch_size=8), x, y)


def test_large_features_are_computed_batch_by_batch(x, y, caplog, monkeypatch):
    monkeypatch.setattr(shared_features, "_MAX_BYTES", 100)
    with caplog.at_level(logging.INFO, "pyro_apd"):
        assert with_features(apd.BNN(network(), bayesian="last_layer"), (x, y), {})[0] == (x, y)
    assert "would take" in caplog.text
