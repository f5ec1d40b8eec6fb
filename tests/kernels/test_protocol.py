# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What Pyro's drivers ask of every kernel. A new sampler is one more entry in ``KERNELS``."""

import copy
import math
import pickle
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.chains.driver import MCMC as Driver
from pyro_apd.chains.summary import sampler_summary
from pyro_apd.errors import DataError, DivergenceError, ModelError
from pyro_apd.kernels import MCLMC, PSGLD, SGHMC, SGLD, InflationWarning
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.temperature import Temperature
from tests.support.models import Classifier, Conjugate, constrained, null

KERNELS = [SGLD, PSGLD, SGHMC, MCLMC]
PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__)
def kernel_class(request):
    return request.param


@pytest.fixture(params=[SGLD, SGHMC], ids=lambda kernel: kernel.__name__)
def diverging_kernel_class(request):
    """PSGLD is not among them: its preconditioner shrinks as gradients grow, so that steps stay bounded. Nor is MCLMC,
    whose speed is constant.
    """
    return request.param


def run(kernel, *args, num_samples=10, warmup_steps=3, driver=MCMC, **settings):
    with warnings.catch_warnings():
        # Pyro runs chains one after the other where cores are few, and says so.
        warnings.filterwarnings("ignore", "num_chains=.*is more than available_cpu", UserWarning)
        mcmc = driver(kernel, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("group_by_chain", [False, True])
def test_mcmc_interface(kernel_class, num_chains, group_by_chain, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)
    mcmc = run(kernel_class(PROBLEM.full, 1e-3), *DATA, num_chains=num_chains)
    shape = (num_chains, 10, 3) if group_by_chain else (num_chains * 10, 3)
    draws = mcmc.get_samples(group_by_chain=group_by_chain)
    assert {name: value.shape for name, value in draws.items()} == {"w": shape}
    assert mcmc.get_samples(7, group_by_chain)["w"].shape == ((num_chains, 7, 3) if group_by_chain else (7, 3))
    diagnostics = mcmc.diagnostics()
    assert set(diagnostics["divergences"]) == {f"chain {i}" for i in range(num_chains)}
    assert diagnostics["potential"]["chain 0"].shape == (10,)
    mcmc.summary()


@pytest.mark.parametrize("num_chains", [1, 2])
def test_streaming_interface(kernel_class, num_chains):
    mcmc = run(kernel_class(PROBLEM.full, 1e-3), *DATA, driver=StreamingMCMC, num_chains=num_chains)
    statistics = mcmc.get_statistics(group_by_chain=True)
    assert statistics[(0, "w")]["count"] == 10
    assert statistics[(num_chains - 1, "w")]["mean"].shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel_class", "context"),
    [
        (SGLD, "fork"),
        (PSGLD, "fork"),
        (SGHMC, "fork"),
        (MCLMC, "fork"),
        (SGHMC, "spawn"),
        pytest.param(SGLD, "spawn", marks=pytest.mark.thorough),
        pytest.param(PSGLD, "spawn", marks=pytest.mark.thorough),
        pytest.param(MCLMC, "spawn", marks=pytest.mark.thorough),
    ],
)
def test_parallel_chains_differ_and_seeds_repeat_them(kernel_class, context, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 4)
    runs = []
    for started in ("fork", context):
        mcmc = MCMC(
            kernel_class(PROBLEM.full, 1e-3, seed=4),
            num_samples=4,
            warmup_steps=1,
            num_chains=2,
            mp_context=started,
            disable_progbar=True,
        )
        mcmc.run(*DATA)
        runs.append(mcmc.get_samples(group_by_chain=True)["w"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[0][1])


def not_finite(value):
    """Numbers that are not finite, and texts that have one, in nested values."""
    if isinstance(value, torch.Tensor):
        return [] if bool(torch.isfinite(value).all()) else [value]
    if isinstance(value, dict):
        return [found for item in value.values() for found in not_finite(item)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in not_finite(item)]
    if isinstance(value, float):
        return [] if math.isfinite(value) else [value]
    if isinstance(value, Temperature):
        return not_finite([str(value), value.mean, value.standard_error])
    return [value] if re.search(r"\b(nan|inf)\b", str(value)) else []


@pytest.mark.parametrize("step_size", [1e-3, "auto"])
@pytest.mark.parametrize(("num_chains", "warmup_steps", "num_samples"), [(1, 0, 1), (1, 1, 2), (2, 0, 2)])
def test_readings_of_very_short_runs_are_numbers(kernel_class, step_size, num_chains, warmup_steps, num_samples):
    kernel = kernel_class(PROBLEM.full, step_size, seed=0, compile=False)
    mcmc = Driver(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InflationWarning)  # of MCLMC, whose step is not found yet
        mcmc.run(*DATA)
    diagnostics = mcmc.diagnostics()
    found = [diagnostics, sampler_summary(mcmc), kernel.tuning, kernel.temperatures()]
    assert not not_finite(found), not_finite(found)
    assert all("too short to read" in str(reading) for reading in kernel.temperatures())


@pytest.mark.slow
def test_sequential_chains_differ(kernel_class, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)
    for seed in (None, 3):
        mcmc = run(kernel_class(PROBLEM.full, 1e-3, seed=seed), *DATA, num_chains=2)
        one, other = mcmc.get_samples(group_by_chain=True)["w"]
        assert not torch.equal(one, other)


@pytest.mark.slow
def test_seed_repeats_the_run_and_leaves_the_global_generator_alone(kernel_class):
    before = torch.get_rng_state()
    batches = DataLoader(TensorDataset(*DATA), batch_size=50, shuffle=True)
    for args, settings in ((DATA, {"batch_size": 50}), ((batches,), {})):
        first, again = (
            run(kernel_class(PROBLEM.full, 1e-3, seed=9, **settings), *args).get_samples()["w"] for _ in range(2)
        )
        assert torch.equal(first, again)
        other = run(kernel_class(PROBLEM.full, 1e-3, seed=10, **settings), *args).get_samples()["w"]
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_seed_pyros_seed_repeats_the_run(kernel_class):
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        runs.append(run(kernel_class(PROBLEM.full, 1e-3, batch_size=20), *DATA).get_samples()["w"])
    assert torch.equal(*runs)


def test_initial_params_are_honoured(kernel_class):
    start = torch.tensor([3.0, -2.0, 1.0])
    kernel = kernel_class(PROBLEM.full, 1e-10)
    mcmc = run(kernel, *DATA, num_samples=1, warmup_steps=0, initial_params={"w": start})
    torch.testing.assert_close(mcmc.get_samples()["w"][0], start, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_initial_params_are_unconstrained(kernel_class):
    start = {"scale": torch.tensor(-1.0), "mix": torch.tensor([0.2, 0.4]), "corr": torch.tensor([0.3])}
    kernel = kernel_class(constrained, 1e-10)
    mcmc = run(
        kernel,
        torch.zeros(5),
        num_samples=1,
        warmup_steps=0,
        initial_params=start,
    )
    expected = {name: kernel.transforms[name].inv(value) for name, value in start.items()}
    for name, value in mcmc.get_samples().items():
        torch.testing.assert_close(value[0], expected[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"v": torch.zeros(3)}, r"latents are \{'w': \(3,\)\}"),
        ({"w": torch.zeros(4)}, r"latents are \{'w': \(3,\)\}"),
        ({"w": torch.tensor([0.0, float("nan"), 0.0])}, "NaN"),
    ],
)
def test_unfit_initial_params(kernel_class, params, message):
    kernel = kernel_class(PROBLEM.full, 1e-3)
    kernel.initial_params = params
    with pytest.raises(ValueError, match=message):
        kernel.setup(0, *DATA)


