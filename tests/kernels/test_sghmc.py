# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SGHMC against an exact posterior, and against SGLD where the two are the same."""

import pytest
import torch
from pyro.infer import MCMC
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pyro_apd.kernels import SGHMC, SGLD
from tests.support.models import Conjugate

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


def draws_of(kernel, num_samples=2000, args=DATA):
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=50, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()["w"]


@pytest.mark.slow
@pytest.mark.parametrize(("friction", "temperature"), [(0.1, 1.0), (0.1, 0.25), (0.5, 1.0)])
def test_exact_gaussian_posterior(friction, temperature):
    draws = draws_of(SGHMC(PROBLEM.full, 4e-4, friction=friction, temperature=temperature, thinning=10, seed=1))
    exact = Conjugate(temperature=temperature)
    assert ((draws.mean(0) - exact.mean).abs() < 0.1 * exact.covariance.diagonal().sqrt()).all()
    assert abs(torch.cov(draws.T).trace() / exact.covariance.trace() - 1) < 0.15


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
    rows = TensorDataset(*DATA)
    batches = DataLoader(rows, batch_size=batch_size, sampler=RandomSampler(rows, replacement=True))
    ratios = []
    for b in (0.0, estimate):
        kernel = SGHMC(PROBLEM.full, step_size, friction=friction, noise_estimate=b, thinning=20, seed=1)
        draws = draws_of(kernel, 1200, (batches,))
        ratios.append(torch.cov(draws.T).trace() / PROBLEM.covariance.trace())
    assert ratios[0] > 1.2
    assert abs(ratios[1] - 1) < 0.12


@pytest.mark.parametrize(
    "settings", [{"friction": 0.0}, {"friction": 1.5}, {"noise_estimate": -0.1}, {"noise_estimate": 0.1}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SGHMC(PROBLEM.full, 1e-3, **settings)
