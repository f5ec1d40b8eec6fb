# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A warm-up that was too short is noticed, and one that was not is left in peace."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide.initialization import init_to_value

from pyro_apd.kernels import PSGLD, SGHMC, SGLD
from pyro_apd.kernels.adaptation.drift import (
    Drift,
    DriftWatch,
    WarmupWarning,
    fitted_change,
    steps_to_forget,
    too_short,
)
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.models import Conjugate

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


def autoregression(num_points, num_series, time, noise=0.0):
    """Stationary series of variance 1 that forget within ``time`` points, and white noise on top."""
    generator = torch.Generator().manual_seed(0)
    keep = math.exp(-1 / time) if time else 0.0

    def normal():
        return torch.randn(num_series, generator=generator, dtype=torch.float64)

    state, points = normal(), []
    for _ in range(num_points):
        state = keep * state + math.sqrt(1 - keep**2) * normal()
        points.append(state + noise * normal())
    return torch.stack(points)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("time", "noise"),
    [(20, 0.0), *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((0, 0.0), (5, 0.0), (5, 2.0)))],
)
def test_p_values_of_stationary_series_are_fair(time, noise):
    """Up to an autocorrelation time of a tenth of the run, chance is not taken for drift more often than stated."""
    p_value = fitted_change(autoregression(200, 2000, time, noise))[2]
    assert (p_value < 0.05).double().mean() < 0.06
    assert (p_value < 0.01).double().mean() < 0.025


@pytest.mark.slow
@pytest.mark.parametrize("time", [20, *(pytest.param(time, marks=pytest.mark.thorough) for time in (0, 5))])
def test_false_alarms_on_stationary_chains(time):
    """Potential and two sites together: at most 5 % of the chains."""
    num_chains, alarms = 400, set()
    series_TK = autoregression(400, num_chains * 3, time).reshape(400, num_chains, 3)
    watch = DriftWatch(["a", "b"])
    for points_CK in series_TK:
        # The sites' sizes vary by a tenth, so that 5 % are within reach.
        watch.add(points_CK[:, 0], tuple(1 + 0.1 * points_CK[:, i : i + 1] for i in (1, 2)))
    alarms = {drift.chain for drift in watch.drifts(1.0)}
    assert len(alarms) <= 0.05 * num_chains


@pytest.mark.parametrize("fading", [0.1, 0.5, 2.0])
def test_what_relaxes_is_found(fading):
    time = torch.arange(300, dtype=torch.float64) / 300
    watch = DriftWatch(["w"])
    noise = autoregression(300, 2, 3)
    for t, e in zip(time, noise, strict=True):
        size = float(2 + torch.exp(-t / fading) + 0.05 * e[1])
        watch.add(10 + 6 * torch.exp(-t / fading) + e[0], (torch.full((4,), size, dtype=torch.float64),))
    found = {drift.name: drift for drift in watch.drifts(1.0)}
    assert set(found) == {"potential", "w"}
    assert found["potential"].first > found["potential"].last + 1.5
    assert found["w"].first == pytest.approx(3.0, abs=0.35)
    assert watch.drifts(0.0) == []


def test_a_drift_that_does_not_matter_is_left_alone():
    watch = DriftWatch(["w"])
    for i in range(200):
        watch.add(torch.tensor(5.0 + (i % 7)), (torch.full((3,), 2.0 + 0.02 * i / 200 + 0.001 * (i % 5)),))
    assert watch.drifts(1.0) == []


def test_a_long_run_is_kept_in_few_points():
    watch = DriftWatch(["w"])
    for i in range(5000):
        watch.add(torch.tensor(float(i)), (torch.ones(2) * i,))
    points = watch.state_dict()["points"]
    assert 100 <= len(points) <= 256
    gaps = points[1:, 0] - points[:-1, 0]
    assert (gaps == gaps[0]).all()
    assert torch.allclose(points[:, 0], points[:, 1])
    other = DriftWatch(["w"])
    other.load_state_dict(watch.state_dict())
    for w in (watch, other):
        w.add(torch.tensor(1.0), (torch.ones(2),))
    assert watch.drifts(1.0) == other.drifts(1.0)


@pytest.mark.parametrize(("sd", "step_size"), [(1.0, 1e-3), (0.1, 1e-4)])
def test_steps_to_forget_by_langevin_steps(sd, step_size):
    """6 sd^2 / epsilon: three relaxation times of 2 sd^2 / epsilon steps."""
    assert steps_to_forget(step_size, sd, Dynamics()) == pytest.approx(6 * sd**2 / step_size, rel=0.01)
    assert steps_to_forget(step_size, sd, Dynamics(friction=0.5)) == pytest.approx(3 * sd**2 / step_size, rel=0.03)


