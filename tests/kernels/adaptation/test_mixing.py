# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Effective draws of small models and temperatures of sites: what is named, what is left in peace."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.chains import MCMC
from pyro_apd.kernels import SGHMC, SGLD, MixingWarning, TemperatureWarning
from pyro_apd.kernels.adaptation.mixing import (
    MixingWatch,
    mixing_message,
    temperature_message,
    wrong_temperatures,
)
from pyro_apd.kernels.engine.temperature import Temperature

ALL = torch.ones(4, dtype=torch.bool)


def watching(autocorrelation, num=400, chains=4, shift=0.0):
    """A latent of independent draws, and one with this autocorrelation whose chains are ``shift`` apart."""
    generator = torch.Generator().manual_seed(0)
    watch, state = MixingWatch(["fast", "slow"]), torch.randn(chains, generator=generator)
    for _ in range(num):
        noise = torch.randn(2, chains, generator=generator)
        state = autocorrelation * state + math.sqrt(1 - autocorrelation**2) * noise[0]
        watch.add(torch.stack([noise[1], state + shift * torch.arange(chains)], -1))
    return watch


def test_few_effective_draws_are_named():
    assert watching(0.0).slow(ALL) == []
    assert watching(0.5).slow(ALL) == []
    (found,) = watching(0.98).slow(ALL)
    assert found.name == "slow"
    assert 5 < found.effective < 60


def test_chains_apart_are_few_effective_draws_and_lost_ones_do_not_count():
    (found,) = watching(0.0, shift=3.0).slow(ALL)
    assert found.rhat > 2
    assert watching(0.0, shift=3.0).slow(torch.tensor([True, False, False, False])) == []
    assert watching(0.99).slow(torch.zeros(4, dtype=torch.bool)) == []


def test_long_runs_are_thinned_and_short_ones_not_judged():
    assert watching(0.99, num=40).slow(ALL) == []
    watch = watching(0.9, num=3000)
    assert len(watch._points) <= 512
    assert watch.slow(ALL) == []
    other = MixingWatch(["fast", "slow"])
    other.load_state_dict(watch.state_dict())
    other.add(torch.zeros(4, 2))
    watch.add(torch.zeros(4, 2))
    assert len(other._points) == len(watch._points)


def test_a_latent_that_stands_still_is_no_error():
    watch = MixingWatch(["still"])
    for _ in range(60):
        watch.add(torch.zeros(1))
    assert watch.slow(torch.ones(1, dtype=torch.bool)) is not None


def test_the_message_says_what_and_what_to_do():
    slow = watching(0.98).slow(ALL)
    text = mixing_message(slow, 1600, 4)
    assert "Of 1600 kept draws of 4 chains" in text
    assert "effective for 'slow'" in text
    assert "LocScaleReparam" in text


def reading(mean, error, site="w", target=1.0):
    return Temperature("configurational", site, mean, error, target)


def test_temperatures_that_matter_and_are_not_chance():
    assert (
        wrong_temperatures([reading(1.2, 0.01), reading(3.0, 0.5), reading(9.0, None), reading(9.0, 0.1, "all")]) == []
    )
    hot, cold = reading(3.0, 0.1, "sigma"), reading(0.5, 0.05)
    assert wrong_temperatures([cold, reading(1.0, 0.1), hot]) == [hot, cold]
    text = temperature_message([hot, cold], 2e-3)
    assert "site 'sigma' is 3 +- 0.1 where 1 is right, and so are those of ['w']" in text
    assert "1.7 times as wide" in text
    assert "more warmup_steps" in temperature_message([cold], 2e-3)


def funnel():
    v = pyro.sample("v", dist.Normal(torch.tensor(0.0), 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp().unsqueeze(-1)).to_event(1))


def gaussian():
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize("model", [funnel, gaussian])
def test_an_automatic_step_says_where_it_cannot_be_trusted(model):
    kernel = SGHMC(model, "auto", thinning=5, seed=0, compile=False)
    mcmc = MCMC(kernel, 150, 60, num_chains=4, chain_method="vectorized", disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run()
    said = [w for w in caught if w.category in (MixingWarning, TemperatureWarning)]
    assert bool(said) == (model is funnel)
    if said:
        assert "'v[0]'" in str(said[0].message) or "'x[" in str(said[0].message)
        assert str(said[0].message) in str(mcmc.diagnostics()["warnings"])


@pytest.mark.slow
def test_a_step_that_was_given_is_the_users_and_says_nothing():
    kernel = SGLD(funnel, 1e-3, thinning=5, seed=0, compile=False)
    mcmc = MCMC(kernel, 60, 20, num_chains=2, chain_method="vectorized", disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run()
    assert not [w for w in caught if w.category in (MixingWarning, TemperatureWarning)]
