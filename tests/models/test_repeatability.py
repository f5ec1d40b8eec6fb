# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Models that draw random numbers, write to their tensors or change from run to run are refused, by name."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_apd.errors import ModelError
from pyro_apd.models.building import build_potential
from pyro_apd.models.repeatability import watched_modules

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 12)


def regression(change):
    """A model whose inputs are changed by ``change``."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        x = change(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    return model


class Net(PyroModule):
    """A network of which ``layer`` acts on the inputs."""

    def __init__(self, layer):
        super().__init__()
        self.encoder = nn.Sequential(nn.Identity(), layer)
        self.head = PyroModule[nn.Linear](3, 1, bias=False)
        self.head.weight = PyroSample(dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))

    def forward(self, x, y):
        f = self.head(self.encoder(x)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)


def sometimes(chance, share=0.5):
    return lambda x: x + 1.0 if chance() < share else x


DRAWING = {
    "noise": lambda x: x + torch.randn_like(x),
    "dropout by function": nn.functional.dropout,
    "one coin": sometimes(lambda: torch.rand(())),
    "a rare event": sometimes(lambda: torch.rand(()), 0.05),
    "one coin of Python": sometimes(random.random),
    "one coin of NumPy": sometimes(np.random.random),
    "a layer of new weights": lambda x: nn.Linear(3, 3)(x).detach(),
}


@pytest.mark.parametrize("case", DRAWING)
@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}], ids=["full", "batches"])
def test_random_numbers_in_the_model(case, settings):
    with pytest.raises(ModelError, match=r"draws random numbers.*'obs'"):
        build_potential(regression(DRAWING[case]), (X, Y), {}, **settings)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.RReLU()])
def test_the_module_that_draws_is_named(layer):
    with pytest.raises(ModelError, match=rf"'encoder.1' \({type(layer).__name__}\).*model.encoder.1.eval\(\)"):
        build_potential(Net(layer), (X, Y), {})
    build_potential(Net(layer.eval()), (X, Y), {})


def test_numbers_that_have_no_effect_are_no_fault():
    potential, _ = build_potential(regression(lambda x: x + 0.0 * torch.randn_like(x)), (X, Y), {})
    expected, _ = build_potential(regression(lambda x: x), (X, Y), {})
    assert torch.equal(potential.value(torch.ones(3), ()), expected.value(torch.ones(3), ()))


def test_a_model_that_counts_its_runs_is_refused():
    calls = []

    def change(x):
        calls.append(None)
        return x + len(calls)

    with pytest.raises(ModelError, match="'obs' has another density in two runs"):
        build_potential(regression(change), (X, Y), {})


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, affine=False, momentum=None)])
def test_a_module_that_writes_to_itself_is_refused_and_restored(layer):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ModelError, match=r"'encoder.1' \(BatchNorm1d\) writes to its 'running_mean'.*\.eval\(\)"):
        build_potential(Net(layer), (X, Y), {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    build_potential(Net(layer.eval()), (X, Y), {})


def test_batch_statistics_without_writing_run_with_the_full_batch():
    potential, _ = build_potential(Net(nn.BatchNorm1d(3, affine=False, track_running_stats=False)), (X, Y), {})
    normalised = nn.functional.batch_norm(X, None, None, training=True)
    expected, _ = build_potential(regression(lambda x: normalised), (X, Y), {})
    torch.testing.assert_close(potential.value(torch.ones(3), ()), expected.value(torch.ones(3), ()))


def test_a_frozen_embedding_with_max_norm_is_refused_and_restored():
    table = nn.Embedding(4, 3, max_norm=0.5).requires_grad_(False)
    before = table.weight.clone()
    with pytest.raises(ModelError, match=r"Embedding.*'weight'.*leave max_norm out"):
        build_potential(regression(lambda x: x + table(torch.arange(12) % 4)), (X, Y), {})
    assert torch.equal(table.weight, before)


def test_latents_that_the_model_writes_to():
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        w.clamp_(-0.1, 0.1)
        pyro.sample("obs", dist.Normal(w.sum(), 1.0), obs=y.mean())

    with pytest.raises(ModelError, match=r"latent site 'w' in place.*clone"):
        build_potential(model, (Y,), {})


@pytest.mark.parametrize(
    "condition", [lambda w: w > 0, lambda w: w < 0, lambda w: w.abs() > 0.7, lambda w: w.abs() < 0.1]
)
def test_a_latent_behind_a_condition(condition):
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0)) if condition(w) else 0.0
        pyro.sample("obs", dist.Normal(w + b, 1.0), obs=y.mean())

    with pytest.raises(ModelError, match=r"Latent site 'b'.*torch\.where"):
        build_potential(model, (Y,), {})


def test_a_site_that_appears_far_from_the_start_ends_the_run():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0)) if w > 50 else 0.0
        pyro.sample("obs", dist.Normal(w + b, 1.0), obs=y.mean())

    potential, _ = build_potential(model, (Y,), {}, capture=False)
    potential.gradient(torch.tensor([0.3]), ())
    with pytest.raises(ModelError, match="Latent site 'b'"):
        potential.gradient(torch.tensor([60.0]), ())


def test_global_generators_and_modes_are_left_alone():
    net = Net(nn.Dropout(0.5).eval())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    build_potential(net, (X, Y), {}, batch_size=4)
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]  # noqa: NPY002
    assert net.training


def test_the_innermost_module_is_found():
    inner = nn.Dropout(0.5)
    with watched_modules(lambda: torch.get_rng_state().tolist()) as effects:
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(inner))(X)
    assert effects.drawing is inner
    assert effects.written == []
