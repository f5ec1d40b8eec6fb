# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""MCLMC against exact posteriors, and its warm-up: step size, preconditioner, L, mini-batches, resuming."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide.initialization import init_to_value

from pyro_apd.chains.driver import MCMC as Driver
from pyro_apd.errors import ModelError
from pyro_apd.kernels import MCLMC, InflationWarning
from pyro_apd.kernels.adaptation.microcanonical_settings import ENERGY_VARIANCE
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.exactness import assert_gaussian, assert_resumes, draws_of_chains
from tests.support.models import MEAN, SDS, Classifier, Conjugate, badly_scaled, constrained

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


def run(kernel, *args, num_samples=20, warmup_steps=40, num_chains=4, driver=Driver, **settings):
    mcmc = driver(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_exact_gaussian_posterior_at_a_small_step(temperature):
    """An energy variance of 2e-6 per weight, where discretisation cannot be seen."""
    exact = Conjugate(temperature=temperature)
    sd = math.sqrt(float(exact.covariance.trace()) / 3)
    kernel = MCLMC(PROBLEM.full, 0.35 * sd, length=2.0 * sd, temperature=temperature, seed=1, compile=False)
    assert_gaussian(draws_of_chains(kernel, DATA, num_chains=256, every=20, warmup=800), exact.mean, exact.covariance)


@pytest.mark.slow
def test_automatic_warm_up_on_an_ill_conditioned_gaussian():
    """Variances are a few per cent too large at the energy error aimed at."""
    kernel = MCLMC(badly_scaled, thinning=10, seed=0, compile=False)
    draws = run(kernel, num_samples=60, warmup_steps=120, num_chains=48).get_samples(group_by_chain=True)["w"]
    assert_gaussian(draws.double(), MEAN, torch.diag(SDS.square()), excess=0.08)
    assert kernel.tuning["energy_variance"] == pytest.approx(ENERGY_VARIANCE, rel=0.5)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def correlated(num_weights):
    """A linear regression on collinear columns, whose posterior is exact: model, data, mean and covariance."""
    generator = torch.Generator().manual_seed(num_weights)
    x = torch.randn(3 * num_weights, num_weights, generator=generator) + torch.randn(
        3 * num_weights, 1, generator=generator
    )
    y = x.sum(1) + torch.randn(len(x), generator=generator)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(num_weights), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    covariance = torch.linalg.inv(x.T @ x + torch.eye(num_weights))
    return model, (x, y), covariance @ x.T @ y, covariance


@pytest.mark.thorough
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("num_weights", [2, 8, 40])
@pytest.mark.parametrize("settings", [{}, {"adjusted": True}])
def test_exact_posteriors_in_double_precision(num_weights, settings):
    """Accepted trajectories have no bias; of others each variance may be some per cent too large. From draws of the
    prior, hundreds above the mode in U, 300 trajectories are too few: chains are optimised first.
    """
    model, data, mean, covariance = correlated(num_weights)
    kernel = MCLMC(model, thinning=1 if settings else 10, seed=0, compile=False, warm_start=1000, **settings)
    mcmc = run(kernel, *data, num_samples=60, warmup_steps=300, num_chains=128)
    draws = mcmc.get_samples(group_by_chain=True)["w"]
    assert draws.dtype == torch.float64
    assert_gaussian(draws, mean, covariance, excess=0.0 if settings else 0.08)


@pytest.mark.thorough
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("settings", [{}, {"adjusted": True}])
@pytest.mark.parametrize("num_chains", [None, 3])
@pytest.mark.parametrize("taken", [50, 320])
def test_resumed_in_double_precision_bit_for_bit(settings, num_chains, taken):
    model, data, _, _ = correlated(8)
    kernel = MCLMC(model, seed=1, compile=False, **settings)
    begin = {"warmup_steps": 300, "num_samples": 50, "chains": ChainSet(count=num_chains)}
    assert_resumes(kernel, begin, data, taken, 350)


@pytest.mark.thorough
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("settings", [{"length": 3.0}, {"adjusted": True, "leaps": 4}])
def test_a_vectorised_chain_is_the_single_one(settings):
    """Up to rounding: a chain's noise depends on the seed and its number alone."""
    model, data, _, _ = correlated(8)
    thetas = []
    for chains in (ChainSet(count=3), ChainSet(first=2)):
        kernel = MCLMC(model, 0.05, seed=1, compile=False, **settings)
        chain = kernel.begin(data, {}, warmup_steps=0, num_samples=50, chains=chains)
        with torch.no_grad():
            chain.advance(30)
        thetas.append(chain.theta)
    torch.testing.assert_close(thetas[0][2], thetas[1])


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"adjusted": True}])
def test_seeds_repeat_a_run_of_many_weights(settings):
    model, data, _, _ = correlated(40)
    one, again, other = (
        run(MCLMC(model, seed=s, compile=False, **settings), *data, num_samples=30, warmup_steps=60).get_samples()["w"]
        for s in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_automatic_warm_up_through_pyros_driver():
    kernel = MCLMC(PROBLEM.full, thinning=3, seed=0, compile=False)
    mcmc = MCMC(kernel, num_samples=1000, warmup_steps=200, disable_progbar=True)
    mcmc.run(*DATA)
    draws = mcmc.get_samples()["w"].double()
    white = (draws - PROBLEM.mean.double()) @ torch.linalg.inv(torch.linalg.cholesky(PROBLEM.covariance.double())).T
    # Some 500 independent draws: five standard errors.
    assert bool((white.mean(0).abs() < 0.22).all()), white.mean(0)
    assert bool(((white.T @ white / len(white) - torch.eye(3)).abs() < 0.33).all())
    assert kernel.tuning["energy_variance"] == pytest.approx(ENERGY_VARIANCE, rel=0.5)


@pytest.mark.slow
def test_a_preconditioner_is_of_the_draws_sds():
    kernel = MCLMC(badly_scaled, thinning=10, seed=0, compile=False)
    chain = kernel.begin((), {}, warmup_steps=150, chains=ChainSet(count=16))
    with torch.no_grad():
        chain.advance(1500)
    ratios = chain.auxiliary["scale"][0] / SDS
    assert bool((ratios.log().mean(0).abs() < 0.5).all()), ratios.log().mean(0)


@pytest.mark.parametrize(("target", "factor"), [(0.0, 0.0625), (10.0, 1.0)])
def test_starts_that_are_far_too_wide_are_shrunk(target, factor):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(20), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.1), obs=y)

    x = torch.eye(20)
    init = init_to_value(values={"w": torch.full((20,), 10.0)})
    kernel = MCLMC(model, seed=0, compile=False, init_strategy=init)
    chain = kernel.begin((x, torch.full((20,), target)), {}, warmup_steps=20)
    with torch.no_grad():
        chain.advance(1)
    # Five steps of Adam, of at most 0.01 each, and one of the kernel follow.
    torch.testing.assert_close(chain.theta, torch.full((20,), 10.0 * factor), rtol=0.0, atol=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("num_chains", [None, 2])
@pytest.mark.parametrize("taken", [0, 7, 60, 130, 200, 230])
def test_resumed_in_warm_up_bit_for_bit(num_chains, taken):
    kernel = MCLMC(PROBLEM.full, seed=1, compile=False)
    begin = {"warmup_steps": 200, "num_samples": 50, "chains": ChainSet(count=num_chains)}
    assert_resumes(kernel, begin, DATA, taken, 250)


@pytest.mark.slow
def test_a_checkpoint_of_the_driver_resumes_bit_for_bit(tmp_path):
    def start(path, num_samples):
        kernel = MCLMC(Classifier(), seed=3, compile=False)
        return run(kernel, *network_data(), num_samples=num_samples, num_chains=2, checkpoint=path)

    whole = start(tmp_path / "one", 30)
    stopped = tmp_path / "other"

    class StopError(Exception):
        pass

    def stop(kernel, params, stage, i):
        if stage.lower().startswith("sample") and i == 12:
            raise StopError

    kernel = MCLMC(Classifier(), seed=3, compile=False)
    with pytest.raises(StopError):
        run(kernel, *network_data(), num_samples=30, num_chains=2, checkpoint=stopped, hook_fn=stop)
    again = start(stopped, 30)
    for name, value in whole.get_samples().items():
        assert torch.equal(again.get_samples()[name], value)


@pytest.mark.slow
def test_tails_of_a_region_that_narrows():
    """A scale and 8 latents of that scale. Steps that are too long for the narrow part are taken back, so that no chain
    is thrown out of the target: shares outside of the scale's quantiles, and the largest of its draws.
    """

    def funnel():
        scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(0.0, scale.exp().unsqueeze(-1).expand(8)).to_event(1))

    kernel = MCLMC(funnel, 0.35, length=6.0, seed=0, compile=False)
    draws = draws_of_chains(kernel, (), num_chains=256, num_draws=30, every=40, warmup=300)[..., 0]
    assert kernel.layout.names == ("log_scale", "w")
    assert float(draws.std()) == pytest.approx(1.0, abs=0.1)
    for is_outside in (draws > 1.645, draws < -1.645):
        assert float(is_outside.double().mean()) == pytest.approx(0.05, abs=0.02)
    assert float(draws.abs().max()) < 5.0


