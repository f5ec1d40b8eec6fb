# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The models of ``benchmarks.posteriordb`` against densities written out by hand; no data folder is needed."""

import math

import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.autoguide.initialization import InitMessenger

from benchmarks.function_space import difference, make_classification, make_regression
from benchmarks.posteriordb import compare, worst
from benchmarks.posteriordb_models import POSTERIORS
from benchmarks.tuning import TracedPotential, explore, plan
from pyro_apd import SGLD
from pyro_apd.models.building import build_potential

GENERATOR = torch.Generator().manual_seed(3)


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


X = randn(120, 2)
ARGS = {
    "sblrc": (X, X @ torch.tensor([1.0, -2.0]).double() + randn(120)),
    "kidiq": (100 + 15 * X[:, 0], 26 + 60 + 9 * X[:, 0] + 18 * randn(120)),
    "eight_schools": (10 * randn(8), 10 + randn(8).abs()),
    "arK": (X, 0.3 * X[:, 0] + 0.2 * randn(120)),
    "earnings": (66 + 4 * X[:, 0], 10 + 0.2 * X[:, 0] + randn(120)),
}


def normal(x, mean, sd):
    return (-0.5 * ((x - mean) / sd) ** 2 - torch.as_tensor(sd).log() - 0.5 * math.log(2 * math.pi)).sum()


def half_cauchy(x, scale):
    return math.log(2 / (math.pi * scale)) - torch.log1p((x / scale) ** 2)


def by_hand(name, args, values):
    """log joint of constrained values, as MODELS.md of the data folder states it; flat priors count 0."""
    if name == "eight_schools":
        (y, sd), mu, tau, theta = args, values["mu"], values["tau"], values["theta_trans"]
        prior = normal(mu, 0.0, 5.0) + half_cauchy(tau, 5.0) + normal(theta, 0.0, 1.0)
        return prior + normal(y, mu + tau * theta, sd)
    (x, y), beta, sigma = args, values["beta"], values["sigma"]
    if name == "sblrc":
        half_normal = normal(sigma, 0.0, 10.0) + math.log(2)
        return normal(beta, 0.0, 10.0) + half_normal + normal(y, x @ beta, sigma)
    if name == "arK":
        prior = normal(values["alpha"], 0.0, 10.0) + normal(beta, 0.0, 10.0) + half_cauchy(sigma, 2.5)
        return prior + normal(y, values["alpha"] + x @ beta, sigma)
    prior = half_cauchy(sigma, 2.5) if name == "kidiq" else 0.0
    return prior + normal(y, beta[0] + beta[1] * x, sigma)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def points(name):
    """A few constrained values by site, near where the data are."""
    start = POSTERIORS[name].start(ARGS[name])
    if name == "eight_schools":
        start.update(tau=torch.tensor(4.0), theta_trans=torch.zeros(8))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        noise = {s: 0.1 * torch.randn(v.shape, generator=generator) for s, v in start.items()}
        yield {s: v * noise[s].exp() if s in ("sigma", "tau") else v + noise[s] for s, v in start.items()}


@pytest.mark.parametrize("name", ARGS)
def test_density_is_the_one_written_by_hand(name):
    for values in points(name):
        trace = poutine.trace(poutine.condition(POSTERIORS[name].model, values)).get_trace(*ARGS[name])
        torch.testing.assert_close(trace.log_prob_sum(), by_hand(name, ARGS[name], values))


@pytest.mark.parametrize("name", ARGS)
def test_standardised_coordinates_keep_the_distribution(name):
    """The density in standardised coordinates is the original one times the Jacobian, taken here by autograd."""
    posterior, args = POSTERIORS[name], ARGS[name]
    transforms = posterior.transforms(*args)
    for values in points(name):
        standard, log_jacobian = dict(values), 0.0
        for site, transform in transforms.items():
            standard[f"{site}_std"] = start = transform.inv(standard.pop(site))
            jacobian = torch.autograd.functional.jacobian(transform, start)
            log_jacobian = log_jacobian + jacobian.reshape(start.numel(), -1).det().abs().log()
        trace = poutine.trace(poutine.condition(posterior.standardised(args), standard)).get_trace(*args)
        torch.testing.assert_close(trace.log_prob_sum(), by_hand(name, args, values) + log_jacobian)


@pytest.mark.parametrize("name", ["sblrc", "kidiq", "arK", "earnings"])
def test_standardised_regressions_have_about_unit_curvature(name):
    args = ARGS[name]
    target = TracedPotential(POSTERIORS[name].standardised(args), args, POSTERIORS[name].start(args))
    assert target.gradient(target.mode).abs().max() < 1e-6
    curvature = torch.linalg.eigvalsh(target.hessian(target.mode))
    assert curvature.min() > 0.5
    assert curvature.max() < 2.0


