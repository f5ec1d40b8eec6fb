# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The preconditioner from the noise of mini-batches, on gradients of known noise, and what a chain makes of it."""

from types import SimpleNamespace

import pytest
import torch

from pyro_apd.chains.driver import MCMC
from pyro_apd.kernels import MCLMC
from pyro_apd.kernels.adaptation.batch_noise import BatchNoise
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.exactness import assert_gaussian
from tests.support.models import Conjugate

NOISE = torch.tensor([10.0, 1.0, 0.1])
SDS = torch.tensor([0.5, 2.0, 1.0])


def chain(epoch_length=None):
    generator = torch.Generator().manual_seed(0)

    def gradient(theta, inputs):
        return 7.0 + NOISE * torch.randn(2, 3, generator=generator), torch.zeros(2)

    return SimpleNamespace(
        theta=torch.zeros(2, 3),
        potential=SimpleNamespace(source=SimpleNamespace(epoch_length=epoch_length, draw=tuple)),
        estimator=SimpleNamespace(gradient=gradient),
        auxiliary={"scale": (torch.ones(2, 3),)},
    )


CHAIN = chain()


def test_scales_are_one_over_the_noise_and_of_the_size_of_the_sds():
    noise = BatchNoise(1.0)
    for _ in range(1000):
        noise.add(CHAIN)
    scale = noise.preconditioner(SDS)
    torch.testing.assert_close(scale, (1 / NOISE).expand(2, 3), rtol=0.1, atol=0.0)
    torch.testing.assert_close(scale.log().mean(-1), SDS.log().mean().expand(2))
    assert torch.equal(noise.preconditioner(SDS), SDS)  # a new window, without a difference yet


def test_all_the_data_have_no_noise():
    noise = BatchNoise(1.0)
    for _ in range(50):
        noise.add(chain(epoch_length=1))
    assert torch.equal(noise.preconditioner(SDS), SDS)


def test_noise_that_is_not_finite_is_left_out():
    noise, broken = BatchNoise(1.0), chain()
    broken.estimator.gradient = lambda theta, inputs: (torch.full((2, 3), torch.nan), torch.zeros(2))
    for _ in range(50):
        noise.add(broken)
    assert torch.equal(noise.preconditioner(SDS), SDS)


def test_measured_in_the_chains_metric_and_at_its_temperature():
    noise, own = BatchNoise(2.0), chain()
    own.auxiliary["scale"] = (4 / NOISE.expand(2, 3),)
    hottest, mean = noise.measured(own).unbind(-1)
    torch.testing.assert_close(mean, torch.full((2,), 4.0, dtype=torch.float64), rtol=0.4, atol=0.0)
    assert bool((hottest >= mean).all())


def test_a_window_is_kept_in_a_checkpoint():
    one, again = BatchNoise(1.0), BatchNoise(1.0)
    for _ in range(20):
        one.add(CHAIN)
    again.load_state_dict(one.state_dict())
    assert torch.equal(one.preconditioner(SDS), again.preconditioner(SDS))


@pytest.mark.thorough
def test_mini_batches_within_what_is_allowed():
    problem = Conjugate()
    kernel = MCLMC(problem.full, thinning=20, batch_size=50, seed=0, compile=False, max_inflation=0.1)
    mcmc = MCMC(kernel, 40, 200, num_chains=128, disable_progbar=True)
    mcmc.run(problem.x, problem.y)
    draws = mcmc.get_samples(group_by_chain=True)["w"].double()
    assert_gaussian(draws, problem.mean, problem.covariance, excess=0.1)
    assert 0 < kernel.tuning["inflation"] <= 0.1


@pytest.mark.slow
def test_resumed_on_mini_batches_bit_for_bit():
    problem = Conjugate()
    kernel = MCLMC(problem.full, seed=1, compile=False, batch_size=40)
    begin = {"warmup_steps": 200, "num_samples": 20, "chains": ChainSet(count=2)}
    chain, resumed = (kernel.begin((problem.x, problem.y), {}, **begin) for _ in range(2))
    with torch.no_grad():
        chain.advance(50)  # within a window
        state = chain.state_dict()
        chain.advance(160)
        resumed.load_state_dict(state)
        resumed.advance(160)
    assert torch.equal(resumed.theta, chain.theta)
    assert resumed.warmup.report() == chain.warmup.report()
    scales = chain.auxiliary["scale"][0]
    assert not torch.equal(scales, torch.ones_like(scales))