def test_a_lost_step_is_taken_back():
    kernel = MCLMC(badly_scaled, 1e-3, length=1.0, seed=0, compile=False)
    chain = kernel.begin((), {}, warmup_steps=0, num_samples=10, chains=ChainSet(count=2))
    with torch.no_grad():
        chain.advance(3)
        here = chain.theta
        chain.auxiliary["energy"][0][1] -= 1e3  # the second chain's next error is as large
        velocity = chain.auxiliary["velocity"][0].clone()
        chain.advance(1)
        torch.testing.assert_close(chain.theta[1], here[1] - 1e-3 * velocity[1])
        assert bool((chain.auxiliary["velocity"][0][1] == 0).all())
        assert bool((chain.auxiliary["velocity"][0][0] != 0).any())
        chain.advance(1)
    torch.testing.assert_close(chain.auxiliary["velocity"][0].norm(dim=-1), torch.ones(2))
    # The error counts as the largest that is not lost.
    assert chain.auxiliary["energy"][1][1] == pytest.approx(25.0, rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"adjusted": True}])
def test_a_spawned_run_with_an_automatic_step_is_the_sequential_one(settings):
    one, other = (
        run(MCLMC(PROBLEM.full, seed=3, **settings), *DATA, num_chains=2, chain_method=method, mp_context="spawn")
        for method in ("sequential", "parallel")
    )
    assert torch.equal(one.get_samples()["w"], other.get_samples()["w"])
    assert one.diagnostics()["tuning"] == other.diagnostics()["tuning"]