@pytest.mark.slow
def test_draws_are_of_the_models_support_dtype_and_shape(kernel_class):
    y = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        draws = run(kernel_class(constrained, 1e-3), y).get_samples()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: value.dtype for name, value in draws.items()} == dict.fromkeys(draws, torch.float64)
    assert bool((draws["scale"] > 0).all())
    torch.testing.assert_close(draws["mix"].sum(-1), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(draws["corr"].square().sum(-1), torch.ones(10, 2, dtype=torch.float64))


def test_a_model_without_latents_is_refused(kernel_class):
    with pytest.raises(ModelError, match="no latent"):
        run(kernel_class(null, 1e-3))


def test_save_params_in_sorted_order(kernel_class):
    mcmc = run(kernel_class(Classifier(), 1e-3), torch.randn(8, 4), torch.arange(8) % 3, save_params=["second.bias"])
    assert set(mcmc.get_samples()) == {"second.bias"}


def test_hooks_see_draws_that_later_steps_do_not_change(kernel_class):
    seen = []
    mcmc = run(
        kernel_class(PROBLEM.full, 1e-3, thinning=2),
        *DATA,
        warmup_steps=0,
        hook_fn=lambda kernel, params, stage, i: seen.append(params["w"]),
    )
    assert torch.equal(torch.stack(seen), mcmc.get_samples()["w"])


def test_thinning_takes_every_kth_state(kernel_class):
    every = run(kernel_class(PROBLEM.full, 1e-3, seed=1), *DATA, num_samples=12, warmup_steps=0).get_samples()["w"]
    third = run(kernel_class(PROBLEM.full, 1e-3, seed=1, thinning=3), *DATA, num_samples=4, warmup_steps=0)
    assert torch.equal(third.get_samples()["w"], every[2::3])


def test_step_size_callable_sees_langevin_steps(kernel_class):
    seen = []

    def schedule(step):
        seen.append(step)
        return 1e-3

    run(kernel_class(PROBLEM.full, schedule, thinning=2), *DATA, num_samples=3, warmup_steps=2)
    assert seen == list(range(10))


def test_schedule_that_stops_being_positive(kernel_class):
    with pytest.raises(ValueError, match=r"step_size\(5\) = 0.0"):
        run(kernel_class(PROBLEM.full, lambda step: 1e-3 if step < 5 else 0.0), *DATA)


def test_external_changes_of_the_state_are_taken(kernel_class):
    kernel = kernel_class(PROBLEM.full, 1e-10)
    kernel.setup(0, *DATA)
    elsewhere = {"w": torch.tensor([5.0, 5.0, 5.0])}
    torch.testing.assert_close(kernel.sample(elsewhere)["w"], elsewhere["w"], atol=1e-3, rtol=0)


def test_logging_is_json_and_speaks_of_steps(kernel_class):
    kernel = kernel_class(PROBLEM.full, 1e-3, thinning=5)
    kernel.setup(0, *DATA)
    assert dict(kernel.logging()) == {}
    kernel.sample(kernel.initial_params)
    assert set(kernel.logging()) == {"step size", "potential", "|grad|", "diverged", "steps/s"}
    assert kernel.logging()["step size"] == "1.00e-03"


def test_cleanup_is_idempotent_and_keeps_what_the_driver_needs(kernel_class):
    kernel = kernel_class(PROBLEM.full, 1e-3)
    kernel.setup(0, *DATA)
    kernel.sample(kernel.initial_params)
    kernel.cleanup()
    kernel.cleanup()
    assert kernel.initial_params is None
    assert set(kernel.transforms) == {"w"}
    assert kernel.layout.names == ("w",)
    with pytest.raises(RuntimeError, match="setup"):
        kernel.sample({})


def test_kernels_and_finished_runs_pickle(kernel_class):
    kernel = kernel_class(Classifier(), 1e-3, seed=1)
    mcmc = run(kernel, torch.randn(8, 4), torch.arange(8) % 3)
    again = pickle.loads(pickle.dumps(kernel))
    assert again.thinning == kernel.thinning
    assert torch.equal(pickle.loads(pickle.dumps(mcmc)).get_samples()["first.bias"], mcmc.get_samples()["first.bias"])
    copy.deepcopy(kernel)


def test_arviz_reads_a_run(kernel_class):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its refactoring, and omits log-likelihoods, in warnings
        import arviz as az

        idata = az.from_pyro(run(kernel_class(Classifier(), 1e-3), torch.randn(8, 4), torch.arange(8) % 3))
    assert idata.posterior["first.weight"].shape == (1, 10, 6, 4)
    assert not idata.sample_stats["diverging"].any()


def test_divergence_is_caught_within_100_steps_and_keeps_the_draws(diverging_kernel_class):
    kernel = diverging_kernel_class(PROBLEM.full, lambda step: 1e-3 if step < 300 else 1.0, thinning=10)
    with pytest.raises(DivergenceError, match=r"site 'w'.*try step_size=") as caught:
        run(kernel, *DATA, num_samples=100, warmup_steps=10)
    error = caught.value
    assert error.site == "w"
    assert error.step_size == 1.0
    assert 300 < error.step <= 400
    assert error.draws["w"].shape[1:] == (3,)
    assert 15 <= len(error.draws["w"]) <= 21
    assert bool(torch.isfinite(error.draws["w"]).all())
    stable = 4 / PROBLEM.largest_curvature
    assert stable / 100 < error.suggested_step_size < stable
    again = pickle.loads(pickle.dumps(error))
    assert again.suggested_step_size == error.suggested_step_size


@pytest.mark.slow
def test_suggested_step_size_does_not_diverge(diverging_kernel_class):
    with pytest.raises(DivergenceError) as caught:
        run(diverging_kernel_class(PROBLEM.full, 0.1, thinning=100), *DATA)
    run(diverging_kernel_class(PROBLEM.full, caught.value.suggested_step_size, thinning=100), *DATA)


def test_divergence_in_the_last_steps_is_not_missed(diverging_kernel_class):
    kernel = diverging_kernel_class(PROBLEM.full, lambda step: 1e-3 if step < 20 else 10.0)
    with pytest.raises(DivergenceError):
        run(kernel, *DATA, num_samples=38, warmup_steps=0)


def test_nan_in_a_later_batch_is_said_to_be_that(kernel_class):
    bad = PROBLEM.x.clone()
    bad[-1] = float("nan")
    batches = DataLoader(TensorDataset(bad, PROBLEM.y), batch_size=20)
    with pytest.raises(DataError, match="NaN"):
        run(kernel_class(PROBLEM.full, 1e-3), batches, num_samples=200)


def test_start_without_density(kernel_class):
    def model(y):
        bound = pyro.sample("bound", dist.Uniform(0.0, 1.0))
        pyro.sample("obs", dist.Uniform(0.0, bound), obs=y)

    with pytest.raises(DataError, match="'obs'"):
        run(kernel_class(model, 1e-3), torch.tensor(2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"num_data": -1}, "num_data=-1"),
        ({"thinning": 0}, "thinning=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"thinning": True}, "thinning=True"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"replacement": "yes"}, "replacement='yes'"),
        ({"control_variates": None}, "control_variates=None"),
        ({"capture": 1}, "capture=1"),
        ({"compile": "always"}, "compile='always'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_numbers_out_of_range(kernel_class, settings, message):
    with pytest.raises(ValueError, match=message):
        kernel_class(PROBLEM.full, 1e-3, **settings)


def test_integers_of_numpy_count(kernel_class):
    kernel = kernel_class(PROBLEM.full, 1e-3, seed=np.int64(3), thinning=np.int32(2), batch_size=np.int64(20))
    assert (kernel.seed, kernel.thinning, kernel.batch_size) == (3, 2, 20)
    again = kernel_class(PROBLEM.full, 1e-3, seed=3, thinning=2, batch_size=20)
    starts = [k.begin(DATA, {}, warmup_steps=0).theta for k in (kernel, again)]
    assert torch.equal(*starts)


def test_chains_are_numbered_as_they_are_begun(kernel_class):
    """Without numbers of a run, as by Pyro's own drivers; with them, a chain is the same whatever came before."""
    kernel = kernel_class(PROBLEM.full, 1e-3, seed=3)
    begun = [kernel.begin(DATA, {}, warmup_steps=0).theta for _ in range(2)]
    numbered = [kernel.begin(DATA, {}, warmup_steps=0, chains=ChainSet(i)).theta for i in range(2)]
    for one, other in zip(begun, numbered, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*begun)


def test_the_worker_of_pyros_driver_has_a_stream_of_its_own(kernel_class, monkeypatch):
    kernel = kernel_class(PROBLEM.full, 1e-3, seed=3)
    home, numbered = kernel._home[1], ChainSet(0)
    here = kernel.begin(DATA, {}, warmup_steps=0, chains=numbered).theta
    monkeypatch.setattr("pyro_apd.kernels.base.os.getpid", lambda: -1)
    starts = [here]
    for worker in range(2):
        monkeypatch.setattr(torch, "initial_seed", lambda worker=worker: home + worker)
        kernel._num_chains_begun = 0
        starts.append(kernel.begin(DATA, {}, warmup_steps=0).theta)
        assert torch.equal(kernel.begin(DATA, {}, warmup_steps=0, chains=numbered).theta, here)
    assert len({tuple(start.tolist()) for start in starts}) == 3


def test_model_must_be_callable(kernel_class):
    with pytest.raises(ValueError, match="model="):
        kernel_class("not a model", 1e-3)


def test_batch_larger_than_the_data(kernel_class):
    with pytest.raises(ValueError, match="batch_size=201 is more than the 200 rows"):
        run(kernel_class(PROBLEM.full, 1e-3, batch_size=201), *DATA)


@pytest.mark.parametrize("fails", [True, False])
def test_global_state_after_a_run(diverging_kernel_class, fails):
    validation = pyro.distributions.is_validation_enabled()
    kernel = diverging_kernel_class(PROBLEM.full, 10.0 if fails else 1e-3)
    if fails:
        with pytest.raises(DivergenceError):
            run(kernel, *DATA, num_samples=200)
    else:
        run(kernel, *DATA)
    assert pyro.distributions.is_validation_enabled() == validation
    assert not list(pyro.get_param_store().keys())
