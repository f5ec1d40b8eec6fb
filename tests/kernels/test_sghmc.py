# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SGHMC against an exact posterior, and against SGLD where the two are the same."""

import pytest
import torch
from pyro.infer import MCMC

from pyro_apd.kernels import SGHMC, SGLD
from tests.support.exactness import assert_gaussian, draws_of_chains
from tests.support.models import Conjugate

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


def draws_of(kernel, num_samples):
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=50, disable_progbar=True)
    mcmc.run(*DATA)
    return mcmc.get_samples()["w"]


def discretised(covariance, step_size, friction, temperature):
    """The covariance that the recursion itself settles at, direction by direction."""
    values, vectors = torch.linalg.eigh(covariance / temperature)
    variances = []
    for curvature in (1 / values).tolist():
        keep, pull = 1 - friction, step_size / 2 * curvature
        move = torch.tensor([[1 - pull, keep], [-pull, keep]], dtype=torch.float64)  # of theta and momentum
        noise = torch.ones(2, 2, dtype=torch.float64) * friction * temperature * step_size
        state = torch.zeros(2, 2, dtype=torch.float64)
        for _ in range(2000):
            state = move @ state @ move.T + noise
        variances.append(state[0, 0])
    vectors = vectors.double()
    return vectors * torch.stack(variances) @ vectors.T


@pytest.mark.slow
@pytest.mark.parametrize(
    ("friction", "temperature", "noise"),
    [(0.1, 1.0, "normal"), (0.1, 0.25, "normal"), (0.5, 1.0, "normal"), (0.5, 1.0, "three-point")],
)
def test_exact_gaussian_posterior(friction, temperature, noise):
    settings = {"friction": friction, "temperature": temperature, "noise": noise, "thinning": 20}
    kernel = SGHMC(PROBLEM.full, 4e-4, seed=1, compile=False, **settings)
    exact = Conjugate(temperature=temperature)
    expected = discretised(exact.covariance, 4e-4, friction, temperature)
    assert abs(expected.trace() / exact.covariance.trace() - 1) < 0.03
    assert_gaussian(draws_of_chains(kernel, DATA, num_chains=256), exact.mean, expected)


def test_full_friction_is_sgld():
    sgld = draws_of(SGLD(PROBLEM.full, 1e-3, seed=1), 20)
    sghmc = draws_of(SGHMC(PROBLEM.full, 1e-3, friction=1.0, seed=1), 20)
    torch.testing.assert_close(sghmc, sgld)


@pytest.mark.slow
def test_noise_estimate_corrects_the_heat_of_mini_batches():
    """The variance V of the gradient's estimate is known here; b = eps V / (4 T) is its share of the friction's noise.

    Rows are drawn with replacement: an epoch without replacement cancels most of the noise by itself.
    """
    step_size, friction, batch_size = 2e-4, 0.2, 20
    residual = (PROBLEM.x @ PROBLEM.mean - PROBLEM.y).unsqueeze(-1) * PROBLEM.x
    n = len(residual)
    estimate = float(step_size / 4 * n * n / batch_size * residual.var(0).mean())
    ratios = []
    for b in (0.0, estimate):
        kernel = SGHMC(
            PROBLEM.full, step_size, friction=friction, noise_estimate=b, batch_size=batch_size, replacement=True,
            seed=1, compile=False,
        )  # fmt: skip
        draws = draws_of_chains(kernel, DATA, num_chains=128, every=20)
        ratios.append(torch.cov(draws.flatten(0, 1).T).trace() / PROBLEM.covariance.trace())
    assert ratios[0] > 1.2
    assert abs(ratios[1] - 1) < 0.1


@pytest.mark.parametrize(
    "settings", [{"friction": 0.0}, {"friction": 1.5}, {"noise_estimate": -0.1}, {"noise_estimate": 0.1}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SGHMC(PROBLEM.full, 1e-3, **settings)
