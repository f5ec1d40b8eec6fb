# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""warm_start=: chains that begin at a mode, each at its own."""

import pytest
import torch
from pyro.infer import MCMC

from pyro_apd.kernels import PSGLD, SGHMC, SGLD
from pyro_apd.kernels.adaptation.warm_start import highest_rate, optimised, shrunk
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.models import Classifier, Conjugate

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


def quadratic(theta, inputs):
    scale = torch.tensor([1.0, 100.0])
    return scale * (theta - 2.0), (scale * (theta - 2.0).square()).sum(-1) / 2


def test_finds_the_mode_of_a_quadratic():
    for start in (torch.zeros(2), torch.tensor([[0.0, 0.0], [3.0, -1.0]])):
        found = optimised(quadratic, tuple, start, 2000)
        torch.testing.assert_close(found, torch.full_like(start, 2.0), rtol=1e-3, atol=1e-3)
        assert not torch.equal(start, found)


def test_the_learning_rate_goes_by_the_size_of_the_weights():
    sizes = torch.tensor([[0.0], [0.001], [0.1], [0.2], [5.0]])
    theta = sizes * torch.tensor([1.0, -1.0, 1.0])
    expected = torch.tensor([[0.01], [0.001], [0.0025], [0.005], [0.01]])
    torch.testing.assert_close(highest_rate(theta), expected)
    torch.testing.assert_close(highest_rate(theta[2]), expected[2])


def test_no_weight_moves_further_than_the_rates_add_up_to():
    """Adam's steps do not go by the gradient's size: a trained network of narrow weights must not be undone."""
    start = torch.full((1, 50), 0.04)
    found = optimised(lambda theta, _: (1e6 * torch.ones_like(theta), theta.sum(-1)), tuple, start, 20)
    moved = (found - start).abs().max()
    assert 0.005 < moved < 20 * 0.001


def test_starts_are_shrunk_to_where_the_potential_is_lowest():
    def gradient(theta, batch):
        size = theta.abs().amax(-1)
        return theta, torch.where(size > 3, torch.nan, (size - 1).square())

    starts = torch.tensor([[8.0, 2.0], [2.2, -1.0], [1.0, 0.0], [0.3, 0.1]])
    factors = torch.tensor([[0.125], [0.5], [1.0], [1.0]])
    assert torch.equal(shrunk(gradient, tuple, starts), factors * starts)
    for start, factor in zip(starts, factors, strict=True):
        assert torch.equal(shrunk(gradient, tuple, start), factor * start)


def test_a_chain_that_runs_away_is_given_back_and_the_others_are_not_touched():
    def gradient(theta, inputs):
        slope, energy = quadratic(theta, inputs)
        slope[1] = float("nan")
        return slope, energy

    start = torch.zeros(2, 2)
    found = optimised(gradient, tuple, start, 1500)
    assert torch.equal(found[1], start[1])
    assert torch.allclose(found[0], torch.full((2,), 2.0), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_class", [SGLD, PSGLD, SGHMC], ids=lambda kernel: kernel.__name__)
def test_chain_starts_at_the_mode(kernel_class):
    kernel = kernel_class(PROBLEM.full, 1e-12, warm_start=3000, seed=0)
    mcmc = MCMC(kernel, num_samples=1, warmup_steps=0, disable_progbar=True)
    mcmc.run(*DATA)
    torch.testing.assert_close(mcmc.get_samples()["w"][0], PROBLEM.mean, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_it_happens_once_and_repeats_with_the_seed():
    draws = []
    for _ in range(2):
        kernel = SGLD(PROBLEM.full, 1e-12, warm_start=300, batch_size=50, seed=4)
        mcmc = MCMC(kernel, num_samples=3, warmup_steps=1, disable_progbar=True)
        mcmc.run(*DATA)
        draws.append(mcmc.get_samples()["w"])
    assert torch.equal(*draws)
    torch.testing.assert_close(draws[0][0], draws[0][2], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_chains_together_come_to_modes_of_their_own():
    x = torch.randn(80, 4)
    y = (x[:, 0] > 0).long()
    kernel = SGLD(Classifier(), 1e-9, batch_size=40, warm_start=300, seed=1)
    chain = kernel.begin((x, y), {}, warmup_steps=0, chains=ChainSet(count=3))
    start = chain.theta
    with torch.no_grad():
        before = chain.potential.gradient(start, chain.potential.source.draw())[1]
        chain.advance(1)
    assert (chain.energy < before - 5).all()
    distance = torch.cdist(chain.theta, chain.theta) + torch.eye(3) * 9
    assert distance.min() > 0.5


def test_a_resumed_chain_is_not_optimised_again():
    kernels = [SGLD(PROBLEM.full, 1e-3, warm_start=100, seed=2) for _ in range(2)]
    one, other = (kernel.begin(DATA, {}, warmup_steps=0, num_samples=10) for kernel in kernels)
    with torch.no_grad():
        one.advance(5)
        other.load_state_dict(one.state_dict())
        for chain in (one, other):
            chain.advance(5)
    assert torch.equal(one.theta, other.theta)


@pytest.mark.parametrize("warm_start", [-1, 2.5, "yes", True])
def test_settings_out_of_range(warm_start):
    with pytest.raises(ValueError, match="warm_start"):
        SGLD(PROBLEM.full, 1e-3, warm_start=warm_start)
