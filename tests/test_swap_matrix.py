# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A distilled posterior stands in for MCMC's draws and for a guide, cell by cell, on five kinds of models."""

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, Predictive
from torch import nn
from torch.distributions import constraints

import pyro_apd as apd
from pyro_apd.generators import PaperGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import NOISE_SITE, DistilledPosterior

S = 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, generator=GENERATOR)
LABELS, TARGETS = torch.arange(6) % 3, torch.randn(6, generator=GENERATOR)


def batched(x, y=None):
    """An MLP whose layers take a dimension of draws, as Pyro's parallel prediction needs."""
    first = pyro.sample("first", dist.Normal(torch.zeros(5, 4), 1.0).to_event(2))
    second = pyro.sample("second", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
    logits = torch.tanh(x @ first) @ second
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def subsampled(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        mean = (x[rows] * w.unsqueeze(-2)).sum(-1)
        return pyro.sample("obs", dist.Normal(mean, 1.0), obs=None if y is None else y[rows])


def constrained(x, y=None):
    """No network: a simplex and correlations, in plates of their own."""
    mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    mean = mix[..., :1] + x[:, 0] * corr[..., 2, :1]
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, scale), obs=y)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 2), nn.Linear(32, 3)

    def forward(self, x):
        images = x[:, None, None, :].expand(-1, 1, 5, 5)
        return self.out(torch.relu(self.conv(images)).flatten(1))


MODELS = {
    "classifier": (lambda: batched, LABELS),
    "regression": (lambda: apd.BNN(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)), "gaussian"), TARGETS),
    "conv": (lambda: apd.BNN(Images()), LABELS),
    "subsampled": (lambda: subsampled, TARGETS),
    "constrained": (lambda: constrained, TARGETS),
}
# Pyro's parallel prediction needs layers that take a dimension of draws.
PARALLEL = ("classifier", "subsampled", "constrained")


class Case:
    """A model, draws of it by MCMC, and a distilled posterior of its sites."""

    def __init__(self, name):
        make, self.y = MODELS[name]
        self.name, self.model = name, make()
        kernel = apd.SGLD(self.model, step_size=1e-4, seed=0, compile=False)
        self.mcmc = MCMC(kernel, num_samples=S, warmup_steps=1, disable_progbar=True)
        self.mcmc.run(X, self.y)
        trace = poutine.trace(self.model).get_trace(X, self.y)
        layout = Layout.from_trace(trace)
        self.posterior = DistilledPosterior(layout, PaperGenerator(layout.size, 3, 8))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    import warnings

    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", apd.WarmupWarning)
        return Case(request.param)


def described(values):
    return {name: (tuple(value.shape), value.dtype) for name, value in values.items()}


def assert_in_support(layout, values):
    for site in layout:
        value = values[site.name].reshape(-1, *site.shape)
        support = constraints.independent(site.support, len(site.shape) - site.support.event_dim)
        assert bool(support.check(value).all()), site


@pytest.mark.parametrize("group_by_chain", [False, True])
def test_get_samples(case, group_by_chain):
    theirs = case.mcmc.get_samples(S, group_by_chain=group_by_chain)
    ours = case.posterior.get_samples(S, group_by_chain=group_by_chain)
    assert described(ours) == described(theirs)
    assert_in_support(case.posterior.layout, ours)


@pytest.mark.parametrize("predictive", [Predictive, apd.Predictive])
def test_posterior_samples_and_guide(case, predictive):
    of_mcmc = predictive(case.model, case.mcmc.get_samples())(X)
    assert described(predictive(case.model, case.posterior.get_samples(S))(X)) == described(of_mcmc)
    every = predictive(case.model, case.mcmc.get_samples(), return_sites=None)(X)
    of_guide = predictive(case.model, guide=case.posterior, num_samples=S, return_sites=tuple(every))(X)
    assert described(of_guide) == described(every)
    assert_in_support(case.posterior.layout, of_guide)
    for name in case.posterior.layout.names:
        assert len(of_guide[name].reshape(S, -1).unique(dim=0)) == S


