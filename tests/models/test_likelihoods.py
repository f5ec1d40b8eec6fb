# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihoods against scipy's densities and against moments by hand; what does not fit is refused by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close

import pyro_apd as apd
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.bnn import BNN
from pyro_apd.models.building import build_potential
from pyro_apd.models.layout import Layout
from pyro_apd.models.networks import Ensemble

N, D = 6, 3
COUNTS = torch.tensor([0, 3, 1, 12, 0, 2])
CLASSES = torch.tensor([0, 3, 2, 2, 1, 0])
REALS = torch.linspace(-2, 3, N)


def mlp(out):
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, out)).double()


def density_by_input(f, y, latents):
    return stats.norm.logpdf(y, f[:, 0], softplus(f[:, 1]) + 0.01)


def density_by_input_of_two(f, y, latents):
    return stats.norm.logpdf(y, f[:, :2], softplus(f[:, 2:]) + 0.3).sum(-1)


def density_t(f, y, latents):
    return stats.t.logpdf(y, 4, f[:, 0], latents["noise_scale"])


def density_t_of_two(f, y, latents):
    return stats.t.logpdf(y, 3, f, 0.5).sum(-1)


def density_poisson(f, y, latents):
    return stats.poisson.logpmf(y, softplus(f[:, 0]))


def density_counts(f, y, latents):
    phi, mean = latents["overdispersion"] ** -2, softplus(f[:, 0])
    return stats.nbinom.logpmf(y, phi, phi / (phi + mean))


def density_ordinal(f, y, latents):
    return dist.OrderedLogistic(f[:, 0], latents["cutpoints"]).log_prob(y)


def density_custom(f, y, latents):
    return stats.laplace.logpdf(y, f[:, 0], f[:, 1].exp())


def laplace(f):
    return dist.Laplace(f[:, 0], f[:, 1].exp())


# Name, outputs, options, targets, density by other means.
CASES = {
    "by input": ("gaussian_by_input", 2, {}, REALS, density_by_input),
    "by input, column": (
        "gaussian_by_input",
        2,
        {},
        REALS.unsqueeze(-1),
        lambda f, y, s: density_by_input(f, REALS, s),
    ),
    "by input, two": (
        "gaussian_by_input",
        4,
        {"noise_floor": 0.3},
        torch.stack([REALS, -REALS], 1),
        density_by_input_of_two,
    ),
    "t": ("student_t", 1, {}, REALS, density_t),
    "t, two": (
        "student_t",
        2,
        {"noise_scale": 0.5, "degrees_of_freedom": 3},
        torch.stack([REALS, -REALS], 1),
        density_t_of_two,
    ),
    "poisson": ("poisson", 1, {}, COUNTS, density_poisson),
    "negative binomial": ("negative_binomial", 1, {}, COUNTS, density_counts),
    "ordinal": ("ordinal", 1, {"num_classes": 4}, CLASSES, density_ordinal),
    "ordinal of two": ("ordinal", 1, {"num_classes": 2}, CLASSES % 2, density_ordinal),
    "custom": (laplace, 2, {}, REALS, density_custom),
}


def made(name, **more):
    likelihood, num_outputs, options, y, density = CASES[name]
    return BNN(mlp(num_outputs), likelihood, **options, **more), y, density


def drawn(model, x, y, seed=0):
    pyro.set_rng_seed(seed)
    trace = poutine.trace(model).get_trace(x, y)
    return trace, {name: trace.nodes[name]["value"] for name in model.priors}


