# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The driver with the package's kernels, on models."""

import random
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.chains.driver import MCMC, open_store
from pyro_apd.errors import DivergenceError, ModelError
from pyro_apd.kernels import MCLMC, PSGLD, SGHMC, SGLD
from tests.chains.test_driver import METHODS, forked, theta, wait_until
from tests.support.exactness import assert_gaussian
from tests.support.models import Classifier, Conjugate, constrained

pytestmark = pytest.mark.slow

KERNELS = [SGLD, PSGLD, SGHMC, MCLMC]
PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__)
def kernel_class(request):
    return request.param


def run(kernel, *args, num_samples=10, warmup_steps=3, **settings):
    mcmc = MCMC(kernel, num_samples, warmup_steps, **{"disable_progbar": True, **settings})
    mcmc.run(*args)
    return mcmc


@pytest.mark.parametrize("num_chains", [1, 3])
@pytest.mark.parametrize("group_by_chain", [False, True])
def test_mcmc_interface(kernel_class, method, num_chains, group_by_chain):
    kernel = kernel_class(PROBLEM.full, 1e-3, batch_size=50)
    mcmc = run(kernel, *DATA, num_chains=num_chains, chain_method=method)
    shape = (num_chains, 10, 3) if group_by_chain else (num_chains * 10, 3)
    assert mcmc.get_samples(group_by_chain=group_by_chain)["w"].shape == shape
    diagnostics = mcmc.diagnostics()
    assert diagnostics["divergences"] == {f"chain {i}": [] for i in range(num_chains)}
    for name in ("potential", "grad_norm", "step_size"):
        assert diagnostics[name][f"chain {num_chains - 1}"].shape == (10,)
    assert diagnostics["step_size"]["chain 0"][0] == pytest.approx(1e-3)
    mcmc.summary()
    assert kernel.layout.names == ("w",)
    assert set(mcmc.transforms) == {"w"}


@pytest.mark.parametrize(
    ("kernel_class", "context"),
    [
        (SGLD, "fork"),
        (PSGLD, "fork"),
        (SGHMC, "fork"),
        (MCLMC, "fork"),
        (SGHMC, "spawn"),  # which has more state than the others; they are sent the same way
        pytest.param(SGLD, "spawn", marks=pytest.mark.thorough),
        pytest.param(PSGLD, "spawn", marks=pytest.mark.thorough),
        pytest.param(MCLMC, "spawn", marks=pytest.mark.thorough),
    ],
)
def test_parallel_chains_are_the_sequential_ones(kernel_class, context):
    settings = {"num_chains": 2, "mp_context": context}
    one, other = (
        run(kernel_class(PROBLEM.full, 1e-3, batch_size=50, seed=3), *DATA, chain_method=method, **settings)
        for method in ("sequential", "parallel")
    )
    assert torch.equal(theta(one), theta(other))
    # MCLMC takes back steps, above all with so little warm-up, and then repeats a draw.
    assert len(theta(one).flatten(0, 1).unique(dim=0)) >= (10 if kernel_class is MCLMC else 20)


