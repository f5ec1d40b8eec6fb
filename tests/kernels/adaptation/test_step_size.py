# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""step_size="auto": exact choices on quadratics, and chains that keep what it promises."""

import json
import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

from pyro_apd.kernels import PSGLD, SGHMC, SGLD
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.measured_inflation import Heat
from pyro_apd.kernels.adaptation.spectrum import LocalPotential, measure_spectrum
from pyro_apd.kernels.adaptation.step_size import AutoStep, by_heat, choose, chosen
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.models import Classifier, Conjugate

pytestmark = pytest.mark.slow

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)
KERNELS = [SGLD, PSGLD, SGHMC]


class Quadratic:
    """U = sum of lambda x^2 / 2, with mini-batch noise of known variance, independent or in epochs."""

    def __init__(self, curvature, noise=None, epoch=None, energy=0.0):
        self.curvature = torch.as_tensor(curvature, dtype=torch.float64)
        self.noise = torch.zeros_like(self.curvature) if noise is None else torch.as_tensor(noise, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(3)
        self.epoch, self.energy = epoch, energy

    def draw(self):
        return (torch.randn(self.curvature.shape, generator=self.generator, dtype=torch.float64),)

    def gradient(self, theta, inputs):
        slope = theta * self.curvature + self.noise.sqrt() * inputs[0]
        return slope, (theta.square() * self.curvature).sum(-1) / 2 + self.energy

    def local(self, dynamics=None, at=0.3, temperature=1.0, is_active=None):
        theta = torch.full_like(self.curvature, at)
        return local_potential(self.gradient, self.draw, theta, dynamics, temperature, self.epoch, is_active)


def local_potential(gradient, draw, theta, dynamics=None, temperature=1.0, epoch=None, is_active=None):
    chains = ChainSet(count=len(theta) if theta.dim() > 1 else None)
    return LocalPotential(gradient, draw, theta, dynamics or Dynamics(), temperature, epoch, is_active, chains)


def test_full_batch_choice_is_the_formula():
    """Discretisation alone inflates the stiffest direction by 1 / (1 - eps lambda / 4): solve that for 9 %."""
    local = Quadratic([1.0, 10.0, 250.0], epoch=1).local()
    choice = choose(measure_spectrum(local, 0), local, 0.1)
    assert choice.step_size == pytest.approx(4 / 250 * (1 - 1 / 1.09), rel=1e-4)
    assert choice.inflation == pytest.approx(0.09, rel=1e-4)
    assert (choice.bound, choice.largest_curvature) == ("inflation", pytest.approx(250.0))


def test_friction_enters_by_its_own_formula():
    local = Quadratic([1.0, 250.0], epoch=1).local(Dynamics(friction=0.1))
    choice = choose(measure_spectrum(local, 0), local, 0.1)
    assert choice.step_size == pytest.approx(4 * 1.9 / 250 * (1 - 1 / 1.09), rel=1e-4)


def test_metric_enters_through_the_curvature():
    local = Quadratic([2.0, 100.0], epoch=1).local(Dynamics(metric=torch.tensor([50.0, 0.5], dtype=torch.float64)))
    choice = choose(measure_spectrum(local, 0), local, 0.1)
    assert choice.largest_curvature == pytest.approx(100.0)
    assert choice.step_size == pytest.approx(4 / 100 * (1 - 1 / 1.09), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_noise_is_measured_and_counted(temperature):
    """Variances of noise, within the error of 64 batches, and what they inflate, within the share."""
    problem = Quadratic([1.0, 10.0, 100.0], noise=[100.0, 900.0, 400.0])
    local = problem.local(temperature=temperature)
    spectrum = measure_spectrum(local, 0)
    assert ((spectrum.noise / problem.noise - 1).abs() < 0.5).all()
    step_size = choose(spectrum, local, 0.1).step_size
    true = (1 + step_size * problem.noise / (4 * temperature)) / (1 - step_size * problem.curvature / 4) - 1
    assert 0.05 < float(true.max()) < 0.14


def test_noise_of_many_batches_is_unbiased():
    problem = Quadratic([1.0, 4.0], noise=[25.0, 400.0])
    local = problem.local()
    found = torch.stack([measure_spectrum(local, 0).noise for _ in range(40)]).mean(0)
    torch.testing.assert_close(found, problem.noise, rtol=0.1, atol=0.0)


def test_many_latents_are_held_to_the_trace():
    """The trace is known here: 200 directions, with noise; the stiffest are no more than half way to instability."""
    curvature = torch.linspace(20.0, 100.0, 200)
    problem = Quadratic(curvature, noise=40 * curvature)
    local = problem.local()
    spectrum = measure_spectrum(local, 0)
    choice = choose(spectrum, local, 0.1)
    eps, lam, noise = choice.step_size, problem.curvature, problem.noise
    true = ((1 + eps * noise / 4) / (1 - eps * lam / 4) / lam).sum() / (1 / lam).sum() - 1
    assert choice.bound == "inflation"
    assert float(true) == pytest.approx(choice.inflation, rel=0.35)


def test_few_stiff_directions_among_many_are_held_from_instability():
    curvature = torch.cat([torch.ones(300), torch.tensor([5e3, 1e4])])
    local = Quadratic(curvature, epoch=1).local()
    choice = choose(measure_spectrum(local, 0), local, 0.1)
    assert choice.bound == "stability"
    assert choice.step_size == pytest.approx(0.5 * 4 / 1e4, rel=0.02)
    smaller = choose(measure_spectrum(local, 0), local, 0.02)
    assert smaller.step_size == pytest.approx(0.1 * 4 / 1e4, rel=0.02)


def test_temperature_zero_asks_for_stability_alone():
    local = Quadratic([1.0, 100.0], noise=[1e6, 1e6]).local(temperature=0.0)
    assert choose(measure_spectrum(local, 0), local, 0.1).step_size == pytest.approx(0.5 * 4 / 100)


def test_one_step_for_the_chains_that_go_on():
    """Their average inflation is within the share; a chain that diverged has no say."""
    curvature = torch.tensor([[1.0, 10.0], [1.0, 40.0], [1.0, 1e9]], dtype=torch.float64)
    local = Quadratic(curvature, epoch=1).local(is_active=torch.tensor([True, True, False]))
    assert local.largest_curvature(0)[:2].tolist() == pytest.approx([10.0, 40.0])
    step_size = choose(measure_spectrum(local, 0), local, 0.1).step_size
    inflation = (1 / (1 - step_size * curvature[:2, 1] / 4) - 1).mean()
    assert float(inflation) == pytest.approx(0.09, rel=1e-4)


def test_step_follows_the_curvature_and_then_stays():
    auto = AutoStep(0.1, 1200, seed=0)
    sizes = []
    for step in range(2000):
        if auto.is_due(step):
            local = Quadratic([1.0, 10.0 + step], epoch=1).local(at=0.0)
            auto.measure(local)
        sizes.append(auto(step))
    assert sizes[0] == pytest.approx(0.5 * 4 / 10, rel=1e-3)
    assert sizes[0] > sizes[500] > sizes[1100]
    assert auto.is_settled
    assert len(set(sizes[1200:])) == 1
    # Measures at 900, 1000, 1100 and 1200 decide: the smaller middle one.
    assert sizes[-1] == pytest.approx(4 / 1110 * (1 - 1 / 1.09), rel=1e-3)


def test_a_step_does_not_leap():
    auto = AutoStep(0.1, 1000, seed=0)
    sizes = []
    for energy, curvature in ((50.0, 1e4), (1.0, 1.0), (20.0, 1.0), (90.0, 1.0)):
        auto.measure(Quadratic([1e-3, curvature], epoch=1, energy=energy).local(at=0.0))
        sizes.append(auto.step_size)
    assert sizes[1] == pytest.approx(4 * sizes[0])  # the potential fell: it may grow, by so much
    assert sizes[2] == sizes[1]  # the potential rose: it may not
    assert sizes[3] == pytest.approx(sizes[2] / 4)  # above the start: it shrinks


def test_a_chain_that_rises_from_a_mode_may_take_larger_steps():
    """By D T / 2 and ten standard deviations the potential may exceed its lowest value; here by 50 + 71."""
    curvature = torch.ones(100)
    sizes = []
    auto = AutoStep(0.1, 1000, seed=0)
    for energy, stiff in ((0.0, 1e4), (60.0, 1.0), (115.0, 1.0), (130.0, 1.0)):
        curvature[0] = stiff
        auto.measure(Quadratic(curvature, epoch=1, energy=energy).local(at=0.0))
        sizes.append(auto.step_size)
    assert sizes[1] == pytest.approx(4 * sizes[0])
    assert sizes[2] == pytest.approx(16 * sizes[0])
    assert sizes[3] == pytest.approx(4 * sizes[0])  # above what a chain at its target has: it shrinks


def test_the_last_quarter_uses_what_is_stable_at_the_largest_curvature_met():
    auto = AutoStep(0.1, 1200, seed=0)
    for step in range(1201):
        if auto.is_due(step):
            stiff = 1e4 if step == 900 else 1e3
            auto.measure(Quadratic(torch.cat([torch.ones(299), torch.tensor([stiff])]), epoch=1).local(at=0.0))
    assert auto.step_size == pytest.approx(0.5 * 4 / 1e4, rel=0.02)
    assert auto.report()["bound"] == "stability"


def test_a_step_that_led_to_an_excursion_grows_again_until_the_last_quarter():
    auto, sizes = AutoStep(0.1, 1200, seed=0), []
    problem = Quadratic([1.0, 10.0], epoch=1)
    for step in range(1201):
        if auto.is_due(step):
            auto.measure(problem.local(at=0.0))
        if step in (250, 1050):
            before = auto.step_size
            assert auto.back_off(step, is_lost=False)
            assert auto.step_size == pytest.approx(before / 4)
        sizes.append(auto.step_size)
    assert sizes[250] < sizes[350] < sizes[450]
    assert sizes[1000] == pytest.approx(4 / 10 * (1 - 1 / 1.09), rel=1e-3)
    assert sizes[1200] == pytest.approx(sizes[1000] / 4)
    assert auto.report()["bound"] == "excursions"
    assert auto.report()["step_size"] == auto.step_size


def test_a_step_does_not_throw_a_chain_out():
    """Far out on a slope the gradient says how small a step must be, not the curvature."""
    auto = AutoStep(0.1, 1000, seed=0)
    problem = Quadratic([1e-2, 1e-2], epoch=1)
    far = local_potential(lambda theta, inputs: (theta * 1e-2 + 1e4, theta.sum()), problem.draw, torch.ones(2))
    auto.measure(far)
    drift = auto.step_size / 2 * 1e4 * 2**0.5
    assert drift == pytest.approx(0.05 * (1 + 2**0.5), rel=1e-3)


def test_without_warm_up_the_start_decides():
    auto = AutoStep(0.1, 0, seed=0)
    assert auto.is_due(0)
    auto.measure(Quadratic([1.0, 10.0], epoch=1).local())
    assert auto.is_settled
    assert not auto.is_due(1)


def test_what_is_not_finite_does_not_become_a_step():
    auto = AutoStep(0.1, 1000, seed=0)
    auto.measure(Quadratic([1.0, math.nan], epoch=1).local())
    assert math.isfinite(auto.step_size)
    assert auto.step_size > 0


def test_gradients_bound_the_mean_and_every_site():
    """On mini-batches the largest curvature does not bound the step, which is mostly that of single rows."""
    local = Quadratic(torch.full((100,), 1e6), epoch=None).local()
    by_mean = by_heat(Heat(2.0, 4.0, "w"), local, 0.1, 1e6)
    assert (by_mean.bound, by_mean.step_size) == ("inflation", pytest.approx(0.045))
    assert by_mean.inflation == pytest.approx(0.09)
    by_site = by_heat(Heat(2.0, 54.0, "w"), local, 0.1, 1e6)
    assert (by_site.bound, by_site.step_size) == ("site 'w'", pytest.approx(0.005))
    whole = by_heat(Heat(2.0, 4.0, "w"), Quadratic(torch.ones(100), epoch=1).local(), 0.1, 1e6)
    assert (whole.bound, whole.step_size) == ("stability", pytest.approx(2e-6))


def test_few_latents_are_held_weight_by_weight_too():
    local = Quadratic([1.0, 10.0], epoch=1).local()
    assert chosen(local, 0, 0.1, Heat(0.1, 0.2, "w[0]")).bound == "inflation"
    choice = chosen(local, 0, 0.1, Heat(50.0, 100.0, "w[1]"))
    assert (choice.bound, choice.step_size) == ("site 'w[1]'", pytest.approx(0.0027))


def test_a_falling_potential_is_measured_soon_again_and_gradients_do_not_count():
    auto, steps = AutoStep(0.1, 1200, seed=0), []
    for step in range(400):
        if auto.is_due(step):
            steps.append(step)
            energy = max(1e5 * 0.9**step, 10.0)
            auto.measure(Quadratic(torch.ones(100), epoch=1, energy=energy).local(at=0.0), Heat(1e9, 1e9, "w"))
    assert steps[:6] == [0, 10, 12, 22, 32, 36]
    assert len(steps) < 20
    assert auto.step_size == pytest.approx(0.5 * 4)  # by stability


def test_noise_of_the_potential_does_not_slow_a_chain_down():
    auto = AutoStep(0.1, 1000, seed=0)
    problem = Quadratic(torch.ones(100), noise=1e-9 * torch.ones(100))
    generator = torch.Generator().manual_seed(0)

    def gradient(theta, inputs):
        return problem.gradient(theta, inputs)[0], 1e4 + 1e3 * torch.randn((), generator=generator)

    for _ in range(6):
        auto.measure(local_potential(gradient, problem.draw, torch.zeros(100)))
    assert auto.step_size == pytest.approx(0.5 * 4, rel=0.3)


def test_state_is_plain_and_restores():
    auto, other = AutoStep(0.1, 600, seed=5), AutoStep(0.1, 600, seed=5)
    problem = Quadratic([1.0, 10.0], epoch=1)
    while not auto.is_settled:
        auto.measure(problem.local())
        other.load_state_dict(json.loads(json.dumps(auto.state_dict())))
        assert (other.step_size, other.is_settled, other.report()) == (auto.step_size, auto.is_settled, auto.report())


def run(kernel, num_samples, warmup_steps, args=DATA):
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


@pytest.mark.parametrize("kernel_class", [SGLD, SGHMC], ids=lambda kernel: kernel.__name__)
def test_achieved_inflation_is_within_the_share(kernel_class):
    """Of trace and single directions, over 64 chains: their 6,400 draws know a variance to some 2 %."""
    kernel = kernel_class(PROBLEM.full, "auto", batch_size=50, seed=1, compile=False)
    chain = kernel.begin(DATA, {}, warmup_steps=200, chains=ChainSet(count=64))
    with torch.no_grad():
        chain.advance(200)
        draws = []
        for _ in range(100):
            chain.advance(9)  # not a multiple of an epoch's 4 batches
            draws.append(chain.theta)
    draws = torch.cat(draws).double()
    exact, vectors = torch.linalg.eigh(PROBLEM.covariance.double())
    ratio = torch.cov((draws @ vectors).T).diagonal() / exact
    assert ratio.max() < 1.1 + 0.05
    assert ratio.min() > 0.97
    assert 0.99 < torch.cov(draws.T).trace() / exact.sum() < 1.1 + 0.03


@pytest.mark.parametrize("kernel_class", KERNELS, ids=lambda kernel: kernel.__name__)
def test_choice_is_told_kept_and_repeatable(kernel_class, caplog):
    reports = []
    for _ in range(2):
        kernel = kernel_class(PROBLEM.full, "auto", batch_size=50, thinning=5, seed=2, max_inflation=0.05)
        with caplog.at_level(logging.INFO, "pyro_apd"):
            mcmc = run(kernel, 20, 20)
        reports.append(kernel.tuning)
        sizes = mcmc.diagnostics()["step_size"]["chain 0"]
        assert sizes.unique().numel() == 1
        assert float(sizes[0]) == pytest.approx(kernel.tuning["step_size"])
        assert mcmc.diagnostics()["tuning"]["chain 0"] == kernel.tuning
    assert reports[0] == reports[1]
    assert reports[0]["allowed"] == 0.05
    assert "step_size='auto': chose" in caplog.text


def test_chains_together_share_a_step_and_survive():
    model = Classifier()
    x = torch.randn(60, 4)
    kernel = SGLD(model, "auto", batch_size=20, thinning=10, seed=0)
    chain = kernel.begin((x, torch.randint(3, (60,))), {}, warmup_steps=30, num_samples=10, chains=ChainSet(count=3))
    with torch.no_grad():
        for _ in range(35):
            chain.advance(10)
    assert not chain.divergences
    assert torch.isfinite(chain.theta).all()
    assert len(set(chain.statistics()["step_size"].tolist())) == 1


def test_resumed_chain_goes_on_the_same():
    kernels = [SGLD(PROBLEM.full, "auto", batch_size=50, seed=3, compile=False) for _ in range(2)]
    one, other = (kernel.begin(DATA, {}, warmup_steps=300, num_samples=10) for kernel in kernels)
    with torch.no_grad():
        one.advance(170)
        other.load_state_dict(one.state_dict())
        for chain in (one, other):
            chain.advance(200)
    assert torch.equal(one.theta, other.theta)
    assert one.step_size == other.step_size


@pytest.mark.parametrize("step_size", ["fast", "Auto", ""])
def test_other_words_are_refused(step_size):
    with pytest.raises(ValueError, match="'auto'"):
        SGLD(PROBLEM.full, step_size)


@pytest.mark.parametrize("max_inflation", [0, -0.1, math.nan, math.inf, "10%", True])
def test_shares_that_are_none(max_inflation):
    with pytest.raises(ValueError, match="max_inflation"):
        SGLD(PROBLEM.full, "auto", max_inflation=max_inflation)


def ravine(y):
    """Flat where it starts, steep where it leads: a learned noise scale, seen from afar."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(0.0, scale), obs=y)


@pytest.mark.parametrize("num_chains", [None, 2])
def test_a_chain_that_runs_away_early_goes_on_with_a_smaller_step(num_chains, monkeypatch, caplog):
    chains = () if num_chains is None else (num_chains,)
    kernel = SGLD(ravine, "auto", seed=0)
    chain = kernel.begin(
        (1e-3 * torch.randn(50),),
        {},
        warmup_steps=600,
        chains=ChainSet(count=num_chains),
        initial_params={"scale": torch.full(chains, 1.0)},
    )
    monkeypatch.setattr(chain.warmup.auto, "measure", lambda local, heat: None)
    chain.warmup.auto.step_size = 10.0
    with caplog.at_level("INFO", "pyro_apd"), torch.no_grad():
        chain.advance(300)
    assert "diverged" in caplog.text
    assert chain.divergences == []
    assert chain.step_size < 10.0
    assert bool(chain.theta.isfinite().all())


def test_a_chain_whose_every_step_runs_away_diverges():
    auto = AutoStep(0.1, 600, seed=0)
    auto.step_size = 1.0
    assert [auto.back_off(5) for _ in range(9)] == [True] * 8 + [False]
    assert auto.step_size == pytest.approx(1e-8)
    again = AutoStep(0.1, 600, seed=0)
    again.load_state_dict(auto.state_dict())
    assert not again.back_off(6)


def test_where_all_chains_stand_still_nothing_is_measured():
    """As where all of one process's chains, and all of the others', ran away for good during the warm-up."""
    standing = Quadratic([[1.0, 2.0], [3.0, 4.0]], epoch=1).local(is_active=torch.zeros(2, dtype=torch.bool))
    auto = AutoStep(0.1, 600, seed=0)
    auto.step_size = 0.5
    while not auto.is_settled:
        auto.measure(standing)
    assert auto.step_size == 0.5
    assert auto.report() == {}