@pytest.mark.parametrize("batch_size", [None, 30])
@pytest.mark.parametrize("is_standardised", [False, True])
def test_flat_priors_are_sampled(batch_size, is_standardised):
    """The package's potential of a model with improper priors is the one traced here, also for mini-batches."""
    posterior, args = POSTERIORS["earnings"], ARGS["earnings"]
    model = posterior.standardised(args) if is_standardised else posterior.model
    target = TracedPotential(model, args, posterior.start(args))
    potential, _ = build_potential(InitMessenger(target.init)(model), args, {}, batch_size=batch_size)
    potential.model = model  # as kernels do once a chain has its start
    point = target.mode + 0.1
    # Over one epoch, batches average to the full data.
    batches = 1 if batch_size is None else len(args[0]) // batch_size
    results = [potential.gradient(point, potential.source.draw()) for _ in range(batches)]
    gradient, energy = (torch.stack(parts).mean(0) for parts in zip(*results, strict=True))
    assert potential.path == "captured"
    torch.testing.assert_close(energy, target.value(point))
    torch.testing.assert_close(gradient, target.gradient(point))


@pytest.mark.parametrize("batch_size", [None, 30])
def test_kernels_start_from_flat_priors(batch_size):
    """An improper prior cannot be drawn from; with init_strategy= and initial_params= a run does without."""
    args = ARGS["earnings"]
    target = TracedPotential(POSTERIORS["earnings"].model, args, POSTERIORS["earnings"].start(args))
    kernel = SGLD(target.model, 1e-12, batch_size=batch_size, init_strategy=target.init, seed=0, compile=False)
    start = target.layout.split(target.mode)
    mcmc = MCMC(kernel, 2, 0, initial_params=start, disable_progbar=True)
    mcmc.run(*args)
    torch.testing.assert_close(mcmc.get_samples()["beta"][1], start["beta"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_plan_follows_the_curvature():
    args = ARGS["sblrc"]
    target = TracedPotential(POSTERIORS["sblrc"].standardised(args), args, POSTERIORS["sblrc"].start(args))
    pilot = explore(target, num_points=10)
    full, batched = plan("SGLD", pilot, 120), plan("SGLD", pilot, 120, 30)
    assert full.step_size == pytest.approx(0.4, rel=0.5)  # 4 * 10 % over curvatures of about 1
    # A row's gradients have about the covariance of the full curvature over N, so C is about N / B - 1 = 3.
    assert full.step_size / batched.step_size == pytest.approx(4, rel=0.5)
    assert plan("SGHMC", pilot, 120).step_size == pytest.approx(1.9 * full.step_size, rel=1e-6)


def test_comparison():
    gold = {"a": randn(10, 50), "b": 5 + 2 * randn(10, 50)}
    same = {name: value.flatten() for name, value in gold.items()}
    mean, sd, quantile, _ = worst({"parameters": compare(same, gold)})
    assert (mean, sd, quantile) == (0.0, 1.0, 0.0)
    shifted = {"a": same["a"], "b": 0.5 * (same["b"] - same["b"].mean()) + same["b"].mean() + 1.0}
    rows = compare(shifted, gold)
    assert rows["b"]["mean_error"] == pytest.approx(1 / float(same["b"].std()))
    assert rows["b"]["sd_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("make", [make_regression, make_classification])
def test_potential_that_nuts_samples_is_the_models(make):
    """Up to a constant: the network written out by hand against the Pyro model."""
    problem = make()
    constants = []
    for _ in range(3):
        trace = poutine.trace(problem.model).get_trace(*problem.args)
        values = {name: site["value"] for name, site in trace.iter_stochastic_nodes() if "." in name}
        assert len(values) == 4
        constants.append(trace.log_prob_sum() + problem.potential(values))
        assert problem.function({n: v[None] for n, v in values.items()}, problem.grid).shape == (1, len(problem.grid))
    torch.testing.assert_close(constants[0], constants[1])
    torch.testing.assert_close(constants[0], constants[2])


def test_difference_of_functions():
    draws = torch.randn(400, 6)
    inside = torch.arange(6) < 3
    same = difference(draws, draws, inside, False)
    assert same["mean_max_inside"] == 0.0
    assert same["sd_min_outside"] == 1.0
    moved = difference(draws.mean(0) + 2 * (draws - draws.mean(0)) + 0.5 * draws.std(0), draws, inside, False)
    assert moved["mean_inside"] == pytest.approx(0.5)
    assert moved["sd_outside"] == pytest.approx(2.0)
