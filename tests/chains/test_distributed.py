# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains over processes: those of one process up to rounding, and the same again bit for bit, also after a failure.

Start, mini-batches and noise of a chain do not depend on the number of processes. Gradients of two chains at once may
differ from those of three in the last bits, as libraries of linear algebra choose their routines by shape: so runs with
different numbers of processes are compared by :func:`assert_close`, and only runs with the same number bit for bit.
"""

import os
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS

from pyro_apd.chains.checkpoint import CheckpointError
from pyro_apd.chains.distributed import RankRun, path_of_rank
from pyro_apd.chains.driver import MCMC, open_store
from pyro_apd.errors import DivergenceError
from pyro_apd.kernels import PSGLD, SGHMC, SGLD
from pyro_apd.kernels.adaptation.drift import WarmupWarning
from pyro_apd.kernels.adaptation.step_size import AutoStep
from pyro_apd.runtime.ranks import RankError
from tests.chains.walk import Walk
from tests.support.models import Classifier, Conjugate
from tests.support.processes import on_ranks

pytestmark = pytest.mark.slow

DATA = (torch.ones(4, 2),)
MODEL = Conjugate(num_data=40, dtype=torch.float64)


def driver(kernel=None, num_chains=3, method="distributed", **settings):
    settings = {"num_samples": 8, "warmup_steps": 3, "disable_progbar": True, **settings}
    return MCMC(Walk() if kernel is None else kernel, num_chains=num_chains, chain_method=method, **settings)


def run(kernel=None, data=DATA, **settings):
    mcmc = driver(kernel, **settings)
    mcmc.run(*data)
    return mcmc


def summary(mcmc):
    """What of a run can be compared, and comes over to another process."""
    diagnostics = mcmc.diagnostics()
    return {
        "chains": list(mcmc.chains),
        "draws": {name: value.clone() for name, value in mcmc.get_samples(group_by_chain=True).items()},
        "divergences": diagnostics["divergences"],
        "potential": {name: value.clone() for name, value in diagnostics["potential"].items()},
        "diverged": [(error.chain, str(error).split(";")[0]) for error in mcmc.diverged],
    }


def assert_same(found, expected):
    assert found["chains"] == expected["chains"]
    assert found["divergences"] == expected["divergences"]
    assert found["diverged"] == expected["diverged"]
    for part in ("draws", "potential"):
        assert list(found[part]) == list(expected[part])
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), (part, name)


def assert_close(found, expected, **tolerances):
    """The same up to rounding. Of diverged chains, what is compared is which they are."""
    assert found["chains"] == expected["chains"]
    assert found["divergences"] == expected["divergences"]
    assert [chain for chain, _ in found["diverged"]] == [chain for chain, _ in expected["diverged"]]
    for part in ("draws", "potential"):
        torch.testing.assert_close(found[part], expected[part], **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


def kernels():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    options = {"thinning": 3, "seed": 7}
    return {
        "SGHMC": (SGHMC(Classifier(), 1e-3, batch_size=10, warm_start=5, **options), (x, y)),
        "float64": (SGLD(MODEL.full, 1e-3, batch_size=10, **options), (MODEL.x, MODEL.y)),
    }


def test_draws_do_not_depend_on_the_number_of_processes(tmp_path):
    def on_rank(rank):
        return {name: summary(run(kernel, data)) for name, (kernel, data) in kernels().items()}

    first, second = on_ranks(on_rank, 2, tmp_path)
    for name, (kernel, data) in kernels().items():
        assert_close(first[name], summary(run(kernel, data)))  # alone
        assert second[name]["chains"] == [2]
        for site, value in second[name]["draws"].items():
            assert torch.equal(value[0], first[name]["draws"][site][2])


@pytest.mark.parametrize("gather", ["rank0", "all", "none"])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_who_gets_what(gather, store, tmp_path):
    settings = {"store": store, "store_path": tmp_path / "draws"} if store == "disk" else {}
    found = on_ranks(lambda rank: summary(run(gather=gather, **settings)), 2, tmp_path)
    expected = summary(run())
    own = [[0, 1], [2]]
    for rank, part in enumerate(found):
        is_whole = gather == "all" or (gather == "rank0" and rank == 0)
        assert part["chains"] == ([0, 1, 2] if is_whole else own[rank])
        for site, value in expected["draws"].items():
            assert torch.equal(part["draws"][site], value[part["chains"]])
        assert set(part["potential"]) == {f"chain {c}" for c in part["chains"]}
    if store == "disk":
        paths = [path_of_rank(tmp_path / "draws", r) for r in (0, 1)] if gather == "none" else [tmp_path / "draws"]
        draws = torch.cat([open_store(path).unconstrained() for path in paths])
        assert torch.equal(draws, run().store.unconstrained())


def test_sites_that_are_not_kept(tmp_path):
    first, _ = on_ranks(lambda rank: summary(run(save_params=["b"])), 2, tmp_path)
    assert torch.equal(first["draws"]["b"], run().get_samples(group_by_chain=True)["b"])


def test_initial_params_go_by_number(tmp_path):
    start = {"w": torch.arange(9.0).view(3, 3) * 100, "scale": torch.zeros(3), "b": torch.zeros(3, 2, 2)}
    settings = {"initial_params": start, "num_samples": 4, "warmup_steps": 0}
    first, _ = on_ranks(lambda rank: summary(run(**settings)), 2, tmp_path)
    assert_close(first, summary(run(**settings)))


def test_without_a_seed_that_of_the_first_process_goes_for_all(tmp_path):
    def on_rank(rank):
        torch.manual_seed(5 + rank)
        kernel = SGLD(MODEL.full, 1e-3, capture=False)
        draws = run(kernel, (MODEL.x, MODEL.y), num_chains=2, gather="all").get_samples()["w"].clone()
        assert kernel.seed is None
        return draws

    first, second = on_ranks(on_rank, 2, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, on_rank(0), rtol=1e-6, atol=1e-6)
    assert len(first.unique(dim=0)) == 16


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("diverging", [{2: 6}, {0: 5, 1: 7}, {0: 4, 1: 9, 2: 6}])
def test_chains_that_diverge(diverging, store, tmp_path):
    settings = {"store": store, "store_path": tmp_path / "draws"} if store == "disk" else {}

    def on_rank(rank):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return summary(run(Walk(diverges_after=diverging), **settings))

    first, second = on_ranks(on_rank, 2, tmp_path)
    if len(diverging) == 3:
        for error, chains in ((first, [0, 1, 2]), (second, [2])):
            assert isinstance(error, DivergenceError)
            counts = [max(diverging[chain] - 3, 0) for chain in chains]
            assert len(error.draws["w"]) == sum(counts)
        return
    with pytest.warns(RuntimeWarning, match="diverged and stopped"):
        expected = summary(run(Walk(diverges_after=diverging)))
    assert_close(first, expected)
    assert second["diverged"] == first["diverged"]


def test_the_others_go_on_where_all_chains_of_one_process_diverge(tmp_path):
    """On a real kernel: all chains of rank 1 run away, those of rank 0 do not."""

    def quartic(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("obs", dist.Normal(w.square().sum(), 1.0), obs=y)

    start = {"w": torch.tensor([[0.5, 0.5], [-0.5, 0.5], [60.0, 60.0], [70.0, 60.0]])}

    def on_rank(rank):
        kernel = SGLD(quartic, 1e-2, thinning=5, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return summary(run(kernel, (torch.tensor(1.0),), num_chains=4, initial_params=start))

    first, second = on_ranks(on_rank, 2, tmp_path)
    assert first["diverged"] == second["diverged"]
    assert [chain for chain, _ in first["diverged"]] == [2, 3]
    assert "diverged in chain 2" in first["diverged"][0][1]
    assert_close(first, on_rank(0))


def test_processes_that_were_asked_for_different_things(tmp_path):
    for error in on_ranks(lambda rank: run(Walk(seed=rank)), 2, tmp_path):
        assert isinstance(error, ValueError)
        assert "Processes disagree about seed: rank 0 has 0, rank 1 1." in str(error)
    for error in on_ranks(lambda rank: run(data=(torch.ones(4 + rank, 2),)), 2, tmp_path):
        assert "disagree about the shapes of the data" in str(error)


def test_more_processes_than_chains(tmp_path):
    for error in on_ranks(lambda rank: run(num_chains=1), 2, tmp_path):
        assert "num_chains=1 leaves some of 2 processes without a chain" in str(error)


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="gather='all' goes with chain_method='distributed'; got None"):
        MCMC(Walk(), 5, gather="all")
    with pytest.raises(ValueError, match="gather='some' must be one of 'rank0', 'all', 'none'"):
        driver(gather="some")
    with pytest.raises(ValueError, match="gather='all' goes with split='chains'"):
        driver(gather="all", split="data")
    with pytest.raises(ValueError, match="split='data' goes with chain_method='distributed'; got 'parallel'"):
        driver(method="parallel", split="data")
    with pytest.raises(ValueError, match="chain_method='distributed' is for this package's kernels"):
        driver(NUTS(MODEL.full))


# -- a step size that is found ----------------------------------------------------------------------------------------


def finding():
    """Kernels that find their step size in 150 steps of warm-up, and models of few latents and of many."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    options = {"step_size": "auto", "thinning": 10, "seed": 7}
    return {
        "few": (SGLD(MODEL.full, batch_size=10, **options), (MODEL.x, MODEL.y)),
        "many": (SGLD(Classifier(), batch_size=10, **options), (x, y)),
        "momenta": (SGHMC(Classifier(), **options), (x, y)),
        "metric": (PSGLD(Classifier(), batch_size=10, warm_start=20, **options), (x, y)),
    }


