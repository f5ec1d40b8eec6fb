# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One network learns what many predict on average."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_apd.baselines import dark_knowledge
from pyro_apd.errors import ModelError
from pyro_apd.generators import LowRankGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.predictive import outputs
from tests.support.models import Classifier

X = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
SITES = {"first.weight": (6, 4), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,)}


def draws():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(20, *shape, generator=generator) for name, shape in SITES.items()}


def student(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, outputs))


@pytest.mark.slow
def test_a_student_predicts_the_average_of_a_chain():
    model, net = Classifier(), student(3)
    before = [p.clone() for p in net.parameters()]
    taught = dark_knowledge(
        draws(), model, net, X, num_steps=200, learning_rate=0.03, draws_per_step=60, seed=0, progress=False
    )
    mean_NK = outputs(model, draws(), X).probs_SNK.mean(0)
    error, start = (taught(X) - mean_NK).abs().mean(), (mean_NK - mean_NK.mean(0)).abs().mean()
    assert error < 0.4 * start
    assert_close(taught(X).sum(-1), torch.ones(len(X)))
    assert taught.losses[-1] < taught.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)), "the caller's net was trained"


@pytest.mark.slow
def test_of_a_generator_and_with_noise():
    layout = Layout(SITES)
    posterior = DistilledPosterior(layout, LowRankGenerator(layout.size, 2))
    with torch.no_grad():
        posterior.generator.location.normal_()
    taught = dark_knowledge(
        posterior,
        Classifier(),
        student(3),
        X,
        num_steps=150,
        learning_rate=0.03,
        input_noise=0.1,
        seed=0,
        progress=False,
    )
    mean_NK = outputs(Classifier(), posterior.get_samples(10, seed=0), X).probs_SNK.mean(0)
    assert (taught(X) - mean_NK).abs().mean() < 0.08


def regression(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 0.5))


@pytest.mark.slow
def test_a_regression_learns_both_moments_of_the_mixture():
    given = {"w": torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 2.0]])}
    taught = dark_knowledge(
        given, regression, student(2), X, num_steps=400, learning_rate=0.03, draws_per_step=40, seed=0, progress=False
    )
    mean_N, variance_N = taught(X).unbind(-1)
    assert (mean_N - X[:, 0] - X[:, 3]).abs().median() < 0.15
    assert (variance_N.log() - (0.25 + X[:, 3] ** 2).log()).abs().median() < 0.3


def test_one_logit():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w))

    given = {"w": torch.tensor([[2.0, 0, 0, 0]])}
    taught = dark_knowledge(given, model, student(1), X, num_steps=200, learning_rate=0.03, seed=0, progress=False)
    assert (taught(X)[:, 1] - (2 * X[:, 0]).sigmoid()).abs().mean() < 0.05


def test_seeds_repeat_and_leave_the_global_generator_alone():
    net = Classifier()
    first = nn.Linear(4, 3)
    state = torch.get_rng_state()
    one, two, other = (
        dark_knowledge(draws(), net, first, X, num_steps=3, seed=seed, progress=False).losses for seed in (0, 0, 1)
    )
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_refused():
    net, model = student(3), Classifier()
    for name in ("num_steps", "batch_size", "draws_per_step"):
        with pytest.raises(ValueError, match=f"{name}=0 must be a positive integer"):
            dark_knowledge(draws(), model, net, X, **{name: 0})
    for name in ("learning_rate", "weight_decay", "input_noise"):
        with pytest.raises(ValueError, match=f"{name}=-1.0 must be a finite number >= 0"):
            dark_knowledge(draws(), model, net, X, **{name: -1.0})
    with pytest.raises(ValueError, match=r"outputs of shape \(100, 2\), and \(100, 3\) are needed"):
        dark_knowledge(draws(), model, student(2), X, progress=False)
    with pytest.raises(TypeError, match="`source` must be an MCMC"):
        dark_knowledge(3, model, net, X)
    with pytest.raises(ValueError, match=r"`x` must be a tensor of inputs.*got list"):
        dark_knowledge(draws(), model, net, [1.0])

    def together(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal((x @ w).sum(), 1.0))

    with pytest.raises(ModelError, match="one number for each of the 100 rows"):
        dark_knowledge({"w": torch.randn(3, 4)}, together, student(2), X)

    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`x` holds NaN or infinity in 200 of 200 rows"):
            dark_knowledge(draws(), model, net, X * value)
    broken = student(3)
    broken[0].weight.data.fill_(float("nan"))
    for wrong, message in [
        (broken, "`student` has NaN or infinity in its parameter"),
        (nn.Identity(), "`student` must be a torch.nn.Module with parameters to train; got Identity"),
        (lambda x: x, "got function"),
        (nn.Linear(7, 3), r"`student` fails on rows of `x` of shape \(100, 4\)"),
        (student(3).double(), "`student` fails on rows of `x`"),
    ]:
        with pytest.raises(ValueError, match=message):
            dark_knowledge(draws(), model, wrong, X, progress=False)


def test_a_student_that_diverges_is_not_given_back():
    with pytest.raises(RuntimeError, match=r"diverged: its loss is not finite from step \d+ on.* than 1e\+37"):
        dark_knowledge(draws(), Classifier(), student(3), X, num_steps=20, learning_rate=1e37, seed=0, progress=False)
