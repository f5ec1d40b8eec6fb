# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Pushes of a velocity of length one, and adjusted trajectories against exact distributions at large steps."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.kernels import MCLMC
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.isokinetic import kicked, pointing_down
from tests.support.exactness import assert_gaussian
from tests.support.models import Conjugate

PROBLEM = Conjugate()
SD = math.sqrt(float(PROBLEM.covariance.trace()) / 3)


def unit(*shape, seed=0, dtype=torch.float64):
    vector = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return vector / vector.norm(dim=-1, keepdim=True)


def test_a_kick_is_the_stated_formula():
    velocity, downhill = unit(5, 7), unit(5, 7, seed=1)
    delta = torch.tensor([0.0, 1e-6, 0.1, 1.0, 10.0], dtype=torch.float64).unsqueeze(-1)
    cosine = (velocity * downhill).sum(-1, keepdim=True)
    scale = delta.cosh() + cosine * delta.sinh()
    expected = (velocity + downhill * (delta.sinh() + cosine * (delta.cosh() - 1))) / scale
    found, gain = kicked(velocity, downhill, delta)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gain, scale.log())
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("delta", [200.0, 1e10, 1e30])
def test_the_largest_gradients_do_not_overflow(delta):
    velocity = torch.stack([unit(7, dtype=torch.float32), -unit(7, seed=1, dtype=torch.float32)])
    downhill = unit(7, seed=1, dtype=torch.float32).expand(2, 7)
    found, gain = kicked(velocity, downhill, torch.full((2, 1), delta))
    torch.testing.assert_close(found[0], downhill[0])
    assert bool(torch.isfinite(found).all() & torch.isfinite(gain).all())


def test_the_direction_of_steepest_descent():
    downhill, norm = pointing_down(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(downhill, torch.tensor([[-0.6, -0.8], [0.0, 0.0]]))
    assert norm.tolist() == [[5.0], [0.0]]


def adjusted(model, args, step_size, *, num_chains, leaps, every, **settings):
    """Draws ``(C, 20, n)`` of trajectories with a given epsilon, and the mean probability of acceptance."""
    kernel = MCLMC(model, step_size, adjusted=True, leaps=leaps, seed=1, **settings)
    chain = kernel.begin(args, {}, warmup_steps=0, num_samples=20, chains=ChainSet(count=num_chains))
    draws = []
    with torch.no_grad():
        chain.advance(10 * every)
        for _ in range(20):
            chain.advance(every)
            draws.append(chain.theta.double())
    _, _, count, accepted = chain.auxiliary["energy"]
    return torch.stack(draws, 1), float((accepted / count).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "temperature", "lowest", "highest"), [(1.0, 1.0, 0.95, 1.0), (2.5, 1.0, 0.4, 0.8), (1.5, 0.25, 0.3, 0.7)]
)
def test_correlated_gaussian_at_steps_that_are_too_large_for_unadjusted_ones(share, temperature, lowest, highest):
    exact = Conjugate(temperature=temperature)
    settings = {"num_chains": 512, "leaps": 3, "every": 3, "temperature": temperature}
    draws, acceptance = adjusted(PROBLEM.full, (PROBLEM.x, PROBLEM.y), share * SD, **settings)
    assert lowest < acceptance < highest
    assert_gaussian(draws, exact.mean, exact.covariance)


@pytest.mark.slow
def test_tails_of_a_students_t():
    """Of 4 degrees of freedom: shares outside of its quantiles, within 4.5 standard errors by chains."""

    def model():
        pyro.sample("w", dist.StudentT(4.0, 0.0, 1.0).expand([5]).to_event(1))

    draws, _ = adjusted(model, (), 1.5, num_chains=1024, leaps=4, every=3)
    for quantile, share in ((0.7407, 0.5), (2.1318, 0.1), (4.6041, 0.01), (8.6103, 0.001)):
        outside = (draws.abs() > quantile).double().mean((1, 2))
        error = float(outside.std()) / math.sqrt(len(outside))
        assert float(outside.mean()) == pytest.approx(share, abs=4.5 * error), quantile
        assert error < 0.1 * share or share < 0.01


@pytest.mark.slow
def test_a_state_without_a_density_is_rejected():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("edge", torch.where(w.sum(-1) > -0.5, 0.0, torch.nan))

    kernel = MCLMC(model, 0.8, adjusted=True, leaps=3, seed=0)
    chain = kernel.begin((), {}, warmup_steps=0, num_samples=1, chains=ChainSet(count=64))
    with torch.no_grad():
        chain.theta = torch.full((64, 2), 0.2)
        chain.advance(60)
    assert bool((chain.theta.sum(-1) > -0.5).all())
    assert len(chain.theta.unique(dim=0)) == 64