def network_data():
    return torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


@pytest.mark.slow
def test_seeds_repeat_an_automatic_run():
    one, again, other = (run(MCLMC(PROBLEM.full, seed=s), *DATA).get_samples()["w"] for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constrained_sites(dtype):
    torch.set_default_dtype(dtype)
    try:
        draws = run(MCLMC(constrained, seed=0), torch.linspace(-1, 1, 20, dtype=dtype)).get_samples()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(value.dtype == dtype for value in draws.values())
    assert bool((draws["scale"] > 0).all())


@pytest.mark.thorough
def test_compiled_steps_are_the_eager_ones():
    def thetas(compile):
        kernel = MCLMC(PROBLEM.full, 0.02, length=0.1, seed=1, thinning=5, compile=compile)
        chain = kernel.begin(DATA, {}, warmup_steps=0, chains=ChainSet(count=3))
        with torch.no_grad():
            chain.advance(15)
        return chain.theta, chain.path

    (eager, _), (compiled, path) = thetas(False), thetas(True)
    assert path == "compiled"
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_given_step_on_noisy_batches_warns():
    kernel = MCLMC(PROBLEM.full, 0.05, length=10.0, batch_size=10, replacement=True, seed=0, max_inflation=0.01)
    with pytest.warns(InflationWarning, match="Mini-batches widen variances by up to .* or SGHMC or PSGLD"):
        mcmc = run(kernel, PROBLEM.x * torch.tensor([3.0, 1.0, 0.3]), PROBLEM.y, num_samples=5)
    (text,) = mcmc.diagnostics()["warnings"]["chain 0"]
    assert text.startswith("Mini-batches widen variances")


@pytest.mark.slow
def test_an_automatic_step_that_batches_hold_down_warns():
    """By the square of the step, to which the inflation is proportional."""
    kernel = MCLMC(PROBLEM.full, batch_size=len(PROBLEM.x) // 4, seed=0, max_inflation=1e-5, compile=False)
    with pytest.warns(InflationWarning, match="a batch is 1/4 of them: draws hardly move. Use all the data"):
        run(kernel, *DATA, num_samples=5, warmup_steps=200)
    assert kernel.tuning["slowdown"] > 4
    assert kernel.tuning["inflation"] <= kernel.tuning["allowed"]


def test_a_step_that_is_too_large_warns_of_a_better_one():
    kernel = MCLMC(PROBLEM.full, 0.3, seed=0, compile=False)
    with pytest.warns(InflationWarning, match=r"energy error is .* per weight.*Try step_size=0\.0"):
        mcmc = run(kernel, *DATA, num_samples=100, warmup_steps=20)
    assert mcmc.diagnostics()["warnings"]["chain 0"][0].startswith("The variance of the energy error")


def test_one_latent_value_is_refused():
    with pytest.raises(ModelError, match="one latent value"):
        run(MCLMC(lambda: pyro.sample("w", dist.Normal(0.0, 1.0))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0.0}, "length=0.0"),
        ({"length": "long"}, "length='long'"),
        ({"precondition": 1}, "precondition=1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"noise": "three-point", "thinning": 20}, "noise='three-point': MCLMC needs normal noise"),
        ({"adjusted": "yes"}, "adjusted='yes'"),
        ({"adjusted": True, "leaps": 0}, "leaps=0"),
        ({"leaps": 3}, "leaps=3 is for adjusted trajectories"),
        ({"adjusted": True, "length": 2.0}, "length=2.0 has no meaning with adjusted=True"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        MCLMC(PROBLEM.full, **settings)