@pytest.fixture
def x():
    return torch.randn(N, D, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_density(name, x):
    model, y, density = made(name)
    trace, values = drawn(model, x, y)
    site = trace.nodes["obs"]
    assert site["fn"].batch_shape == (N,)
    out = trace.nodes["_RETURN"]["value"].reshape(N, -1)
    expected = torch.as_tensor(density(out.detach(), y, values), dtype=torch.float64)
    assert_close(site["fn"].log_prob(site["value"]), expected)
    assert_close(apd.log_likelihood(model, {n: v.unsqueeze(0) for n, v in values.items()}, x, y)[0], expected)


@pytest.mark.parametrize("name", CASES)
def test_predictions(name, x):
    model, y, _ = made(name)
    draws = [drawn(model, x, y, seed)[1] for seed in range(3)]
    draws_S = {n: torch.stack([d[n] for d in draws]) for n in draws[0]}
    out = apd.outputs(model, draws_S, x)
    for s, draw in enumerate(draws):
        fn = poutine.trace(poutine.condition(model, draw)).get_trace(x).nodes["obs"]["fn"]
        base = fn.base_dist if isinstance(fn, dist.Independent) else fn
        if out.probs_SNK is not None:
            assert_close(out.probs_SNK[s], base.probs)
        else:
            assert_close(out.mean_SN[s], base.mean.reshape(-1))
            assert_close(out.variance_SN[s], base.variance.reshape(-1))
    assert apd.Predictive(model, draws_S)(x)["obs"].shape == (3, *(y.squeeze(-1) if y.shape[1:] == (1,) else y).shape)
    assert apd.function_values(model, draws_S, x).isfinite().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_its_density_is_captured(name, batch_size, x):
    """Also with weights of rows; the probes of the scaling accept them."""
    model, y, _ = made(name)
    weights = torch.linspace(0.0, 2.0, N, dtype=torch.float64)
    potential, start = build_potential(model, (x, y, weights), {}, batch_size=batch_size)
    theta = potential.layout.unconstrain(start)
    inputs = potential.source.draw()
    gradient, energy = potential.gradient(theta, inputs)
    assert potential.path == "captured"
    expected, expected_energy = potential.traced_gradient(theta, inputs)
    assert_close(gradient, expected)
    assert_close(energy, expected_energy)


def test_the_median_of_the_cutpoints_makes_classes_equally_probable():
    prior = BNN(mlp(1), "ordinal", num_classes=5).priors["cutpoints"]
    cutpoints = prior.transforms[0](prior.base_dist.base_dist.loc)
    assert_close(cutpoints.sigmoid(), torch.arange(1, 5).double() / 5)


def test_the_probability_of_a_far_class_keeps_its_gradient():
    """OrderedLogistic's difference of two sigmoids would be 0, cut off at the smallest number."""
    model, _, _ = made("ordinal")
    f = torch.tensor([-200.0], requires_grad=True)
    cutpoints = torch.tensor([-1.0, 0.0, 1.0])
    log_prob = model._likelihood.distribution(f, {"cutpoints": cutpoints}).log_prob(torch.tensor([2]))
    assert_close(log_prob, torch.log(torch.tensor([1 - torch.e**-1])) - 200)
    assert_close(torch.autograd.grad(log_prob.sum(), f)[0], torch.ones(1))


def test_a_rate_from_a_wide_prior_does_not_overflow():
    model = BNN(mlp(1).float(), "poisson")
    fn = model._likelihood.distribution(torch.tensor([-500.0, 0.0, 1e4]), {})
    assert_close(fn.rate, torch.tensor([torch.finfo(torch.float32).tiny, torch.log(torch.tensor(2.0)), 1e4]))
    assert fn.log_prob(torch.tensor([1.0, 1.0, 1e4])).isfinite().all()


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "options", "match"),
    [
        ("gaussian_by_input", 3, {}, r"\(6, 2 K\).*gives \(6, 3\).*use likelihood='gaussian'"),
        ("ordinal", 4, {"num_classes": 4}, r"one output for each of 6.*\(6, 4\).*use likelihood='categorical'"),
        ("categorical", 1, {}, "'bernoulli', for classes in an order and one output 'ordinal', for real .*'gaussian'"),
    ],
)
def test_outputs_that_do_not_fit_name_the_likelihood_that_does(likelihood, num_outputs, options, match, x):
    with pytest.raises(ModelError, match=match):
        BNN(mlp(num_outputs), likelihood, **options)(x)


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "options", "y", "match"),
    [
        ("gaussian", 2, {}, REALS, r"shape \(6, 2\).*got \(6,\).*likelihood='gaussian_by_input'"),
        ("gaussian_by_input", 4, {}, REALS, r"shape \(6, 2\), as half of the network's outputs, the means; got \(6,\)"),
        ("gaussian", 4, {}, CLASSES, "4 outputs and one class for each row are those of likelihood='categorical'"),
        ("poisson", 1, {}, REALS, "'poisson' needs counts 0, 1, 2.*'gaussian' or 'student_t'"),
        ("negative_binomial", 1, {}, REALS, "'negative_binomial' needs counts 0, 1, 2"),
        ("bernoulli", 1, {}, COUNTS, "0 and 1; got others.*'categorical'.*'poisson'"),
        ("ordinal", 1, {"num_classes": 3}, CLASSES, "classes 0 to 2, as num_classes=3; got 0 to 3"),
        ("ordinal", 1, {"num_classes": 3}, REALS, "'ordinal' needs class indices.*likelihood='gaussian' for real"),
    ],
)
def test_targets_that_do_not_fit_name_the_likelihood_that_does(likelihood, num_outputs, options, y, match, x):
    with pytest.raises(DataError, match=match):
        BNN(mlp(num_outputs), likelihood, **options)(x, y)


@pytest.mark.parametrize("name", ["poisson", "negative binomial"])
def test_every_row_is_checked_before_the_first_step(name):
    model, _, _ = made(name)
    y = torch.zeros(500)
    y[437] = 1.5
    with pytest.raises(DataError, match=r"counts|1\.5 in row 437"):
        apd.SGLD(model, 1e-3, batch_size=10).setup(0, torch.randn(500, D, dtype=torch.float64), y)


def test_the_dtype_of_the_network_is_kept(x):
    for name in CASES:
        model, y, _ = made(name)
        y = y.float() if y.is_floating_point() else y
        model = model.float()
        values = drawn(model, x.float(), y)[1]
        assert {value.dtype for value in values.values()} == {torch.float32}, name
        assert apd.log_likelihood(model, {n: v[None] for n, v in values.items()}, x.float(), y).dtype == torch.float32


LINKS = {
    "gaussian_by_input": (4, {}),
    "student_t": (2, {}),
    "poisson": (1, {}),
    "negative_binomial": (2, {}),
}


@pytest.mark.parametrize("likelihood", LINKS)
def test_an_ensemble_averages_the_means(likelihood, x):
    num_outputs, options = LINKS[likelihood]
    model = BNN(mlp(num_outputs), likelihood, **options)
    draws = {name: prior.sample((3,)) for name, prior in model.priors.items()}
    layout = Layout.from_draws(draws)
    expected = apd.outputs(model, draws, x).mean_SN.mean(0)
    assert_close(Ensemble(model, layout, draws)(x).reshape(-1), expected)


def test_an_ensemble_of_what_needs_further_latents_asks_for_a_link(x):
    model = BNN(mlp(1), "ordinal", num_classes=3)
    draws = {name: prior.sample((3,)) for name, prior in model.priors.items()}
    layout = Layout.from_draws(draws)
    with pytest.raises(ValueError, match=r"'ordinal' alone do not give its predictions\. Pass link='identity'"):
        Ensemble(model, layout, draws)
    assert Ensemble(model, layout, draws, link="identity")(x).shape == (N, 1)
