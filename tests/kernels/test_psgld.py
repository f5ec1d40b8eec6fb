# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""PSGLD on ill-conditioned Gaussians, its update equation by hand, and how long the preconditioner is adapted."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value

from pyro_apd.kernels import PSGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.exactness import assert_gaussian, draws_of_chains

# Curvatures 1 and 100 along the axes: condition number 100.
CURVATURE = torch.tensor([100.0, 10.0, 1.0])


def gaussian():
    pyro.sample("w", dist.Normal(MEAN, CURVATURE.rsqrt()).to_event(1))


MEAN = torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "noise"), [(1.0, {}), (0.25, {}), (1.0, {"noise": "three-point", "thinning": 20})]
)
def test_ill_conditioned_gaussian(temperature, noise):
    step_size = 0.015 * temperature**0.5  # the preconditioner follows the gradients, which shrink with temperature
    kernel = PSGLD(gaussian, step_size, seed=0, temperature=temperature, compile=False, **noise)
    draws = draws_of_chains(kernel, (), num_draws=8, every=120, warmup=400)  # chains start at the target
    assert_gaussian(draws, MEAN, torch.diag(temperature / CURVATURE), excess=0.05)


@pytest.mark.slow
def test_collinear_regression():
    x, mean, covariance = collinear_regression()
    kernel = PSGLD(regression, 2.5e-4, seed=0, compile=False, init_strategy=init_to_value(values={"w": mean + 0.1}))
    draws = draws_of_chains(kernel, (x, x.sum(1)), num_draws=8, every=250, warmup=1200)
    assert_gaussian(draws, mean, covariance, excess=0.05)


def collinear_regression():
    """Predictors ``(20, 4)`` with correlations of about 0.8, and the posterior's mean and covariance."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(20, size, generator=generator) for size in (1, 4))
    x = 2 * common + own
    x = (x - x.mean(0)) / x.std(0)
    covariance = torch.linalg.inv(x.T @ x / 0.1 + torch.eye(4))
    return x, covariance @ x.T @ x.sum(1) / 0.1, covariance


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 0.1**0.5), obs=y)


@pytest.mark.slow
def test_mixes_better_than_its_conditioning():
    """With one step size for all, the slowest direction would need 100 times the steps of the fastest."""
    chain = PSGLD(gaussian, 0.03, seed=0, compile=False).begin((), {}, warmup_steps=0, chains=ChainSet(count=512))
    pairs = []
    with torch.no_grad():
        chain.advance(200)
        for _ in range(5):
            chain.advance(80)
            before = chain.theta - MEAN
            chain.advance(20)
            pairs.append((before, chain.theta - MEAN))
    before, after = (torch.cat(states) for states in zip(*pairs, strict=True))
    correlation = (before * after).mean(0) / (before.var(0) * after.var(0)).sqrt()
    # SGLD at the step that is as accurate for the fastest direction keeps exp(-20 * 0.03 / 20) = 0.97 of the slowest.
    assert correlation.max() < 0.85


def test_one_step_by_hand():
    kernel = PSGLD(gaussian, 0.1, temperature=0.0, decay=0.9, stability=0.5)
    kernel.initial_params = {"w": torch.zeros(3)}
    kernel.setup(0)
    first = kernel.sample(kernel.initial_params)["w"]
    gradient = CURVATURE * torch.tensor([-1.0, 2.0, -3.0])
    expected = -0.05 * gradient / (0.5 + gradient.abs())
    torch.testing.assert_close(first, expected)
    second = kernel.sample({"w": first})["w"]
    later = CURVATURE * (first - torch.tensor([1.0, -2.0, 3.0]))
    moment = 0.9 * gradient.square() + 0.1 * later.square()
    torch.testing.assert_close(second, first - 0.05 * later / (0.5 + moment.sqrt()))


def second_moments(kernel, warmup_steps, num_draws):
    """V after each of so many draws of a chain, ``(S, 3)``."""
    chain = kernel.begin((), {}, warmup_steps=warmup_steps)
    found = []
    with torch.no_grad():
        for _ in range(num_draws):
            chain.advance(kernel.thinning)
            found.append(chain.auxiliary["second_moment"][0].clone())
    return torch.stack(found)


def test_the_preconditioner_is_fixed_from_three_quarters_of_the_warm_up_on():
    changes = second_moments(PSGLD(gaussian, 0.01, decay=0.5, thinning=5, seed=0), 20, 24).diff(dim=0).abs().amax(1)
    assert (changes[:14] > 0).all()  # draws 1 to 15, that is up to step 75
    assert (changes[14:] == 0).all()


def test_without_a_warm_up_the_preconditioner_is_adapted_over_its_memory():
    changes = second_moments(PSGLD(gaussian, 0.01, decay=0.9, seed=0), 0, 14).diff(dim=0).abs().amax(1)
    assert (changes[:9] > 0).all()
    assert (changes[9:] == 0).all()


def test_the_longer_the_warm_up_the_more_steps_are_averaged():
    kernel = PSGLD(gaussian, 1e-9, decay=0.5)
    chain = kernel.begin((), {}, warmup_steps=1000)
    chain.auxiliary["steps"][2].fill_(399)  # step 400 is next
    for piece in chain.auxiliary["second_moment"]:
        piece.fill_(1.0)
    square = (CURVATURE * (chain.theta - MEAN)).square()
    with torch.no_grad():
        chain.advance(1)
    torch.testing.assert_close(chain.auxiliary["second_moment"][0], 0.99 + 0.01 * square)


@pytest.mark.parametrize("step", [130, 490])
def test_a_chain_that_is_put_back_has_its_second_moments_of_before(step):
    """Also after they are fixed: a preconditioner by the first gradient after it would be any."""
    kernel = PSGLD(gaussian, "auto", decay=0.5, seed=0, compile=False)
    chain = kernel.begin((), {}, warmup_steps=600, chains=ChainSet(count=2))
    with torch.no_grad():
        chain.advance(step)
        before = chain.auxiliary["second_moment"][0].clone()
        chain.theta = chain.theta + torch.tensor([[0.0], [1e3]])
        chain.advance(20)
    taken, num_adapted, averaged = chain.auxiliary["steps"]
    assert taken.flatten().tolist() == averaged.flatten().tolist() == [step + 20, step + 20]
    assert num_adapted.flatten().tolist() == [450, 450]
    after = chain.auxiliary["second_moment"][0]
    assert float((after / before).log().abs().max()) < (1 if step > 450 else 5)
    assert float(chain.theta.abs().max()) < 1e2


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": 0.0}, {"stability": 0.0}, {"stability": float("nan")}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PSGLD(gaussian, 0.1, **settings)
