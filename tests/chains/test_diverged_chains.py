# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a chain would have drawn after it diverged is left out, wherever the run is read, and this is said."""

import json
import logging
import pickle

import pytest
import torch

from pyro_apd.chains.driver import MCMC, open_store
from pyro_apd.diagnostics import compare, save_netcdf, to_arviz
from pyro_apd.diagnostics.arviz_export.export import sample_stats
from pyro_apd.diagnostics.arviz_export.stored import StoredRun
from pyro_apd.distillation.offline import distill
from pyro_apd.distillation.source import read_source
from pyro_apd.predictive.draws import read_chains, read_draws
from tests.chains.walk import Walk

# After 3 draws of warm-up: chain 1 has no good draw; or it has 17 of 20, so that 17 of each are the largest block.
EARLY, LATE = {1: 2}, {1: 20}


def run(diverges_after, num_chains=3, chain_method="vectorized", **settings):
    kernel = Walk(diverges_after=diverges_after)
    mcmc = MCMC(kernel, 20, 3, num_chains=num_chains, chain_method=chain_method, disable_progbar=True, **settings)
    with pytest.warns(RuntimeWarning, match=r"Chains \[1\] of 3 diverged and stopped") as caught:
        mcmc.run()
    return mcmc, str(caught[0].message)


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return {"store": "disk", "store_path": tmp_path / "draws"} if request.param == "disk" else {}


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
@pytest.mark.parametrize(("after", "numbers", "num_draws"), [(EARLY, [0, 2], 20), (LATE, [0, 1, 2], 17)])
def test_draws_are_those_of_the_good_chains(method, after, numbers, num_draws, store):
    good = MCMC(Walk(), 20, 3, num_chains=3, chain_method=method, disable_progbar=True)
    good.run()
    mcmc, message = run(after, chain_method=method, **store)
    expected = good.get_samples(group_by_chain=True)["w"][numbers, :num_draws]
    assert torch.equal(mcmc.get_samples(group_by_chain=True)["w"], expected)
    assert torch.equal(read_chains(mcmc).values["w"], expected)
    assert torch.equal(read_draws(mcmc)["w"], expected.flatten(0, 1))
    assert torch.equal(read_source(mcmc).theta_CSD, mcmc.store.unconstrained())
    assert len(read_source(mcmc).theta_CSD) == len(numbers)
    assert f"{num_draws} draws of chains {numbers}" in message
    assert mcmc.diagnostics()["divergences"]["chain 1"] == list(range(0 if after is EARLY else 17, 20))
    copy = pickle.loads(pickle.dumps(mcmc))
    assert torch.equal(copy.get_samples(group_by_chain=True)["w"], expected)
    assert copy.missing_chains == mcmc.missing_chains == ([1] if after is EARLY else [])


def test_a_run_resumed_after_the_divergence_leaves_it_out_too(tmp_path):
    def stop(kernel, params, stage, index):
        if (stage, index) == ("Sample", 12):
            raise RuntimeError("stopped")

    settings = {"num_chains": 3, "checkpoint": tmp_path / "c", "checkpoint_every": 2, "disable_progbar": True}
    with pytest.raises(RuntimeError, match="stopped"):
        MCMC(Walk(diverges_after=EARLY), 20, 3, hook_fn=stop, **settings).run()
    assert open_store(tmp_path / "c.draws").missing_chains == [1]
    for _ in range(2):  # from the checkpoint, and of the run that is complete
        mcmc = MCMC(Walk(diverges_after=EARLY), 20, 3, **settings)
        with pytest.warns(RuntimeWarning, match="diverged and stopped"):
            mcmc.run()
        assert mcmc.store.counts == [20, 0, 20]
        assert mcmc.missing_chains == open_store(tmp_path / "c.draws").missing_chains == [1]


def test_distill_leaves_it_out_and_says_so(caplog):
    mcmc, _ = run(EARLY)
    with caplog.at_level(logging.WARNING, "pyro_apd"):
        posterior = distill(mcmc, num_steps=0, seed=0, progress=False)
    assert "Chains [1] diverged, and are missing." in caplog.messages
    assert (posterior.metadata["num_chains"], posterior.metadata["missing_chains"]) == (2, [1])


@pytest.mark.parametrize(
    ("after", "remark"),
    [
        (EARLY, "Chains [1] diverged, and are missing."),
        (LATE, "Chains [1] diverged; of all chains only the draws from before that are here."),
    ],
)
def test_comparisons_and_exports_say_which_chains_are_missing(after, remark, tmp_path):
    mcmc, _ = run(after)
    draws = {name: value[::2] for name, value in mcmc.get_samples().items()}
    assert remark in compare(mcmc, draws, num_samples=9).notes
    idata = to_arviz(mcmc)
    assert json.loads(idata.posterior.attrs["diverged_chains"]) == [1]
    assert idata.sample_stats.potential.shape == read_chains(mcmc).values["w"].shape[:2]
    save_netcdf(idata, tmp_path / "chains.nc")
    stored = StoredRun(tmp_path / "chains.nc")
    chain = read_chains(stored)
    assert remark in chain.remarks()
    assert stored.chains == ([0, 2] if after is EARLY else [0, 1, 2])
    assert sample_stats(stored, chain)["potential"].shape == (chain.num_chains, chain.num_draws)


def test_a_run_without_divergence_has_nothing_to_say():
    mcmc = MCMC(Walk(), 20, 3, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert (mcmc.missing_chains, mcmc.diverged_chains, read_chains(mcmc).remarks()) == ([], [], [])
    assert "missing_chains" not in to_arviz(mcmc).posterior.attrs


def test_chains_that_an_interrupt_left_without_draws_are_named():
    def interrupt(kernel, params, stage, index):
        if (stage, index) == ("Sample [1]", 3):
            raise KeyboardInterrupt

    mcmc = MCMC(Walk(), 20, 3, num_chains=3, chain_method="sequential", hook_fn=interrupt, disable_progbar=True)
    with pytest.warns(RuntimeWarning, match="Interrupted"):
        mcmc.run()
    assert read_chains(mcmc).remarks() == ["Chains [1, 2] stopped before the others, and are missing."]