def test_seeds_repeat_and_differ(kernel_class, method):
    before = torch.get_rng_state()
    one, again, other = (
        theta(run(kernel_class(PROBLEM.full, 1e-3, seed=seed), *DATA, num_chains=2, chain_method=method))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kernel_class", [SGLD, SGHMC])
def test_chains_agree_with_the_exact_posterior(kernel_class):
    """256 chains of 20 draws each. SGLD's own step size makes variances 4 % too large, SGHMC's less than 2 %."""
    own = {SGLD: {"step_size": 8e-4}, SGHMC: {"step_size": 4e-4}}
    kernel = kernel_class(PROBLEM.full, thinning=30, seed=1, compile=False, **own[kernel_class])
    mcmc = run(kernel, *DATA, chain_method="vectorized", num_samples=20, warmup_steps=5, num_chains=256)
    draws = mcmc.get_samples(group_by_chain=True)["w"].double()
    assert_gaussian(draws, PROBLEM.mean, PROBLEM.covariance, excess=0.045)
    assert float(mcmc.diagnostics()["w"]["r_hat"].max()) < 1.05  # of halves of ten draws


@pytest.mark.thorough
def test_sequential_chains_agree_with_the_exact_posterior():
    kernel = SGLD(PROBLEM.full, 8e-4, thinning=20, seed=1)
    mcmc = run(kernel, *DATA, chain_method="sequential", num_samples=1500, warmup_steps=50, num_chains=4)
    draws = mcmc.get_samples()["w"].double().reshape(100, 60, 3)  # stretches of a chain, all but independent
    assert_gaussian(draws, PROBLEM.mean, PROBLEM.covariance, excess=0.045)


def test_vectorised_chains_are_the_sequential_ones_up_to_rounding(kernel_class):
    """Hence what the vectorised chains are in distribution, the sequential ones are."""
    one, other = (
        run(kernel_class(PROBLEM.full, 1e-3, batch_size=50, seed=1), *DATA, num_chains=3, chain_method=method)
        for method in ("vectorized", "sequential")
    )
    torch.testing.assert_close(theta(one), theta(other), rtol=1e-4, atol=1e-5)


def test_initial_params(method):
    start = torch.tensor([[3.0, -2.0, 1.0], [0.0, 5.0, 1.0]])
    mcmc = run(
        SGLD(PROBLEM.full, 1e-10), *DATA,
        num_samples=1, warmup_steps=0, num_chains=2, chain_method=method, initial_params={"w": start},
    )  # fmt: skip
    torch.testing.assert_close(theta(mcmc)[:, 0], start, atol=1e-3, rtol=0)


def test_constrained_latents_in_double_precision(method):
    y = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        kernel = SGLD(constrained, 1e-3, capture=False)  # capturing takes most of the time, and has tests of its own
        draws = run(kernel, y, num_chains=2, chain_method=method).get_samples(group_by_chain=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: value.dtype for name, value in draws.items()} == dict.fromkeys(draws, torch.float64)
    assert bool((draws["scale"] > 0).all())
    torch.testing.assert_close(draws["mix"].sum(-1), torch.ones(2, 10, dtype=torch.float64))
    assert draws["corr"].shape == (2, 10, 2, 2)


def test_networks_as_they_stand(kernel_class, method):
    kernel = kernel_class(Classifier(), 1e-3, batch_size=4)
    mcmc = run(kernel, torch.randn(8, 4), torch.arange(8) % 3, num_chains=2, chain_method=method)
    assert mcmc.get_samples(group_by_chain=True)["first.weight"].shape == (2, 10, 6, 4)


def test_arviz_reads_a_run(method):
    mcmc = run(SGLD(Classifier(), 1e-3), torch.randn(8, 4), torch.arange(8) % 3, num_chains=2, chain_method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its refactoring, and omits log-likelihoods, in warnings
        import arviz as az

        idata = az.from_pyro(mcmc)
    assert idata.posterior["first.weight"].shape == (2, 10, 6, 4)
    assert not idata.sample_stats["diverging"].any()


@pytest.mark.parametrize("style", ["loader", "plate"])
def test_other_styles_of_batches(method, style):
    batches = DataLoader(TensorDataset(*DATA), batch_size=50, shuffle=True)
    model, args = (PROBLEM.full, (batches,)) if style == "loader" else (PROBLEM.subsampling, DATA)
    mcmc = run(SGLD(model, 1e-3, seed=1), *args, num_chains=2, chain_method=method)
    assert theta(mcmc).shape == (2, 10, 3)
    assert bool(theta(mcmc).isfinite().all())


def quartic(y):
    """Chains from far away run away at a step size that is fine for those from near."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    pyro.sample("obs", dist.Normal(w.square().sum(), 1.0), obs=y)


def test_a_chain_that_diverges_leaves_the_others_alone(method):
    start = torch.tensor([[0.5, 0.5], [60.0, 60.0], [-0.5, 0.5]])
    settings = {"num_samples": 100, "warmup_steps": 0, "num_chains": 3, "chain_method": method}
    with pytest.warns(RuntimeWarning, match=r"Chains \[1\] of 3 diverged.*SGLD diverged"):
        mcmc = run(SGLD(quartic, 1e-2, seed=1), torch.tensor(1.0), initial_params={"w": start}, **settings)
    assert mcmc.diagnostics()["divergences"] == {"chain 0": [], "chain 1": list(range(100)), "chain 2": []}
    assert (mcmc.missing_chains, mcmc.diverged_chains) == ([1], [1])
    assert mcmc.store.counts == [100, 0, 100]
    assert theta(mcmc).shape == (2, 100, 2)
    assert float(theta(mcmc).abs().max()) < 5
    assert len(theta(mcmc)[0].unique(dim=0)) == 100
    (error,) = mcmc.diverged
    assert (error.chain, error.site) == (1, "w")


def test_divergence_keeps_the_draws(method):
    kernel = SGLD(PROBLEM.full, lambda step: 1e-3 if step < 300 else 1.0, thinning=10, seed=1)
    mcmc = MCMC(kernel, 100, 10, num_chains=2, chain_method=method, disable_progbar=True)
    with pytest.raises(DivergenceError, match=r"try step_size=.*draws made before") as caught:
        mcmc.run(*DATA)
    counts = mcmc.store.counts
    assert all(14 <= count <= 20 for count in counts)
    assert len(caught.value.draws["w"]) == sum(counts)
    good = MCMC(
        SGLD(PROBLEM.full, 1e-3, thinning=10, seed=1), 100, 10, num_chains=2, chain_method=method, disable_progbar=True
    )
    good.run(*DATA)
    for chain, count in enumerate(counts):
        assert torch.equal(mcmc.store.theta_CSD[chain, :count], good.store.theta_CSD[chain, :count])


def test_data_that_no_model_takes(method):
    def inside(x, y):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    mcmc = MCMC(SGLD(inside, 1e-3, batch_size=20), 5, 5, num_chains=2, chain_method=method, disable_progbar=True)
    with pytest.raises(ModelError):
        mcmc.run(*DATA)
    assert mcmc._samples is None


def test_data_are_let_go_of(method):
    import gc
    import weakref

    x, y = PROBLEM.x.clone(), PROBLEM.y.clone()
    kernel = SGLD(PROBLEM.full, 1e-3, batch_size=50)
    mcmc = run(kernel, x, y, num_chains=2, chain_method=method)
    mcmc._args = None
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def killed(kernel, path, method, args, seed):
    """A run that was killed twice at random, and the same run left in peace."""
    settings = {"num_samples": 40, "warmup_steps": 20, "num_chains": 2, "chain_method": method}
    resuming = {"checkpoint": path / "c", "checkpoint_every": 3}
    delays = random.Random(seed)
    for _ in range(2):
        child = forked(lambda: run(kernel(), *args, **settings, **resuming, hook_fn=lambda *call: time.sleep(0.005)))
        wait_until((path / "c").exists, child)
        time.sleep(delays.uniform(0.0, 0.4))
        child.kill()
        child.join()
    return run(kernel(), *args, **settings, **resuming), run(kernel(), *args, **settings)


def test_killed_at_random_a_run_resumes_bit_for_bit(kernel_class, method, tmp_path):
    def kernel():
        return kernel_class(PROBLEM.full, 1e-3, batch_size=30, thinning=3, seed=5)

    resumed, whole = killed(kernel, tmp_path, method, DATA, seed=METHODS.index(method))
    assert torch.equal(theta(resumed), theta(whole))
    for name, value in whole.store.statistics.items():
        assert torch.equal(resumed.store.statistics[name], value)


@pytest.mark.parametrize("style", ["plate", "network", "constrained"])
def test_other_models_resume_bit_for_bit(style, method, tmp_path):
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    model, args, settings = {
        "plate": (PROBLEM.subsampling, DATA, {}),
        "network": (Classifier(), (x, y), {"batch_size": 7}),
        "constrained": (constrained, (torch.randn(20),), {"capture": False}),
    }[style]
    resumed, whole = killed(
        lambda: SGHMC(model, 1e-3, seed=2, **settings), tmp_path, method, args, seed=METHODS.index(method)
    )
    for name, value in whole.get_samples().items():
        assert torch.equal(resumed.get_samples()[name], value)


def test_disk_holds_the_same(method, tmp_path):
    kernel = SGLD(Classifier(), 1e-3, batch_size=4, seed=1)
    args = torch.randn(8, 4), torch.arange(8) % 3
    memory, disk = (
        run(kernel, *args, num_chains=2, chain_method=method, **settings)
        for settings in ({}, {"store": "disk", "store_path": tmp_path / "s"})
    )
    reopened = open_store(tmp_path / "s").get_samples(group_by_chain=True)
    for name, value in memory.get_samples(group_by_chain=True).items():
        assert torch.equal(disk.get_samples(group_by_chain=True)[name], value)
        assert torch.equal(reopened[name], value)
