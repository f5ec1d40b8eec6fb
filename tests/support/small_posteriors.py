# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Small networks with known posteriors: draws of a normal distribution around a network that fits its data."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample


class Classifier(PyroModule):
    """2-4-3, tanh."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = PyroModule[torch.nn.Linear](2, 4), PyroModule[torch.nn.Linear](4, 3)
        for layer in (self.hidden, self.out):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))

    def forward(self, x, y=None):
        logits = self.out(torch.tanh(self.hidden(x)))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def regression(x, y=None):
    """A line with known slope sites and a noise scale."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


class SGLD:
    """What the diagnostics look at of a kernel."""

    def __init__(self, model, step_size=1e-3, temperature=1.0):
        self.model, self.step_size, self.temperature = model, step_size, temperature


class StubMCMC:
    """What the diagnostics look at of ``pyro.infer.MCMC`` after ``run``."""

    def __init__(self, draws, model, args=(), diagnostics=True):
        self._draws, self._args, self._kwargs = draws, args, {}
        self.num_chains, self.num_samples = next(iter(draws.values())).shape[:2]
        self.kernel = SGLD(model)
        generator = torch.Generator().manual_seed(0)
        potential = torch.randn(self.num_chains, self.num_samples, generator=generator) + 50
        if diagnostics:
            self._diagnostics = [
                {"divergences": [1] if c == 0 else [], "potential": potential[c], "name": "ignored"}
                for c in range(self.num_chains)
            ]

    def get_samples(self, num_samples=None, group_by_chain=False):
        return self._draws if group_by_chain else {n: v.flatten(0, 1) for n, v in self._draws.items()}

    def diagnostics(self):
        raise AssertionError("computes R-hat of every weight")


class StubPosterior:
    """What the diagnostics look at of a ``DistilledPosterior``."""

    def __init__(self, sampler, num_bytes=8 * 27 * 4):
        self.training_log = {"step": [0, 10, 20], "critic_loss": [1.0, 0.5, 0.2], "kind": ["a", "b", "c"]}
        self.metadata = {"format": 1, "note": "<b>&"}
        self._sampler, self.num_bytes = sampler, num_bytes

    def get_samples(self, num_samples=None, group_by_chain=False):
        return self._sampler(100 if num_samples is None else num_samples)


def autoregressive(num_chains, num_draws, shape, a, generator):
    """Stationary standard normal draws ``(C, S, ...)`` with autocorrelation ``a``."""
    state, draws = torch.randn(num_chains, *shape, generator=generator), []
    for _ in range(num_draws):
        state = a * state + (1 - a * a) ** 0.5 * torch.randn(num_chains, *shape, generator=generator)
        draws.append(state)
    return torch.stack(draws, 1)


@pytest.fixture(scope="session")
def case():
    """A classifier, its data, the centre of its posterior, and functions that draw chains and generators from it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (150,), generator=generator)
    x = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])[y] + torch.randn(150, 2, generator=generator)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    sites = ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    centre = {site: p.detach().clone() for site, p in zip(sites, net.parameters(), strict=True)}

    def chain(num_chains=4, num_draws=100, sd=0.4, a=0.0, spread=0.0, seed=1):
        g = torch.Generator().manual_seed(seed)
        return {
            n: v + spread * torch.randn(num_chains, 1, *v.shape, generator=g)
            + sd * autoregressive(num_chains, num_draws, v.shape, a, g)
            for n, v in centre.items()
        }  # fmt: skip

    def posterior(sd=0.4, num_bytes=8 * 27 * 4, shift=0.0):
        return StubPosterior(
            lambda n: {s: v + shift + sd * torch.randn(n, *v.shape) for s, v in centre.items()}, num_bytes
        )

    return SimpleNamespace(
        **{"model": Classifier(), "x": x, "y": y, "ood": {"far": 4 * x.flip(0)}},
        **{"centre": centre, "chain": chain, "posterior": posterior},
        **{"regression": regression, "StubMCMC": StubMCMC, "StubPosterior": StubPosterior},
    )
