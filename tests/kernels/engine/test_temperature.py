# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from pyro.infer import MCMC

from pyro_apd.kernels import SGHMC, SGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.temperature import Thermometer
from tests.support.models import Classifier, Conjugate

PROBLEM = Conjugate()
# With a posterior mean near the prior's readings are not noisy.
PROBLEM.y = PROBLEM.y - PROBLEM.x @ PROBLEM.mean


@pytest.fixture(autouse=True)
def _readings_come_often(monkeypatch):
    """The chains here forget within some ten steps."""
    monkeypatch.setattr("pyro_apd.kernels.engine.temperature.READ_EVERY", 20)


def run(kernel):
    """64 chains, read 60 times after they have forgotten where they started."""
    chain = kernel.begin((PROBLEM.x, PROBLEM.y), {}, warmup_steps=0, chains=ChainSet(count=64))
    with torch.no_grad():
        chain.advance(200)
        for _ in range(60):
            chain.advance(20)
            chain.observe()
    return chain.temperatures(kernel.temperature)


def reading(temperatures, kind, site="all"):
    (found,) = (t for t in temperatures if (t.kind, t.site) == (kind, site))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize(("kernel_class", "step_size"), [(SGLD, 4e-4), (SGHMC, 1e-4)])
def test_a_right_chain_reads_its_temperature(kernel_class, step_size, temperature):
    temperatures = run(kernel_class(PROBLEM.full, step_size, temperature=temperature, seed=2, compile=False))
    for kind in ("configurational", "kinetic") if kernel_class is SGHMC else ("configurational",):
        found = reading(temperatures, kind)
        assert found.target == temperature
        assert abs(found.mean / temperature - 1) < 0.03 + 4 * found.standard_error / temperature
        assert found.standard_error < 0.025 * temperature


@pytest.mark.slow
def test_steps_that_are_too_large_read_too_hot():
    step_size = 2 / PROBLEM.largest_curvature  # half way to instability: that direction is twice as wide
    found = reading(run(SGLD(PROBLEM.full, step_size, seed=2, compile=False)), "configurational")
    curvatures = torch.linalg.eigvalsh(torch.linalg.inv(PROBLEM.covariance))
    exact = float((1 / (1 - step_size * curvatures / 4)).mean())
    assert exact > 1.4
    assert found.mean == pytest.approx(exact, abs=4 * found.standard_error)
    assert found.standard_error < 0.05


def test_sites_are_read_apart_and_the_diagnostics_hold_them():
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    kernel = SGHMC(Classifier(), 1e-4, thinning=20, seed=1)
    mcmc = MCMC(kernel, num_samples=25, warmup_steps=5, disable_progbar=True)
    mcmc.run(x, y)
    names = ["all", "first.bias", "first.weight", "second.bias", "second.weight"]
    temperatures = kernel.temperatures()
    assert sorted({t.site for t in temperatures}) == names
    assert {t.kind for t in temperatures} == {"configurational", "kinetic"}
    assert mcmc.diagnostics()["temperatures"]["chain 0"] == temperatures
    assert "configurational all" in str(temperatures[0])


def test_a_resumed_chain_reads_as_if_it_had_not_stopped():
    kernel = SGHMC(PROBLEM.full, 1e-4, batch_size=50, seed=3)
    chain, resumed = (kernel.begin((PROBLEM.x, PROBLEM.y), {}, warmup_steps=0, chains=ChainSet()) for _ in range(2))

    def read(chain, times):
        with torch.no_grad():
            for _ in range(times):
                chain.advance(20)
                chain.observe()

    read(chain, 5)
    resumed.load_state_dict(chain.state_dict())
    read(chain, 5)
    read(resumed, 5)
    assert resumed.temperatures(1.0)[0].mean == chain.temperatures(1.0)[0].mean
    assert len(chain.state_dict()["thermometers"]["thermometers"][0]["readings"]) == 10


def test_no_readings_before_a_chain_has_drawn():
    kernel = SGLD(PROBLEM.full, 1e-3)
    assert kernel.temperatures() == []
    kernel.setup(0, PROBLEM.x, PROBLEM.y)
    assert kernel.temperatures() == []


def test_readings_by_hand():
    thermometer = Thermometer("configurational", [2, 3])
    for i in range(40):
        thermometer.add(torch.tensor([2.0 + (i % 2), 6.0]))
    everything, first, second = thermometer.readings(["a", "b"], 1.0)
    assert everything.mean == pytest.approx((2.5 + 6.0) / 5)
    assert (first.mean, second.mean) == (pytest.approx(1.25), pytest.approx(2.0))
    assert first.standard_error == pytest.approx(0.0, abs=1e-12)  # each block holds one of either
    assert second.standard_error == 0.0


@pytest.mark.slow
def test_standard_error_allows_for_autocorrelation():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, generator=generator)
    slow, value = [], 0.0
    for draw in noise.tolist():
        value = 0.9 * value + math.sqrt(1 - 0.81) * draw
        slow.append(value)
    thermometer = Thermometer("kinetic", [1])
    for value in slow:
        thermometer.add(torch.tensor([value]))
    exact = math.sqrt((1 + 0.9) / (1 - 0.9) / len(slow))
    assert thermometer.readings(["a"], 1.0)[0].standard_error == pytest.approx(exact, rel=0.4)


def test_too_few_readings_say_how_many_steps_are_needed():
    thermometer = Thermometer("kinetic", [1])
    thermometer.add(torch.tensor([1.0]))
    found = thermometer.readings(["a"], 1.0, 2000)[0]
    assert found.standard_error is None
    assert found.steps_needed == 2000
    assert str(found) == "kinetic all: too short to read, 2,000 Langevin steps of kept draws needed (target 1)"


@pytest.mark.parametrize(("warmup", "thinning"), [(0, 7), (30, 1), (400, 20), (20_000, 150)])
def test_the_steps_needed_are_enough(warmup, thinning):
    def read_until(num_steps):
        chain = SGLD(PROBLEM.full, 1e-4, seed=3).begin((PROBLEM.x, PROBLEM.y), {}, warmup_steps=0, chains=ChainSet())
        chain.step = warmup
        with torch.no_grad():
            chain.advance(1)  # captures
            chain.step = warmup
            while chain.step < warmup + num_steps:
                chain.step += thinning
                chain.observe()
        return chain.temperatures(1.0)[0]

    needed = read_until(max(200, 2 * thinning)).steps_needed
    assert read_until(needed / 2).standard_error is None
    enough = read_until(needed)
    assert enough.standard_error is not None
    assert enough.steps_needed is None