def wide(y):
    """Most of its directions see no data."""
    w = pyro.sample("w", dist.Normal(torch.zeros(300), 0.5).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(w[0], 1.0), obs=y)


FAR = init_to_value(values={"w": torch.full((300,), 3.0)})


@pytest.mark.slow
@pytest.mark.parametrize("kernel_class", [SGLD, SGHMC], ids=lambda kernel: kernel.__name__)
def test_short_warm_up_is_said_with_the_steps_that_it_takes(kernel_class):
    kernel = kernel_class(wide, 1e-3, seed=0, init_strategy=FAR, compile=False)
    mcmc = MCMC(kernel, num_samples=200, warmup_steps=10, disable_progbar=True)
    with pytest.warns(WarmupWarning) as caught:
        mcmc.run(torch.zeros(5))
    assert len(caught) == 1
    text = str(caught[0].message)
    # Momentum at x = eps / sd^2 is close to critical damping: faster than the overdamped 150 steps.
    needed = 1500 if kernel_class is SGLD else 112
    assert "warm-up of 10 Langevin steps was too short" in text
    assert "the potential still went from" in text
    if kernel_class is SGLD:  # with momentum the start is forgotten within the run, which is harder to tell from chance
        assert "['w']" in text
    assert "prior of sd 0.5" in text
    stated = float(text.split("takes ")[1].split(" ")[0])
    assert stated == pytest.approx(needed, rel=0.01)


@pytest.mark.slow
def test_the_steps_that_it_asks_for_are_enough():
    kernel = SGLD(wide, 1e-3, seed=0, init_strategy=FAR, compile=False)
    mcmc = MCMC(kernel, num_samples=200, warmup_steps=2000, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(torch.zeros(5))
    assert [str(warning.message) for warning in caught] == []


def test_chains_together_name_the_one():
    kernel = SGLD(wide, 1e-2, seed=0, compile=False)
    start = 0.5 * torch.randn(3, 300)
    start[1] = 4.0
    chain = kernel.begin((torch.zeros(5),), {}, warmup_steps=0, chains=ChainSet(count=3), initial_params={"w": start})
    chain.end_warmup()
    with torch.no_grad():
        for _ in range(150):
            chain.advance(1)
    with pytest.warns(WarmupWarning, match=r"of chains \[1\]"):
        kernel.end(chain)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_class", [SGLD, PSGLD, SGHMC], ids=lambda kernel: kernel.__name__)
def test_stationary_chains_are_left_in_peace(kernel_class):
    """64 chains started at the target: 5 % may be taken for drifting."""
    kernel = kernel_class(PROBLEM.full, 1e-3, batch_size=50, seed=0, compile=False)
    chain = kernel.begin(DATA, {}, warmup_steps=300, chains=ChainSet(count=64))
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain.advance(300)
        chain.end_warmup()
        for _ in range(120):
            chain.advance(10)
        kernel.end(chain)
    named = [warning for warning in caught if issubclass(warning.category, WarmupWarning)]
    chains = str(named[0].message).split("of chains [")[1].split("]")[0].split(",") if named else []
    assert len(chains) <= 3


def test_what_is_on_is_not_advised():
    drifts = [Drift("potential", None, 3.0, 1.0)]

    def advice(**settings):
        return too_short(drifts, 100, 1e-3, {}, {}, **settings).partition("Give ")[2]

    warmup = "more warmup_steps (in draws: Langevin steps over `thinning`)"
    assert advice() == f"{warmup}, warm_start=, or a larger step_size."
    assert advice(is_automatic=True) == f"{warmup}, or warm_start=."
    assert advice(is_automatic=True, is_optimised=True) == f"{warmup}."


@pytest.mark.parametrize(("step_size", "warm_start"), [("auto", 1), (1e-2, None)])
def test_a_chain_knows_what_is_on(step_size, warm_start):
    kernel = SGLD(wide, step_size, seed=0, compile=False, warm_start=warm_start)
    chain = kernel.begin((torch.zeros(5),), {}, warmup_steps=1)
    with torch.no_grad():
        chain.advance(2)
    chain.end_warmup()
    chain.warmup._watch.drifts = lambda temperature: [Drift("potential", None, 3.0, 1.0)]
    with pytest.warns(WarmupWarning) as caught:
        kernel.end(chain)
    text = str(caught[0].message)
    assert ("warm_start=" in text, "larger step_size" in text) == (warm_start is None, step_size != "auto")
