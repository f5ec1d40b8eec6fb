# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_apd.kernels import SGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.models.bnn import BNN
from pyro_apd.models.building import build_potential
from pyro_apd.models.capture import capture
from pyro_apd.runtime import threads
from tests.support.models import Classifier, Conjugate, constrained

X, LABELS = torch.randn(30, 4), torch.arange(30) % 3


def hierarchy(y):
    """The prior's scale is itself a latent, so that no closed form may be used for ``w``."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), scale).to_event(1))
    v = pyro.sample("v", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(w.sum() + v.sum(), 1.0), obs=y)


MODELS = {
    "network": (Classifier(), (X, LABELS), {}),
    "network in batches": (Classifier(), (X, LABELS), {"batch_size": 10}),
    "conjugate": (Conjugate().full, (Conjugate().x, Conjugate().y), {}),
    "constrained": (constrained, (torch.randn(20),), {}),
    "hierarchy": (hierarchy, (torch.randn(20),), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_captured_gradient_is_the_models(name):
    model, args, settings = MODELS[name]
    potential, start = build_potential(model, args, {}, **settings)
    theta = potential.layout.unconstrain(start)
    potential.gradient(theta, potential.source.draw())
    assert potential.path == "captured"
    for _ in range(3):
        point, inputs = torch.randn_like(theta), potential.source.draw()
        gradient, energy = potential.gradient(point, inputs)
        expected, expected_energy = potential.traced_gradient(point, inputs)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(energy, expected_energy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["network", "conjugate", "constrained", "hierarchy"])
def test_potential_is_the_one_that_pyro_gives_to_nuts(name):
    model, args, _ = MODELS[name]
    potential, start = build_potential(model, args, {})
    theta = potential.layout.unconstrain(start)
    _, potential_fn, _, _ = initialize_model(model, args)
    torch.testing.assert_close(potential.value(theta, ()), potential_fn(potential.layout.split(theta)))


@pytest.mark.slow
def test_closed_form_covers_constant_gaussian_priors_only():
    for name, expected in (("hierarchy", {"v"}), ("constrained", set()), ("conjugate", {"w"})):
        model, args, settings = MODELS[name]
        potential, start = build_potential(model, args, {}, **settings)
        potential.gradient(potential.layout.unconstrain(start), potential.source.draw())
        assert potential._priors.names == expected


def test_data_dependent_control_flow_is_traced_at_every_step(caplog):
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        scale = 1.0 if w > 0 else 2.0
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(w, scale), obs=y)

    y = torch.ones(4)
    potential, _ = build_potential(model, (y,), {})
    with caplog.at_level(logging.WARNING, "pyro_apd"):
        right, left = (potential.gradient(torch.tensor([w]), ())[0] for w in (0.5, -0.5))
    assert potential.path == "traced"
    assert "traced at every step" in caplog.text
    torch.testing.assert_close(right, torch.tensor([0.5 + 4 * (0.5 - 1)]))
    torch.testing.assert_close(left, torch.tensor([-0.5 + 4 * (-0.5 - 1) / 4]))


def test_a_graph_that_is_not_the_model_is_not_used(monkeypatch):
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    def doubled(function, pieces, inputs):
        graph = capture(function, pieces, inputs)
        return lambda *given: (tuple(2 * gradient for gradient in graph(*given)[0]), graph(*given)[1])

    monkeypatch.setattr("pyro_apd.models.potential.capture", doubled)
    potential, _ = build_potential(model, (torch.zeros(4),), {})
    gradient, _ = potential.gradient(torch.tensor([0.5]), ())
    assert potential.path == "traced"
    torch.testing.assert_close(gradient, torch.tensor([2.5]))


def test_a_convolutional_network_is_captured_for_chains_together():
    """Its graph takes weights apart by views, which not every layout in memory allows."""
    x, y = torch.randn(20, 1, 4, 4), torch.arange(20) % 3
    model = BNN(nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(2, 3)))
    kernel = SGLD(model, 1e-3, batch_size=10, compile=False, seed=0)
    chain = kernel.begin((x, y), {}, warmup_steps=0, chains=ChainSet(count=3))
    chain.advance(2)
    assert chain.path == "captured"


def test_autograd_records_nothing_of_modules_that_a_function_refers_to():
    """Their parameters require gradients: the state of a chain, and each draw, would keep all steps before."""
    backbone = nn.Linear(4, 3)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(backbone(x) @ w, 1.0), obs=y)

    potential, start = build_potential(model, (X, X[:, 0]), {}, batch_size=10)
    theta, inputs = potential.layout.unconstrain(start), potential.source.draw()
    gradient, energy = potential.gradient(theta, inputs)
    assert potential.path == "captured"
    assert not gradient.requires_grad
    assert not energy.requires_grad
    with torch.no_grad():
        backbone.weight += 1.0
    torch.testing.assert_close(potential.gradient(theta, inputs)[0], potential.traced_gradient(theta, inputs)[0])
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_capture_can_be_switched_off():
    potential, start = build_potential(Classifier(), (X, LABELS), {}, capture=False)
    potential.gradient(potential.layout.unconstrain(start), ())
    assert potential.path == "traced"


class PartlyBayesian(PyroModule):
    """Has a plain parameter, which Pyro puts into its param store whenever the module is called."""

    def __init__(self):
        super().__init__()
        self.body = PyroModule[nn.Linear](4, 3)
        self.body.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self, x, y):
        logits = self.body(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize("capture", [True, False])
def test_global_state_is_left_alone(capture):
    with pytest.warns(UserWarning, match=r"parameters \['body\.weight'\] that are not sampled"):
        potential, start = build_potential(PartlyBayesian(), (X, LABELS), {}, capture=capture)
    gradient, _ = potential.gradient(potential.layout.unconstrain(start), ())
    assert gradient.shape == (3,)
    assert not gradient.requires_grad
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("prior", [dist.Gamma(2.0, 1.0), dist.HalfCauchy(1.0).expand(())])
def test_priors_keep_their_validation_after_capture(prior):
    def model(y):
        rate = pyro.sample("rate", prior)
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Exponential(rate), obs=y)

    flag = getattr(prior, "base_dist", prior)._validate_args
    potential, start = build_potential(model, (torch.ones(5),), {})
    potential.gradient(potential.layout.unconstrain(start), ())
    assert potential.path == "captured"
    assert getattr(prior, "base_dist", prior)._validate_args is flag


@pytest.mark.parametrize("capture", [True, False])
def test_validation_is_switched_by_the_thread_alone_that_runs_models(capture, monkeypatch):
    alone = []
    switch = pyro.validation_enabled

    def watched(is_on):
        alone.append(threads.MODELS.depth > 0 and threads.MODELS.other_owner is None)
        return switch(is_on)

    monkeypatch.setattr(pyro, "validation_enabled", watched)
    potential, start = build_potential(Classifier(), (X, LABELS), {}, capture=capture)
    potential.gradient(potential.layout.unconstrain(start), potential.source.draw())
    assert alone
    assert all(alone)


def test_a_model_of_gaussians_alone():
    def model():
        pyro.sample("w", dist.Normal(torch.tensor([1.0, 2.0]), 0.5).to_event(1))

    potential, _ = build_potential(model, (), {})
    gradient, energy = potential.gradient(torch.zeros(2), ())
    assert potential.path == "captured"
    torch.testing.assert_close(gradient, torch.tensor([-4.0, -8.0]))
    torch.testing.assert_close(energy, potential.value(torch.zeros(2), ()))


def test_capture_relies_on_what_torch_offers():
    """Notices a torch that moves the two names the capture is built on; it would then fall back to tracing."""
    from torch.fx.experimental.proxy_tensor import make_fx

    assert callable(make_fx)
    assert hasattr(dist.Normal(0.0, 1.0), "_validate_args")
