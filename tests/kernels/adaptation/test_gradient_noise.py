# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The noise of mini-batch gradients, on gradients of a known covariance, and the step size and L that it allows."""

import pytest
import torch

from pyro_apd.kernels.adaptation.gradient_noise import (
    GradientNoise,
    batch_noise,
    energy_message,
    slowdown,
    slowdown_message,
)


def gradients(sds, num_chains):
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(num_chains, len(sds), generator=generator) * sds + 5.0


def test_the_noisiest_of_few_directions():
    hottest, mean = batch_noise(gradients(torch.tensor([3.0, 1.0, 1.0]), 200), None, 3)
    assert float(mean.mean()) == pytest.approx(11 / 3, rel=0.1)
    # The largest eigenvalue of an estimated covariance is a little above that of the covariance.
    assert 9.0 < float(hottest.mean()) < 10.5


def test_the_directions_of_the_noise_where_there_are_many():
    sds = torch.cat([torch.full((4,), 10.0), torch.ones(96)])
    hottest, mean = batch_noise(gradients(sds, 200), None, 100)
    assert float(mean.mean()) == pytest.approx(4.96, rel=0.05)
    assert float(hottest.mean()) == pytest.approx((4 * 1e4 + 96) / 496, rel=0.15)


def test_batches_of_an_epoch_differ_by_more_than_their_noise():
    one, other = (batch_noise(gradients(torch.ones(3), 4), length, 3)[1] for length in (None, 4))
    torch.testing.assert_close(other, 0.75 * one)


@pytest.mark.parametrize("hottest", [1e2, 1e3, 1e5, 1e7])
def test_limits_hold_the_inflation_that_is_allowed(hottest):
    noise = GradientNoise(hottest, 10.0, 50)
    size, length = noise.limited(0.5, 7.0, 0.1)
    assert noise.inflation(size, length) <= 0.1
    if noise.inflation(0.5, 7.0) <= 0.1:
        assert (size, length) == (0.5, 7.0)
    else:
        assert noise.inflation(size, length) > 0.03
        assert length < 7.0


def test_noise_that_is_the_same_everywhere_counts_by_the_size_of_kicks_alone():
    noise = GradientNoise(30.0, 30.0, 50)
    assert noise.inflation(1.0, 7.0) == noise.inflation(1.0, 0.7) == pytest.approx(50 * 30 / 49**2 / 3)
    size, length = noise.limited(1.0, 7.0, 0.1)
    assert length == 7.0
    assert 0.03 < noise.inflation(size, length) <= 0.1


def test_slowdown_is_by_the_square_of_the_distance():
    """Half of epsilon and a quarter of L: an eighth of the way."""
    assert slowdown(0.8, 0.4, 2.0, 64) == pytest.approx(8.0)
    assert slowdown(0.8, 0.8, 8.0, 64) == pytest.approx(1.0)
    assert "about 8 times the steps" in slowdown_message(8.0, 5)
    assert "a batch is 1/5 of them" in slowdown_message(8.0, 5)


def test_what_is_on_is_not_advised():
    """64 times the variance: half the step."""
    given, automatic = (energy_message(6.4e-2, 1e-3, 0.2, is_automatic) for is_automatic in (False, True))
    assert given.endswith("Try step_size=0.1, or 'auto'.")
    assert automatic.endswith("Give more warmup_steps.")
