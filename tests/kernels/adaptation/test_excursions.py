# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Excursions: the limit that a history sets, draws that are marked, and steps that are lowered in warm-up."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.chains import MCMC
from pyro_apd.kernels import PSGLD, SGHMC, SGLD, ExcursionWarning
from pyro_apd.kernels.adaptation.excursions import ExcursionWatch, excursion_message, rise_to_equilibrium
from pyro_apd.kernels.engine.chain_set import ChainSet


def watching(energies, num_latents=200, temperature=1.0):
    watch = ExcursionWatch(num_latents, temperature)
    for energy in energies:
        watch.add(torch.as_tensor(energy))
    return watch


def test_the_limit_is_ten_standard_deviations_of_a_gaussians_potential():
    """Of 200 latents: sd 10, mean 100 above the lowest."""
    assert rise_to_equilibrium(200, 1.0) == 200.0
    assert float(watching([500.0] * 8).limit) == 700.0  # as if 500 were the mode
    known = torch.linspace(300.0, 510.0, 22)  # the history's own spread counts where it is larger
    assert float(watching(known).limit) == pytest.approx(410.0 + 10 * 70.0, abs=25)
    assert float(watching([400.0, *[520.0] * 9]).limit) == 620.0


def test_the_start_sets_a_limit_and_temperature_zero_none():
    assert watching([]).limit is None
    assert not bool(watching([]).beyond(torch.tensor(1e9)))
    assert float(watching([1.0]).limit) == 201.0
    assert [watching([1.0] * num).has_history for num in (7, 8)] == [False, True]
    assert watching([1.0] * 20, temperature=0.0).limit is None


def test_excursions_do_not_raise_the_limit_and_chains_have_their_own():
    watch = watching([[100.0, 900.0]] * 10)
    before = watch.limit.clone()
    for _ in range(100):
        watch.add(torch.tensor([1e6, math.nan]))
    assert torch.equal(watch.limit, before)
    assert watch.beyond(torch.tensor([850.0, 850.0])).tolist() == [True, False]


def test_a_chain_that_learns_or_rises_to_its_target_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    watch = ExcursionWatch(200, 1.0)
    learning = [1e5 * 0.5**i for i in range(12)]
    rising = [100.0 * (1 - 0.9**i) for i in range(40)]
    for energy in learning + rising + [100.0] * 200:
        energy = torch.tensor(energy) + 10 * torch.randn((), generator=generator)
        assert not bool(watch.beyond(energy))
        watch.add(energy)


def test_marked_draws_and_state():
    watch = watching([[1.0, 1.0]] * 10)
    for flags in ([False, False], [True, False], [True, False]):
        watch.keep(torch.tensor(flags))
    other = ExcursionWatch(200, 1.0)
    other.load_state_dict(watch.state_dict())
    assert other.marked() == watch.marked() == [[1, 2], []]
    assert torch.equal(other.limit, watch.limit)
    assert other.num_kept == 3


def test_the_message_names_chains_draws_and_a_step():
    text = excursion_message({2: [4, 5, 6, 90], 3: [1]}, 150, 3.1e-3)
    assert "5 kept draws of 150 per chain" in text
    assert "{2: [4, 5, 6], 3: [1]}" in text
    assert "step_size=7e-04" in text


def gaussian():
    pyro.sample("x", dist.Normal(torch.zeros(50), 1.0).to_event(1))


def throw_out(chain, row):
    """Puts one chain where U is 2,500; at its target U is 25 with an sd of 5."""
    theta = chain.theta
    theta[row] = 10.0
    chain.theta = theta


@pytest.mark.slow
@pytest.mark.parametrize(("kernel_class", "num_chains"), [(SGLD, None), (PSGLD, 2), (SGHMC, 2)])
def test_a_chain_that_is_thrown_out_in_warm_up_is_put_back_with_a_smaller_step(kernel_class, num_chains):
    kernel = kernel_class(gaussian, "auto", seed=0, compile=False)
    chain = kernel.begin((), {}, warmup_steps=2000, chains=ChainSet(count=num_chains))
    row = 0 if num_chains else ...
    with torch.no_grad():
        chain.advance(610)
        before = chain.step_size
        throw_out(chain, row)
        chain.advance(10)
        assert float(chain.theta.abs().max()) < 6
        assert chain.step_size == pytest.approx(before / 4)
        chain.advance(1400)
    assert chain.step_size > before / 2  # it grew again
    assert chain.divergences == []