def found_by(case, **settings):
    kernel, data = finding()[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WarmupWarning)
        mcmc = run(kernel, data, warmup_steps=15, num_chains=4, **settings)
    tuning = mcmc.diagnostics()["tuning"]
    return {**summary(mcmc), "tuning": tuning}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_one_step_size_is_found_by_all_processes(size, tmp_path):
    by_rank = on_ranks(lambda rank: {case: found_by(case) for case in finding()}, size, tmp_path)
    for case in finding():
        first, alone = by_rank[0][case], found_by(case)
        found, expected = first["tuning"]["chain 0"], alone["tuning"]["chain 0"]
        assert found["bound"] == expected["bound"]
        assert found["step_size"] == pytest.approx(expected["step_size"], rel=1e-2)
        if case == "few":  # elsewhere a choice on the way may hang on the last bits, and draws on that choice
            assert_close(first, alone)
        for other in by_rank:  # among themselves, processes agree to the last bit
            assert other[case]["tuning"] == {name: found for name in other[case]["tuning"]}


def test_the_step_size_is_that_of_the_same_chains_in_one_process():
    """Of few latents nothing is random but the batches, which are the same."""
    distributed = found_by("few")["tuning"]["chain 0"]
    assert distributed == found_by("few", method="vectorized")["tuning"]["chain 0"]


