# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The structure of a model: latents, start, and which sites the kernel scales."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.data.minibatch import FullBatch, PlateSubsample, RowSubsample
from pyro_apd.errors import ModelError
from pyro_apd.models.structure import examine
from pyro_apd.models.tracing import run_model

N = 60
X, Y = torch.linspace(-1, 1, N), torch.linspace(0, 2, N)


def plain(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)


def stating_size(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("belief", dist.Normal(w, 1.0), obs=torch.tensor(0.3))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)


def indexed(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=20) as rows:
        pyro.sample("obs", dist.Normal(w * x[rows], 1.0), obs=y[rows])


def local_latent(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w * x, z), obs=y)


def structure_of(model, source):
    source.start(torch.Generator().manual_seed(0))
    inputs = source.draw()
    return examine(model, source, inputs, run_model(model, source.bind(inputs)))


@pytest.mark.parametrize(
    ("model", "source", "scaled", "pass_through"),
    [
        (plain, FullBatch((X, Y), {}), {}, set()),
        (plain, RowSubsample((X, Y), {}, 20), {"obs": False}, set()),
        (stating_size, RowSubsample((X, Y), {}, 20), {"obs": True}, {"data"}),
        (indexed, PlateSubsample((X, Y), {}, {"data": (N, 20)}), {}, set()),
    ],
)
def test_which_sites_the_kernel_scales(model, source, scaled, pass_through):
    structure = structure_of(model, source)
    assert structure.layout.names == ("w",)
    assert structure.start["w"].shape == ()
    assert structure.scaled == scaled
    assert structure.pass_through == pass_through


def test_local_latents_are_fine_on_the_full_batch():
    structure = structure_of(local_latent, FullBatch((X, Y), {}))
    assert structure.start["z"].shape == (N,)
    assert bool((structure.start["z"] > 0).all()), "constrained"
    assert structure.layout.size == N + 1


def test_parameters_that_are_not_sampled_are_named():
    def model(x, y):
        bias = pyro.param("bias", torch.zeros(()))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w * x + bias, 1.0), obs=y)

    with pytest.warns(UserWarning, match=r"parameters \['bias'\] that are not sampled"):
        structure_of(model, FullBatch((X, Y), {}))


def test_discrete_latents_are_refused():
    def model(x, y):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(z * x, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"'z' is a discrete latent.*Marginalise it"):
        structure_of(model, FullBatch((X, Y), {}))
