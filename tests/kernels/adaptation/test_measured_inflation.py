# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What gradients at the states of a chain say of how much too wide its draws are."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.kernels import SGHMC, SGLD
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.measured_inflation import GradientReadings
from pyro_apd.kernels.engine.chain_set import ChainSet

CURVATURE = torch.tensor([1.0, 4.0, 25.0])
NOISE = torch.tensor([0.0, 30.0, 100.0])


def readings(num=4000, epoch=None, chains=4):
    """At states of the Gaussian of these curvatures, with noise of these variances; in epochs of two it cancels."""
    generator = torch.Generator().manual_seed(0)
    found = GradientReadings(["a", "b"], [1, 2])
    for _ in range(num):
        slope = CURVATURE.sqrt() * torch.randn(chains, 3, generator=generator)
        noise, other = (NOISE.sqrt() * torch.randn(2, chains, 3, generator=generator)).unbind(0)
        found.add(slope + noise, slope + (-noise if epoch == 2 else other), epoch)
    return found


@pytest.mark.parametrize("epoch", [None, 2])
def test_noise_and_slope_are_told_apart(epoch):
    noise, slope = readings(epoch=epoch).means()
    torch.testing.assert_close(noise.mean(0), torch.tensor([0.0, 130.0]), rtol=0.05, atol=0.01)
    torch.testing.assert_close(slope.mean(0), torch.tensor([1.0, 29.0]), rtol=0.1, atol=0.05)


def test_heat_is_the_formula():
    found = GradientReadings(["a", "b"], [1, 2])
    noise, slope = torch.tensor([0.0, 130.0]), torch.tensor([1.0, 29.0])
    heat = found.heat(noise, slope, Dynamics(), 0.5)
    assert heat.site == "b"
    assert heat.hottest == pytest.approx((130 + 29) / 2 / 4 / 0.5)
    assert heat.mean == pytest.approx((130 + 30) / 3 / 4 / 0.5)
    slow = found.heat(noise, slope, Dynamics(friction=0.1, noise_estimate=0.02), 1.0)
    assert slow.hottest == pytest.approx((130 / 0.1 + 29 / 1.9) / 2 / 4)
    assert slow.inflation(0.01) == pytest.approx(0.01 * slow.mean - 0.2)
    assert slow.inflation(slow.step_by_mean(0.09)) == pytest.approx(0.09)
    assert slow.step_by_site(0.3) * slow.hottest - 0.2 == pytest.approx(0.3)


def test_all_data_at_every_step_have_no_noise():
    found = GradientReadings(["a", "b"], [1, 2])
    for _ in range(3):
        found.add(torch.tensor([1.0, 2.0, 3.0]), None, 1)
    noise, slope = found.means()
    assert noise.tolist() == [0.0, 0.0]
    assert slope.tolist() == [1.0, 13.0]


def test_few_readings_say_nothing_and_old_ones_are_dropped():
    assert readings(2).means() is None
    found = readings(8)
    latest = found.means()
    found.drop_old(0.25)
    assert len(found) == 6
    assert not torch.equal(found.means()[0], latest[0])
    other = GradientReadings(["a", "b"], [1, 2])
    other.load_state_dict(found.state_dict())
    assert torch.equal(other.means()[1], found.means()[1])


def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel_class", "step_size"), [(SGLD, 2e-3), (SGHMC, 2e-4)])
def test_it_is_by_how_much_the_variance_comes_out_too_large(kernel_class, step_size):
    """64 chains on a posterior in closed form, independent batches: predicted and achieved, in both directions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator) * torch.tensor([1.0, 0.5])
    y = x.sum(1) + torch.randn(200, generator=generator)
    kernel = kernel_class(model, step_size, batch_size=20, replacement=True, seed=0, compile=False)
    chain = kernel.begin((x, y), {}, warmup_steps=300, chains=ChainSet(count=64))
    found, draws = GradientReadings(["w[0]", "w[1]"], [1, 1]), []
    with torch.no_grad():
        chain.advance(300)
        for _ in range(60):
            chain.advance(20)
            draws.append(chain.theta)
            gradient = chain.estimator.gradient(chain.theta, chain.potential.source.draw())[0].clone()
            found.add(gradient, chain.estimator.gradient(chain.theta, chain.potential.source.draw())[0], None)
    noise, slope = (part.mean(0) for part in found.means())
    dynamics = chain.dynamics()
    predicted = step_size / 4 * (noise / dynamics.friction + slope / (2 - dynamics.friction))
    centre = torch.cat(draws).double()
    precision = x.double().T @ x.double() + torch.eye(2, dtype=torch.float64)
    # E[theta dU/dtheta], with U's gradient on all data
    achieved = ((centre - centre.mean(0)) * ((centre - centre.mean(0)) @ precision)).mean(0) - 1
    assert float(predicted.min()) > 0.1
    torch.testing.assert_close(predicted.double(), achieved, rtol=0.3, atol=0.05)