def test_a_first_step_that_throws_the_chain_out_is_taken_back(monkeypatch):
    """Before there is any history but the start."""
    kernel = SGLD(gaussian, "auto", seed=0, compile=False)
    chain = kernel.begin((), {}, warmup_steps=2000, chains=ChainSet(count=2))
    monkeypatch.setattr(chain.warmup.auto, "measure", lambda local, heat: None)
    chain.warmup.auto.step_size = 6.0
    with torch.no_grad():
        chain.advance(20)
    assert chain.step_size < 4
    assert float(chain.theta.abs().max()) < 10


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [0.02, "auto"])
def test_draws_on_an_excursion_are_marked_and_told(step_size):
    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 20):
            throw_out(kernel._chain, 1)

    kernel = SGLD(gaussian, step_size, thinning=5, seed=0)
    mcmc = MCMC(kernel, 120, 100, num_chains=2, chain_method="vectorized", hook_fn=hook, disable_progbar=True)
    with pytest.warns(ExcursionWarning, match=r"First draws by chain: {1: \[21,"):
        mcmc.run()
    excursions = mcmc.diagnostics()["excursions"]
    assert excursions["chain 0"] == []
    marked = excursions["chain 1"]
    assert marked == list(range(21, 21 + len(marked)))
    potential = mcmc.diagnostics()["potential"]["chain 1"]
    assert float(potential[marked].min()) > 25 + 5 * 8
    assert float(potential[marked[-1] + 1]) < 25 + 5 * 30


def test_a_kernel_by_itself_has_the_draws_of_its_chain():
    kernel = SGLD(gaussian, 0.02, thinning=5, seed=0)
    kernel.setup(100)
    params = kernel.initial_params
    for _ in range(110):
        params = kernel.sample(params)
    throw_out(kernel._chain, ...)
    kernel.sample(params)
    with pytest.warns(ExcursionWarning):
        assert kernel.diagnostics()["excursions"] == [10]
    kernel.cleanup()


@pytest.mark.slow
def test_an_outlying_row_in_a_mini_batch_is_no_excursion():
    """One row of 400 is 200 sds away: where it is in the batch of 4, U is 2 million above what it is elsewhere."""
    y = torch.randn(400, generator=torch.Generator().manual_seed(0))
    y[7] = 200.0

    def model(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(loc.sum(), 10.0), obs=y)

    kernel = SGLD(model, 1e-3, batch_size=4, thinning=5, seed=0)
    mcmc = MCMC(kernel, 200, 100, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExcursionWarning)
        mcmc.run(y)
    potential = mcmc.diagnostics()["potential"]["chain 0"]
    assert float(potential.max()) > float(potential.median()) + 1e4
    assert mcmc.diagnostics()["excursions"]["chain 0"] == []


@pytest.mark.parametrize("is_outside", [False, True])
def test_a_state_at_which_one_row_is_far_off_is_no_excursion(is_outside, monkeypatch):
    """U on the last batch is beyond the limit; what it is on others decides."""
    kernel = SGLD(with_rows, 0.02, batch_size=4, seed=0)
    chain = kernel.begin((torch.zeros(40),), {}, warmup_steps=100, chains=ChainSet(count=2))
    with torch.no_grad():
        chain.advance(451)
        chain._measures.energy.fill_(1e6)
        others = torch.full((2,), 1e6 if is_outside else 0.0)
        monkeypatch.setattr(chain, "_energy_on_others", lambda: others)
        assert chain.outside_history(may_wait=True).tolist() == [is_outside] * 2


def with_rows(y):
    gaussian()
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)
