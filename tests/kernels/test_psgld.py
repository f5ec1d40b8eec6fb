# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""PSGLD on an ill-conditioned Gaussian, and its update equation by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.kernels import PSGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.step import Step
from tests.support.exactness import STANDARD_ERRORS, draws_of_chains

# Curvatures 1 and 100 along the axes: condition number 100.
CURVATURE = torch.tensor([100.0, 10.0, 1.0])


def gaussian():
    pyro.sample("w", dist.Normal(MEAN, CURVATURE.rsqrt()).to_event(1))


MEAN = torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_ill_conditioned_gaussian(temperature):
    step_size = 0.03 * temperature**0.5  # the preconditioner follows the gradients, which shrink with temperature
    kernel = PSGLD(gaussian, step_size, seed=0, temperature=temperature, decay=0.999, compile=False)
    # Chains start at the target; the preconditioner forgets its first gradient within some thousand steps.
    draws = draws_of_chains(kernel, (), num_draws=10, every=100, warmup=4000)
    white = (draws - MEAN) / (temperature / CURVATURE).sqrt()
    error = white.mean(1).std(0) / len(white) ** 0.5
    assert (white.mean((0, 1)).abs() < STANDARD_ERRORS * error).all()
    assert error.max() < 0.03
    assert (torch.cov(white.flatten(0, 1).T) - torch.eye(3)).abs().max() < 0.15


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


def test_gamma_is_the_derivative_of_the_preconditioner():
    kernel = PSGLD(gaussian, 0.1, decay=0.9, stability=0.5, use_gamma=True)
    mean, before = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.rand(3, dtype=torch.float64) * 50
    theta = torch.tensor([1.5, 0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def gradient_at(theta_by_site):
        return (CURVATURE.double() * (theta_by_site[0] - mean),)

    scale = 1 / (0.5 + (0.9 * before + 0.1 * gradient_at((theta,))[0].square()).sqrt())
    (expected,) = torch.autograd.grad(scale.sum(), theta)  # the Hessian is diagonal
    step = Step(
        theta=(theta.detach(),),
        auxiliary={"second_moment": (before,)},
        gradient=gradient_at((theta.detach(),)),
        noise=(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64),),
        size=torch.tensor(0.1),
        gradient_at=gradient_at,
        num_data=1,
    )
    torch.testing.assert_close(kernel._gamma(step)[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": 0.0}, {"stability": 0.0}, {"stability": float("nan")}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PSGLD(gaussian, 0.1, **settings)
