# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The theory of step sizes against the recursion itself."""

import math

import pytest
import torch

from pyro_apd.kernels.adaptation.dynamics import Dynamics

CURVATURE = torch.tensor([0.5, 5.0, 40.0], dtype=torch.float64)


def simulated_ratio(dynamics, step_size, pool_KD, temperature, is_epochwise=True, steps=1500, chains=3000):
    """Variance over T / lambda of the recursion, with batches from ``pool_KD`` by epochs or independent."""
    generator = torch.Generator().manual_seed(0)
    a, b, k = dynamics.friction, dynamics.noise_estimate, len(pool_KD)
    x = torch.zeros(chains, 3, dtype=torch.float64)
    v, total = torch.zeros_like(x), torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        if step % k == 0:
            order = torch.rand(chains, k, generator=generator).argsort(1)
        if not is_epochwise:
            order = torch.randint(k, (chains, k), generator=generator)
        gradient = CURVATURE * x + pool_KD[order[:, step % k]]
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        v = (1 - a) * v - step_size / 2 * gradient + math.sqrt((a - b) * step_size * temperature) * noise
        x = x + v
        total += x.square().mean(0) if step >= steps // 2 else 0.0
    return total / (steps - steps // 2) * CURVATURE / temperature


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamics", "epoch", "temperature"),
    [
        (Dynamics(), 4, 1.0),
        (Dynamics(), 20, 0.5),
        (Dynamics(friction=0.2), 10, 1.0),
        (Dynamics(friction=0.3, noise_estimate=0.1), 10, 1.0),
        (Dynamics(), None, 1.0),
        (Dynamics(friction=0.2), None, 1.0),
    ],
)
def test_variance_ratio_is_that_of_the_recursion(dynamics, epoch, temperature):
    pool = torch.randn(epoch or 10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pool = 15 * (pool - pool.mean(0))
    simulated = simulated_ratio(dynamics, 0.03, pool, temperature, is_epochwise=epoch is not None)
    stated = dynamics.variance_ratio(0.03, CURVATURE, pool.square().mean(0), temperature, epoch)
    slow, fast = simulated[0] / stated[0], simulated[1:] / stated[1:]
    assert abs(float(slow) - 1) < 0.1  # its warm-up is some two relaxation times here
    assert ((fast - 1).abs() < 0.04).all()


def test_without_batches_the_ratio_is_the_textbook_one():
    zero = torch.zeros(3, dtype=torch.float64)
    ratio = Dynamics().variance_ratio(0.05, CURVATURE, zero, 1.0)
    torch.testing.assert_close(ratio, 1 / (1 - 0.05 * CURVATURE / 4))
    assert torch.isinf(Dynamics().variance_ratio(0.1, CURVATURE, zero, 1.0)[-1])


def test_epochs_cancel_all_noise_of_slow_directions_and_none_of_fast_ones():
    x = torch.tensor([1e-9, 1e-6, 2.0], dtype=torch.float64)
    share = Dynamics().cancelling(x, 100)
    assert float(share[0]) < 1e-6
    assert abs(float(share[1]) / (0.5e-6 * 100 / 3) - 1) < 0.05  # rate times epoch over 3
    assert float(share[2]) == pytest.approx(1.0)
    assert (Dynamics().cancelling(x, 1) == 0).all()
    assert (Dynamics().cancelling(x, None) == 1).all()


@pytest.mark.parametrize("friction", [1.0, 0.1])
def test_rate_is_that_at_which_the_start_is_forgotten(friction):
    x = 0.002
    position, velocity = 1.0, 0.0
    for _ in range(2000):
        velocity = (1 - friction) * velocity - 0.5 * x * position
        position += velocity
    rate = float(Dynamics(friction).rate(torch.tensor(x, dtype=torch.float64)))
    assert -math.log(abs(position)) / 2000 == pytest.approx(rate, rel=0.02)
    assert rate == pytest.approx(x / (2 * friction), rel=0.15)  # epsilon / (2 a sd^2), overdamped