def test_all_processes_slow_down_where_one_has_a_chain_that_runs_away(tmp_path, monkeypatch):
    measure = AutoStep.measure

    def too_bold(self, *states):
        measure(self, *states)
        if self._num_done == 1:
            self.step_size *= 1e3

    monkeypatch.setattr(AutoStep, "measure", too_bold)
    # Chain 3, of rank 1, alone is where the potential is steep enough for such steps.
    start = {"w": torch.tensor([[0.1], [0.1], [0.1], [6.0]])}

    def quartic(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.sample("obs", dist.Normal(w.square().sum(), 1.0), obs=y)

    def on_rank(rank, **settings):
        backed_off = []
        back_off = AutoStep.back_off

        def noted(self, step, *, is_lost):
            backed_off.append(step)
            return back_off(self, step, is_lost=is_lost)

        kernel = SGLD(quartic, "auto", thinning=50, seed=1)
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(AutoStep, "back_off", noted)
            warnings.simplefilter("ignore", WarmupWarning)
            mcmc = run(kernel, (torch.tensor(1.0),), num_chains=4, warmup_steps=12, initial_params=start)
        return {**summary(mcmc), "backed_off": backed_off}

    first, second = on_ranks(on_rank, 2, tmp_path)
    assert first["backed_off"]
    assert first["backed_off"] == second["backed_off"]
    assert first["diverged"] == []
    alone = on_rank(0)
    assert alone["backed_off"] == first["backed_off"]
    assert_close(first, alone, rtol=1e-2, atol=1e-2)


def test_a_search_for_the_step_size_resumes(tmp_path):
    """One process died after a measure that its last checkpoint came before, and the other's may have come after."""
    path, fuse = tmp_path / "run.ckpt", tmp_path / "fuse"

    def die(kernel, params, stage, i):
        if os.environ.get("RANK") == "1" and stage == "Warmup" and i == 10 and fuse.exists():
            fuse.unlink()
            os._exit(9)

    def on_rank(rank):
        return found_by("many", checkpoint=path, checkpoint_every=1, hook_fn=die)

    fuse.touch()
    error, code = on_ranks(on_rank, 2, tmp_path)
    assert (type(error), code) == (RankError, 9)
    first, _ = on_ranks(on_rank, 2, tmp_path)
    uninterrupted, _ = on_ranks(lambda rank: found_by("many"), 2, tmp_path)
    assert_same(first, uninterrupted)
    assert first["tuning"] == uninterrupted["tuning"]


# -- processes that die -----------------------------------------------------------------------------------------------


class Dying(Walk):
    """Ends its process at a draw, on one rank, as long as a file is there."""

    def __init__(self, rank, fuse):
        super().__init__()
        self._rank, self._fuse = rank, fuse

    def logging(self):
        return {}

    def die(self, kernel, params, stage, i):
        if stage == "Sample" and i == 5 and self._rank == 1 and self._fuse.exists():
            self._fuse.unlink()
            os._exit(9)


@pytest.mark.parametrize("settings", [{}, {"store": "disk"}, {"gather": "none"}], ids=str)
def test_a_process_that_dies_is_noticed_and_the_run_resumes(settings, tmp_path):
    path, fuse = tmp_path / "run.ckpt", tmp_path / "fuse"

    def on_rank(rank):
        kernel = Dying(rank, fuse)
        return summary(run(kernel, checkpoint=path, checkpoint_every=2, hook_fn=kernel.die, **settings))

    fuse.touch()
    first, code = on_ranks(on_rank, 2, tmp_path)
    assert code == 9
    if settings != {"gather": "none"}:  # who gathers nothing does not need the other
        assert isinstance(first, RankError)
        assert "Rank 0 of 2: another process of the job has ended" in str(first)
    first, second = on_ranks(on_rank, 2, tmp_path)
    whole = {"checkpoint": tmp_path / "whole.ckpt", **settings}
    expected, other = on_ranks(lambda rank: summary(run(**whole)), 2, tmp_path)
    assert_same(first, expected)
    assert_same(second, other)


def test_resuming_with_another_number_of_processes_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    on_ranks(lambda rank: summary(run(checkpoint=path)), 2, tmp_path)
    for error in on_ranks(lambda rank: run(checkpoint=path), 3, tmp_path):
        assert isinstance(error, CheckpointError)
        assert "Start as many processes as there were" in str(error)
    with pytest.raises(CheckpointError, match=r"rank and number of processes was \[0, 2\], now \[0, 1\]"):
        run(checkpoint=path)


# -- data over processes ----------------------------------------------------------------------------------------------


def on_rows(rank, **settings):
    """All chains on some of the rows; alone, on all."""
    rows = slice(None) if rank is None else slice(rank, None, 2)
    kernel = SGLD(MODEL.full, 1e-3, thinning=2, seed=1)
    return run(kernel, (MODEL.x[rows], MODEL.y[rows]), split="data", **settings)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_processes_with_some_of_the_data_each_run_all_chains(store, tmp_path):
    settings = {"store": store, "store_path": tmp_path / "draws"} if store == "disk" else {}
    first, second = on_ranks(lambda rank: summary(on_rows(rank, **settings)), 2, tmp_path)
    assert_same(first, second)
    assert first["chains"] == [0, 1, 2]
    torch.testing.assert_close(first["draws"], summary(on_rows(None))["draws"])
    if store == "disk":
        assert torch.equal(open_store(tmp_path / "draws").samples()["w"], first["draws"]["w"])


@pytest.mark.parametrize("is_torn", [False, True])
def test_processes_with_some_of_the_data_resume_together(is_torn, tmp_path, monkeypatch):
    """Killed between two checkpoints, or when one process had written and the other had not."""
    path, fuse = tmp_path / "run.ckpt", tmp_path / "fuse"
    save = RankRun._save

    def mortal(self, saved):
        if is_torn and self.ranks.rank == 1 and self._notes.get("written") == 3 and fuse.exists():
            fuse.unlink()
            os._exit(9)
        save(self, saved)

    monkeypatch.setattr(RankRun, "_save", mortal)

    def hook(kernel, params, stage, i):
        if not is_torn and os.environ["RANK"] == "1" and stage == "Sample" and i == 5 and fuse.exists():
            fuse.unlink()
            os._exit(9)

    def on_rank(rank):
        return summary(on_rows(rank, checkpoint=path, checkpoint_every=2, hook_fn=hook))

    fuse.touch()
    error, code = on_ranks(on_rank, 2, tmp_path)
    assert (type(error), code) == (RankError, 9)
    first, second = on_ranks(on_rank, 2, tmp_path)
    assert_same(first, second)
    expected, _ = on_ranks(lambda rank: summary(on_rows(rank)), 2, tmp_path)
    assert_same(first, expected)