def test_parallel(case):
    if case.name not in PARALLEL:
        pytest.skip("Pyro's own parallel prediction cannot do a network of ordinary layers")
    of_mcmc = Predictive(case.model, case.mcmc.get_samples(), parallel=True)(X)
    ours = Predictive(case.model, case.posterior.get_samples(S), parallel=True)(X)
    assert described(ours) == described(of_mcmc)
    guided = Predictive(case.model, guide=case.posterior, num_samples=S, parallel=True)(X)
    assert described({"obs": guided["obs"]}) == described({"obs": of_mcmc["obs"]})
    name = case.posterior.layout.names[0]
    assert len(guided[name].reshape(S, -1).unique(dim=0)) == S


def test_condition_and_replay(case):
    draw = case.posterior.sample()
    conditioned = poutine.trace(poutine.condition(case.model, draw)).get_trace(X)
    guide_trace = poutine.trace(case.posterior).get_trace(X, case.y)
    replayed = poutine.trace(poutine.replay(case.model, guide_trace)).get_trace(X, case.y)
    latents = {n for n, s in guide_trace.nodes.items() if s["type"] == "sample"}
    assert latents == {NOISE_SITE, *case.posterior.layout.names}
    for name in case.posterior.layout.names:
        assert torch.equal(conditioned.nodes[name]["value"], draw[name])
        assert torch.equal(replayed.nodes[name]["value"], guide_trace.nodes[name]["value"])
    assert torch.isfinite(replayed.log_prob_sum())


def test_arviz(case):
    ours, theirs = (
        az.from_dict(posterior={n: v.numpy() for n, v in draws.items()}).posterior
        for draws in (case.posterior.get_samples(S, group_by_chain=True), case.mcmc.get_samples(group_by_chain=True))
    )
    assert dict(ours.sizes) == dict(theirs.sizes)
    assert set(ours.data_vars) == set(theirs.data_vars)


def test_save_and_load(case, tmp_path):
    case.posterior.save(tmp_path / "p")
    again = DistilledPosterior.load(tmp_path / "p")
    for name, value in case.posterior.get_samples(S, seed=1).items():
        assert torch.equal(again.get_samples(S, seed=1)[name], value)


def test_dtype(case):
    doubled = case.posterior.rounded("float32").to(device="cpu", dtype=torch.float64)
    draws = doubled.get_samples(S)
    assert {value.dtype for value in draws.values()} == {torch.float64}
    assert_in_support(doubled.layout, draws)


def test_parity_with_autoguides(case):
    median = case.posterior.median(200, seed=0)
    bounds = case.posterior.quantiles([0.1, 0.9], 200, seed=0)
    for site in case.posterior.layout:
        assert median[site.name].shape == site.shape
        assert bounds[site.name].shape == (2, *site.shape) == bounds.error[site.name].shape
    assert_in_support(case.posterior.layout, median)
    assert_in_support(case.posterior.layout, bounds)


def test_between_two_networks_is_a_network(case):
    ends = torch.randn(2, case.posterior.latent_size)
    latent = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 9).unsqueeze(1))
    path = case.posterior.sample(latent=latent)
    assert_in_support(case.posterior.layout, path)
    for name, value in case.posterior.sample(latent=ends).items():
        torch.testing.assert_close(path[name][[0, -1]], value)
    # The steps are small where those of the latent are.
    fine = case.posterior.sample(latent=torch.lerp(ends[0], ends[1], torch.tensor([0.5, 0.501]).unsqueeze(1)))
    for name, value in fine.items():
        assert (value[0] - value[1]).abs().max() < 0.1 * (1 + path[name].abs().max())


def _draw_in_child(posterior, queue):
    torch.set_num_threads(1)
    queue.put({name: value.tolist() for name, value in posterior.get_samples(2, seed=5).items()})


@pytest.mark.thorough
def test_spawn():
    layout = Layout({"w": (2, 3), "scale": ()}, {"scale": constraints.positive})
    posterior = DistilledPosterior(layout, PaperGenerator(layout.size, 3, 8))
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_draw_in_child, args=(posterior, queue))
    process.start()
    drawn = queue.get()
    process.join()
    assert process.exitcode == 0
    for name, value in posterior.get_samples(2, seed=5).items():
        torch.testing.assert_close(torch.tensor(drawn[name]), value)
