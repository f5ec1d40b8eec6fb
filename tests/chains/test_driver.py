# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The driver, on a kernel that costs nothing; :mod:`tests.chains.test_driver_kernels` runs it on real ones."""

import errno
import faulthandler
import gc
import logging
import multiprocessing
import multiprocessing.process
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.multiprocessing
from pyro.infer import NUTS
from pyro.poutine.runtime import am_i_wrapped
from tqdm import tqdm

from pyro_apd.chains.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from pyro_apd.chains.driver import MCMC, open_store
from pyro_apd.chains.run import Run
from pyro_apd.chains.stores.disk import DiskStore
from pyro_apd.chains.workers import WorkerError
from pyro_apd.errors import DivergenceError
from pyro_apd.models.layout import Layout
from pyro_apd.runtime.threads import one_thread
from tests.chains.walk import LAYOUT, Walk

METHODS = ["vectorized", "sequential", "parallel"]
DATA = (torch.ones(4, 2),)
# Seconds that tests wait for other processes.
_PATIENCE = 120


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def _interruptible():
    """Whatever runs the tests in the background may have had interrupts ignored.

    Nor is garbage collected meanwhile: Python drops an interrupt that arrives while a callback of the collector's
    runs, and hypothesis has one for as long as the process lives.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, before)


def driver(kernel=None, num_samples=8, warmup_steps=3, **settings):
    settings = {"disable_progbar": True, **settings}
    return MCMC(Walk() if kernel is None else kernel, num_samples, warmup_steps, **settings)


def run(kernel=None, *, data=DATA, **settings):
    mcmc = driver(kernel, **settings)
    mcmc.run(*data)
    return mcmc


def theta(mcmc):
    return mcmc.store.unconstrained()


# -- what it gives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chains", [1, 3])
@pytest.mark.parametrize("group_by_chain", [False, True])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_interface(method, num_chains, group_by_chain, store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)  # nothing depends on it, and nothing warns
    path = {"store_path": tmp_path / "s"} if store == "disk" else {}
    mcmc = run(num_chains=num_chains, chain_method=method, store=store, **path)
    leading = (num_chains, 8) if group_by_chain else (num_chains * 8,)
    draws = mcmc.get_samples(group_by_chain=group_by_chain)
    assert list(draws) == ["b", "scale", "w"]
    assert {n: v.shape for n, v in draws.items()} == {n: (*leading, *LAYOUT[n].shape) for n in draws}
    assert bool((draws["scale"] > 0).all())
    assert mcmc.get_samples(5, group_by_chain)["w"].shape == ((num_chains, 5, 3) if group_by_chain else (5, 3))
    diagnostics = mcmc.diagnostics()
    assert diagnostics["divergences"] == {f"chain {i}": [] for i in range(num_chains)}
    torch.testing.assert_close(diagnostics["potential"]["chain 0"], theta(mcmc)[0].square().sum(-1))
    assert diagnostics["w"]["r_hat"].shape == (3,)
    mcmc.summary()
    assert mcmc.diverged == []


def test_every_method_draws_the_same_of_this_kernel():
    """Its vectorised chains are bit for bit the single ones; those of real kernels are up to rounding."""
    one, *others = [theta(run(num_chains=3, chain_method=m)) for m in (*METHODS, None)]
    assert all(torch.equal(one, other) for other in others)
    assert len(one.flatten(0, 1).unique(dim=0)) == 24


# In the default run, a kernel of the package's is spawned in :mod:`tests.chains.test_driver_kernels`.
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.thorough)])
def test_parallel_contexts(context):
    mcmc = run(num_chains=2, chain_method="parallel", mp_context=context)
    assert torch.equal(theta(mcmc), theta(run(num_chains=2, chain_method="sequential")))


def test_one_chain_is_the_same_by_any_method(method):
    assert torch.equal(theta(run(chain_method=method)), theta(run()))


def test_real_sites_are_views_of_one_buffer(method):
    mcmc = run(num_chains=2, chain_method=method)
    address = mcmc.store.theta_CSD.untyped_storage().data_ptr()
    for grouped in (True, False):
        draws = mcmc.get_samples(group_by_chain=grouped)
        assert {n for n, v in draws.items() if v.untyped_storage().data_ptr() == address} == {"w", "b"}


def test_disk_and_memory_hold_the_same(method, tmp_path):
    mcmc = run(num_chains=2, chain_method=method, store="disk", store_path=tmp_path / "s")
    assert isinstance(mcmc.store, DiskStore)
    reopened = open_store(tmp_path / "s")
    for store in (mcmc.store, reopened):
        assert torch.equal(store.unconstrained(), theta(run(num_chains=2, chain_method=method)))
    torch.testing.assert_close(reopened.get_samples()["scale"], mcmc.get_samples()["scale"])


@pytest.mark.parametrize("names", [["w", "b"], ["b", "w"], ["scale"]])
def test_save_params(method, names):
    """Pyro's own driver scrambles them where they are not sorted."""
    mcmc, every = (run(num_chains=2, chain_method=method, save_params=n) for n in (names, None))
    assert set(mcmc.get_samples()) == set(names)
    assert mcmc.store.theta_CSD.shape[-1] == sum(LAYOUT[name].size for name in names)
    for name in names:
        assert torch.equal(mcmc.get_samples()[name], every.get_samples()[name])


def test_save_params_that_are_no_sites(method):
    with pytest.raises(ValueError, match=r"save_params has \['v'\]"):
        run(save_params=["v"], chain_method=method, num_chains=2)


def test_given_transforms():
    mcmc = run(transforms={"w": torch.distributions.transforms.AffineTransform(0.0, 2.0)})
    torch.testing.assert_close(mcmc.get_samples()["w"], run().get_samples()["w"] / 2)
    torch.testing.assert_close(mcmc.get_samples()["scale"], run().get_samples()["scale"].log())


def test_transforms_and_arguments_as_pyros():
    mcmc = run()
    assert set(mcmc.transforms) == set(LAYOUT.names)
    assert mcmc._args[0] is DATA[0]
    assert driver(warmup_steps=None).warmup_steps == 8


def test_run_twice_starts_over(method, tmp_path):
    for settings in ({}, {"store": "disk", "store_path": tmp_path / "s"}):
        mcmc = run(num_chains=2, chain_method=method, **settings)
        first = mcmc.get_samples()
        copy = {name: value.clone() for name, value in first.items()}
        mcmc.run(*DATA)
        assert torch.equal(mcmc.get_samples()["w"], copy["w"])
        assert mcmc.get_samples()["w"].data_ptr() != first["w"].data_ptr()
        assert torch.equal(first["w"], copy["w"])


def test_finished_runs_pickle_with_one_copy_of_the_draws(method):
    layout = Layout({"w": (100,), "v": (100,), "u": (2,)})
    mcmc = run(Walk(layout=layout), num_samples=500, chain_method=method, num_chains=2)
    contents = pickle.dumps(mcmc)
    assert len(contents) < 1.2 * theta(mcmc).numel() * 4
    again = pickle.loads(contents)
    for name, value in mcmc.get_samples(group_by_chain=True).items():
        assert torch.equal(again.get_samples(group_by_chain=True)[name], value)


def test_a_run_on_disk_pickles_by_its_path(tmp_path):
    layout = Layout({"w": (100,), "v": (100,)})
    mcmc = run(Walk(layout=layout), num_samples=500, store="disk", store_path=tmp_path / "s")
    contents = pickle.dumps(mcmc)
    assert len(contents) < 0.1 * theta(mcmc).numel() * 4
    assert torch.equal(pickle.loads(contents).get_samples()["w"], mcmc.get_samples()["w"])


def test_initial_params(method):
    start = {"w": torch.full((2, 3), 100.0), "scale": torch.zeros(2), "b": torch.zeros(2, 2, 2)}
    start["w"][1] *= -1
    mcmc = run(num_samples=1, warmup_steps=0, num_chains=2, chain_method=method, initial_params=start)
    assert torch.equal(mcmc.get_samples()["w"][:, 0].sign(), torch.tensor([1.0, -1.0]))
    one = {name: value[0] for name, value in start.items()}
    assert bool((run(num_samples=1, warmup_steps=0, initial_params=one).get_samples()["w"] > 40).all())


# -- seeds and global state -------------------------------------------------------------------------------------------


def test_seeds_repeat_a_run_and_leave_the_global_generator_alone(method):
    before = torch.get_rng_state()
    one, again, other = (theta(run(Walk(seed), num_chains=2, chain_method=method)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_pyros_repeats_the_run(method):
    runs = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        kernel = Walk(seed=None)
        runs.append(theta(run(kernel, num_chains=2, chain_method=method)))
        assert kernel.seed is None
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    pyro.set_rng_seed(3)
    assert not torch.equal(theta(run(Walk(None))), theta(run(Walk(None))))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("validates", [False, True])
def test_global_state_is_as_before(method, fails, validates, tmp_path):
    pyro.param("mine", torch.ones(1))
    seen = []

    def hook(kernel, params, stage, i):
        seen.append(dist.is_validation_enabled())
        pyro.param("theirs", torch.zeros(1))
        if fails:
            raise OSError("the hook failed")

    pyro.enable_validation(validates)
    mcmc = driver(Walk(None), num_chains=2, chain_method=method, hook_fn=hook, checkpoint=tmp_path / "c")
    if fails:
        with pytest.raises(OSError, match="the hook failed"):
            mcmc.run(*DATA)
    else:
        mcmc.run(*DATA)
    assert not any(seen)
    assert dist.is_validation_enabled() == validates
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert mcmc.kernel.seed is None
    assert torch.get_num_threads() == 1
    assert not shared_folders(os.getpid())
    pyro.enable_validation(True)
    pyro.clear_param_store()


def test_validation_as_asked():
    seen = []
    hook = lambda *call: seen.append(dist.is_validation_enabled())  # noqa: E731
    for flag in (True, False, None):
        run(num_samples=1, warmup_steps=0, hook_fn=hook, disable_validation=flag)
    assert seen == [False, True, True]


# -- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chains", [1, 2])
def test_progress_bar(method, num_chains, capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    run(num_chains=num_chains, chain_method=method, disable_progbar=False)
    shown = capsys.readouterr().err
    assert "11/11" in shown
    assert "Sample" in shown
    assert "steps/s=1" in shown
    assert "divergences=0" in shown


def test_no_progress_bar(method, capfd, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    run(num_chains=2, chain_method=method)
    assert capfd.readouterr() == ("", "")


def test_without_a_progress_bar_no_lock_is_waited_for(method):
    """Forked processes share tqdm's, and one that was killed while it had it keeps it."""
    thread = threading.Thread(target=run, kwargs={"num_chains": 2, "chain_method": method}, daemon=True)
    with tqdm.get_lock():
        thread.start()
        thread.join(30)
        is_waiting = thread.is_alive()
    thread.join(30)
    assert not is_waiting


def test_parallel_hooks_run_in_the_workers(tmp_path):
    mcmc = run(num_chains=2, chain_method="parallel", hook_fn=lambda *call: (tmp_path / str(os.getpid())).touch())
    assert mcmc.store.counts == [8, 8]
    assert len(os.listdir(tmp_path)) == 2
    assert str(os.getpid()) not in os.listdir(tmp_path)


# -- chains that diverge ----------------------------------------------------------------------------------------------


def test_a_diverged_chain_is_named_and_the_others_go_on(method):
    with pytest.warns(RuntimeWarning, match=r"Chains \[1\] of 3 diverged.*chain 1 ran away"):
        mcmc = run(Walk(diverges_after={1: 6}), num_chains=3, chain_method=method)
    assert mcmc.diagnostics()["divergences"] == {"chain 0": [], "chain 1": [3, 4, 5, 6, 7], "chain 2": []}
    assert [(error.chain, error.step) for error in mcmc.diverged] == [(1, 8)]
    expected = theta(run(num_chains=3, chain_method=method))
    assert torch.equal(theta(mcmc), expected[[0, 2]])
    assert mcmc.store.counts == [8, 3, 8]
    assert torch.equal(mcmc.store.theta_CSD[1, :3], run(num_chains=3, chain_method=method).store.theta_CSD[1, :3])


def test_the_only_chain_diverges(method):
    mcmc = driver(Walk(diverges_after={0: 6}), chain_method=method)
    with pytest.raises(DivergenceError, match="chain 0 ran away") as caught:
        mcmc.run(*DATA)
    expected = run().get_samples()
    for draws in (caught.value.draws, mcmc.get_samples()):
        assert {name: len(value) for name, value in draws.items()} == {"w": 3, "scale": 3, "b": 3}
        assert torch.equal(draws["w"], expected["w"][:3])
    assert mcmc.diagnostics()["divergences"] == {"chain 0": []}


def test_all_chains_diverge_and_their_draws_are_kept(method):
    mcmc = driver(Walk(diverges_after={0: 5, 1: 7}), num_chains=2, chain_method=method)
    with pytest.raises(DivergenceError, match="chain 0 ran away") as caught:
        mcmc.run(*DATA)
    expected = run(num_chains=2, chain_method=method).get_samples(group_by_chain=True)["w"]
    assert torch.equal(caught.value.draws["w"], torch.cat([expected[0, :2], expected[1, :4]]))
    assert torch.equal(mcmc.get_samples(group_by_chain=True)["w"], expected[:, :2])
    assert mcmc.store.counts == [2, 4]
    assert len(mcmc.diverged) == 2


def test_divergence_before_the_first_kept_draw():
    mcmc = driver(Walk(diverges_after={0: 1}))
    with pytest.raises(DivergenceError):
        mcmc.run(*DATA)
    assert mcmc.get_samples()["w"].shape == (0, 3)


# -- interruptions ----------------------------------------------------------------------------------------------------


def interrupting(at, chain=0, phase="Sample"):
    """A hook that presses Ctrl-C: to the whole group of processes where it runs in a worker."""
    parent = os.getpid()

    def hook(kernel, params, stage, i):
        if stage.startswith(phase) and i == at and (f"[{chain}]" in stage or "[" not in stage):
            if os.getpid() == parent:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)  # ignored
            os.kill(parent, signal.SIGINT)
            time.sleep(30)

    return hook


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_an_interrupt_leaves_the_draws_so_far(method, store, tmp_path):
    path = {"store_path": tmp_path / "s"} if store == "disk" else {}
    mcmc = driver(num_chains=2, chain_method=method, hook_fn=interrupting(5, chain=1), store=store, **path)
    with pytest.warns(RuntimeWarning, match=r"Interrupted: \d of 8 draws of chains"):
        mcmc.run(*DATA)
    expected = theta(run(num_chains=2, chain_method=method))
    counts = mcmc.store.counts
    assert counts[1] == 6
    assert counts[0] >= (6 if method == "vectorized" else 8 if method == "sequential" else 0)
    for chain, count in enumerate(counts):
        assert torch.equal(mcmc.store.theta_CSD[chain, :count], expected[chain, :count])
    assert mcmc.num_samples == 8
    assert mcmc.get_samples(group_by_chain=True)["w"].shape[:2].numel() >= 6
    assert pickle.loads(pickle.dumps(driver())).num_samples == 8


def test_an_interrupt_while_a_process_is_started_is_not_lost(monkeypatch):
    """Python drops what is raised in the callbacks of a fork, and would keep the lock of logging with it."""
    start, started = multiprocessing.process.BaseProcess.start, []

    def interrupted(process):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler runs between two instructions of Python
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(num_chains=2, chain_method="parallel")
    assert len(started) == 1  # the interrupt waited for it, and no other was started
    assert not multiprocessing.active_children()


def test_an_interrupt_before_the_first_draw_is_raised_on():
    def hook(kernel, params, stage, i):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(hook_fn=hook)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("at", [0, 4])
def test_an_interrupt_before_the_first_draw_names_the_checkpoint(method, at, tmp_path):
    path = tmp_path / "run.ckpt"
    options = {"num_chains": 2, "chain_method": method, "warmup_steps": 6, "checkpoint": path, "checkpoint_every": 2}
    interrupt = interrupting(at, phase="Warmup")

    def hook(kernel, params, stage, i):
        if method == "parallel" and stage == "Warmup [1]" and i == at:
            time.sleep(30)  # until the first chain's interrupt ends it, so that it has no draws by then
        interrupt(kernel, params, stage, i)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(hook_fn=hook, **options)
    (note,) = caught.value.__notes__
    assert f"'{path}'" in note
    assert "the same call of MCMC(...).run() continues" in note
    assert torch.equal(theta(run(**options)), theta(run(**{**options, "checkpoint": None, "checkpoint_every": None})))


def test_an_error_in_a_hook_leaves_the_draws_so_far(method):
    def hook(kernel, params, stage, i):
        if stage.startswith("Sample") and i == 4:
            raise OSError("no more")

    mcmc = driver(num_chains=2, chain_method=method, hook_fn=hook)
    with pytest.raises(OSError, match="no more"):
        mcmc.run(*DATA)
    assert max(mcmc.store.counts) == 5
    assert len(mcmc.get_samples()["w"]) >= 5


# -- workers that die -------------------------------------------------------------------------------------------------


def dying(how, chain=1, at=4):
    def hook(kernel, params, stage, i):
        if stage == f"Sample [{chain}]" and i == at:
            how()

    return hook


@pytest.mark.parametrize(
    ("how", "code"),
    [(lambda: os._exit(3), 3), (lambda: os._exit(0), 0), (lambda: os.kill(os.getpid(), signal.SIGKILL), -9)],
    ids=["exit 3", "exit 0", "killed"],
)
def test_a_dead_worker_ends_the_run_and_is_named(how, code):
    mcmc = driver(num_chains=2, chain_method="parallel", hook_fn=dying(how))
    with pytest.raises(WorkerError, match=rf"worker of chain 1 .*exit code {code} ") as caught:
        mcmc.run(*DATA)
    assert (caught.value.chain, caught.value.exitcode) == (1, code)
    assert mcmc.store.counts[1] == 5
    expected = theta(run(num_chains=2, chain_method="parallel"))
    for chain, count in enumerate(mcmc.store.counts):
        assert torch.equal(mcmc.store.theta_CSD[chain, :count], expected[chain, :count])
    assert len(mcmc.get_samples()["w"]) >= 5


class Unfit(Walk):
    """Kernels that do not survive being sent to a process."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def __getstate__(self):
        if self.how == "pickle":
            raise TypeError("cannot be pickled")
        return self.__dict__

    def __setstate__(self, state):
        os._exit(5)


def test_a_kernel_that_does_not_pickle():
    with pytest.raises(WorkerError, match=r"worker of chain 0 could not be started \(TypeError: cannot be pickled"):
        run(Unfit("pickle"), num_chains=2, chain_method="parallel", mp_context="spawn")


@pytest.mark.slow
def test_a_kernel_that_does_not_unpickle():
    # Both workers end the same way, and either may be the first.
    with pytest.raises(WorkerError, match=r"worker of chain [01] ended with exit code 5"):
        run(Unfit("unpickle"), num_chains=2, chain_method="parallel", mp_context="spawn")


def test_workers_end_with_their_parent(tmp_path):
    """A parent that is killed cannot tell its workers."""

    def hook(kernel, params, stage, i):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.02)

    parent = forked(lambda: run(num_samples=10_000, num_chains=2, chain_method="parallel", hook_fn=hook))
    wait_until(lambda: len(os.listdir(tmp_path)) == 2)
    parent.kill()
    parent.join()
    workers = [int(pid) for pid in os.listdir(tmp_path)]
    wait_until(lambda: not any(is_running(pid) for pid in workers))
    assert not any(is_running(pid) for pid in workers)
    assert len(shared_folders(parent.pid)) == 1  # what a killed run leaves
    shutil.rmtree(shared_folders(parent.pid)[0])


@pytest.mark.slow
def test_workers_end_with_their_parent_though_they_wait_for_it_to_read(tmp_path):
    """A parent that is stopped does not read, until pipes are full of checkpoints."""
    settings = {"chain_method": "parallel", "mp_context": "fork", "checkpoint_every": 1}
    settings |= {"hook_fn": lambda *call: (tmp_path / str(os.getpid())).touch(), "checkpoint": tmp_path.parent / "c"}
    parent = forked(lambda: run(num_samples=100_000, num_chains=2, **settings))
    wait_until(lambda: len(os.listdir(tmp_path)) == 2, parent)
    workers = [int(pid) for pid in os.listdir(tmp_path)]
    os.kill(parent.pid, signal.SIGSTOP)
    wait_until(lambda: not any(is_busy(pid) for pid in workers), parent)
    parent.kill()
    parent.join()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(is_running(pid) for pid in workers):
        time.sleep(0.02)
    left = [pid for pid in workers if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def is_busy(pid, seconds=0.3):
    """Whether a process took processor time."""

    def ticks():
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]

    before = ticks()
    time.sleep(seconds)
    return ticks() != before


def shared_folders(pid):
    """Where a process's runs keep draws that others write."""
    return list(Path("/dev/shm").glob(f"pyro_apd_{pid}_*"))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, process=None, seconds=_PATIENCE):
    """For what another process does, if that is not the only thing it will do."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.is_alive(), f"the process ended with exit code {process.exitcode}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def forked(target):
    """One that says where it is if it takes too long."""

    def child():
        faulthandler.dump_traceback_later(_PATIENCE - 10, file=sys.__stderr__)
        target()

    process = torch.multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


# -- checkpoints ------------------------------------------------------------------------------------------------------


def kill_at_random(path, method, store, kills, seed):
    """Runs a child over and over and kills it, then ends the run here."""
    settings = {"num_samples": 60, "warmup_steps": 30, "num_chains": 2, "chain_method": method}
    resuming = {**settings, "checkpoint": path / "c", "checkpoint_every": 3, "store": store}
    slow = {**resuming, "hook_fn": lambda *call: time.sleep(0.002)}
    delays = random.Random(seed)
    for _ in range(kills):
        child = forked(lambda: run(**slow))
        time.sleep(delays.uniform(0.02, 0.3))
        child.kill()
        child.join()
    return run(**resuming), run(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_killed_at_random_a_run_resumes_bit_for_bit(method, store, tmp_path):
    resumed, whole = kill_at_random(tmp_path, method, store, kills=3, seed=METHODS.index(method))
    assert torch.equal(theta(resumed), theta(whole))
    for name, value in whole.store.statistics.items():
        assert torch.equal(resumed.store.statistics[name], value)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(5))
def test_killed_many_times(method, seed, tmp_path):
    resumed, whole = kill_at_random(tmp_path, method, "memory", kills=12, seed=100 + seed)
    assert torch.equal(theta(resumed), theta(whole))


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "pwrite"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
def test_killed_in_the_midst_of_writing(call, count, tmp_path):
    """At every system call that writes checkpoints or draws, one after the other."""
    settings = {"num_samples": 4, "warmup_steps": 2, "num_chains": 2}

    def child():
        whole, seen = getattr(os, call), []

        def dying(*args, **kwargs):
            seen.append(call)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(os, call, dying)
        run(**settings, checkpoint=tmp_path / "c", checkpoint_every=2)

    process = forked(child)
    process.join()
    resumed = run(**settings, checkpoint=tmp_path / "c", checkpoint_every=2)
    assert torch.equal(theta(resumed), theta(run(**settings)))
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def stopping(at):
    def hook(kernel, params, stage, i):
        if stage.startswith("Sample") and i == at:
            raise OSError("stopped")

    return hook


def stopped(path, at=5, **settings):
    """A run that broke off, with checkpoints after every draw."""
    with pytest.raises(OSError, match="stopped"):
        run(checkpoint=path, checkpoint_every=1, hook_fn=stopping(at), **settings)


def test_a_resumed_run_does_not_repeat_what_was_done(method, tmp_path):
    calls = tmp_path / "calls"

    def hook(kernel, params, stage, i):
        with calls.open("a") as file:
            file.write(f"{stage} {i}\n")

    stopped(tmp_path / "c", num_chains=2, chain_method=method)
    mcmc = run(checkpoint=tmp_path / "c", checkpoint_every=1, num_chains=2, chain_method=method, hook_fn=hook)
    assert torch.equal(theta(mcmc), theta(run(num_chains=2, chain_method=method)))
    lines = calls.read_text().splitlines()
    if method == "vectorized":
        assert lines == ["Sample 5", "Sample 6", "Sample 7"]
    elif method == "sequential":
        assert [line for line in lines if "[0]" in line] == ["Sample [0] 5", "Sample [0] 6", "Sample [0] 7"]
        assert len(lines) == 3 + 11
    else:
        assert len(lines) < 2 * 11


def test_a_finished_checkpoint_gives_its_draws_at_once(method, tmp_path):
    first = run(checkpoint=tmp_path / "c", num_chains=2, chain_method=method)
    again = run(checkpoint=tmp_path / "c", num_chains=2, chain_method=method, hook_fn=stopping(0))
    assert torch.equal(theta(again), theta(first))
    assert again.diagnostics()["potential"].keys() == {"chain 0", "chain 1"}


def test_what_a_checkpoint_consists_of(tmp_path):
    run(checkpoint=tmp_path / "deep" / "c")
    assert sorted(os.listdir(tmp_path / "deep")) == ["c", "c.draws", "c.previous"]
    assert open_store(tmp_path / "deep" / "c.draws").counts == [8]
    run(checkpoint=tmp_path / "d", store="disk", store_path=tmp_path / "draws")
    assert sorted(os.listdir(tmp_path)) == ["d", "d.previous", "deep", "draws"]


def test_draws_are_appended_and_not_rewritten(tmp_path, monkeypatch):
    written, whole = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: (written.append(len(data)), whole(f, data, at))[1])
    run(num_samples=50, checkpoint=tmp_path / "c", checkpoint_every=1)
    assert sum(written) == 50 * (LAYOUT.size + 4) * 4
    assert (tmp_path / "c").stat().st_size < 20_000


def test_draws_reach_the_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    synced, whole = [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: (synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))), whole(file))[1],
    )
    run(checkpoint=tmp_path / "c", checkpoint_every=100)
    last = max(i for i, name in enumerate(synced) if name.startswith(".c."))
    assert {"theta.npy", "statistics.npy"} <= set(synced[:last])


def test_checkpoints_come_every_so_many_draws(tmp_path, monkeypatch):
    from pyro_apd.chains import run as run_module

    seen, whole = [], run_module.write_checkpoint
    note = lambda path, checkpoint: (seen.append(checkpoint.chains[0].num_done), whole(path, checkpoint))  # noqa: E731
    monkeypatch.setattr(run_module, "write_checkpoint", note)
    run(checkpoint=tmp_path / "c", checkpoint_every=4)
    assert seen == [0, 4, 8, 11]
    seen.clear()
    run(num_samples=200, warmup_steps=200, checkpoint=tmp_path / "d")
    assert len(seen) == 22


def test_without_a_seed_the_checkpoint_remembers_it(tmp_path):
    pyro.set_rng_seed(1)
    expected = theta(run(Walk(None), num_chains=2, chain_method="sequential"))
    pyro.set_rng_seed(1)
    stopped(tmp_path / "c", kernel=Walk(None), num_chains=2, chain_method="sequential")
    pyro.set_rng_seed(99)
    resumed = run(Walk(None), num_chains=2, chain_method="sequential", checkpoint=tmp_path / "c", checkpoint_every=1)
    assert torch.equal(theta(resumed), expected)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path):
    stopped(tmp_path / "c")
    contents = bytearray((tmp_path / "c").read_bytes())
    contents[-5] ^= 255
    (tmp_path / "c").write_bytes(contents)
    with pytest.warns(RuntimeWarning, match=r"/c'? is damaged.*Resuming from the one before it"):
        mcmc = run(checkpoint=tmp_path / "c")
    assert torch.equal(theta(mcmc), theta(run()))


def test_both_checkpoints_damaged(tmp_path):
    stopped(tmp_path / "c")
    for name in ("c", "c.previous"):
        os.truncate(tmp_path / name, 30)
    with pytest.raises(CheckpointError, match="No checkpoint can be used"):
        run(checkpoint=tmp_path / "c")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 9}, "num_samples was 8, now 9"),
        ({"warmup_steps": 4}, "warmup_steps was 3, now 4"),
        ({"num_chains": 3}, "num_chains was 2, now 3"),
        ({"chain_method": "sequential"}, 'chain_method was "vectorized", now "sequential"'),
        ({"kernel": Walk(seed=1)}, "seed was 0, now 1"),
        ({"kernel": Walk(thinning=2)}, "kernel.thinning was 1, now 2"),
        ({"kernel": Unfit("never")}, 'kernel was "Walk", now "Unfit"'),
        ({"save_params": ["w"]}, r"save_params was null, now \[\"w\"\]"),
        ({"data": (torch.zeros(4, 2),)}, "argument #0 of the model was given other data"),
        ({"data": (torch.ones(5, 2),)}, "argument #0 of the model was given other data"),
        ({"initial_params": {s.name: torch.zeros(2, *s.shape) for s in LAYOUT}}, "initial_params was null"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),  # the same in every process
)  # fmt: skip
@pytest.mark.parametrize("is_finished", [False, True])
def test_the_checkpoint_of_another_run_is_refused(changed, message, is_finished, tmp_path):
    if is_finished:
        run(num_chains=2, checkpoint=tmp_path / "c")
    else:
        stopped(tmp_path / "c", num_chains=2)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        run(**{"num_chains": 2, "checkpoint": tmp_path / "c", **changed})
    assert (tmp_path / "c").read_bytes() == before
    assert open_store(tmp_path / "c.draws").counts == ([8, 8] if is_finished else [6, 6])


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    run(checkpoint=tmp_path / "c")
    with pytest.raises(CheckpointError, match="layout was"):
        run(Walk(layout=Layout({"v": (8,)})), checkpoint=tmp_path / "c")


def test_what_a_kernel_found_out_is_no_other_run(tmp_path):
    stopped(tmp_path / "c")
    kernel = Walk()
    kernel.tuning = {"step_size": 0.1}
    assert torch.equal(theta(run(kernel, checkpoint=tmp_path / "c")), theta(run()))


def test_how_often_checkpoints_come_may_change(tmp_path):
    stopped(tmp_path / "c")
    assert torch.equal(theta(run(checkpoint=tmp_path / "c", checkpoint_every=7)), theta(run()))


def test_draws_that_are_not_the_checkpoints(tmp_path):
    stopped(tmp_path / "c")
    stopped(tmp_path / "d", kernel=Walk(2))
    os.rename(tmp_path / "c.draws", tmp_path / "aside")
    with pytest.raises(CheckpointError, match="has no draws to continue"):
        run(checkpoint=tmp_path / "c")
    os.rename(tmp_path / "d.draws", tmp_path / "c.draws")
    with pytest.raises(CheckpointError, match="are not those of the checkpoint"):
        run(checkpoint=tmp_path / "c")
    os.rename(tmp_path / "c.draws", tmp_path / "d.draws")
    os.rename(tmp_path / "aside", tmp_path / "c.draws")
    open_store(tmp_path / "c.draws").truncate(0, 2)
    with pytest.raises(CheckpointError, match="chain 0 has 2 of 5"):
        run(checkpoint=tmp_path / "c")


def test_another_device_is_refused_while_chains_have_not_ended(tmp_path):
    stopped(tmp_path / "c")
    saved = read_checkpoint(tmp_path / "c")
    saved.notes["device"] = "cuda"
    write_checkpoint(tmp_path / "c", saved)
    with pytest.raises(CheckpointError, match=r"is of a run on 'cuda', and this run is on 'cpu'.* give another check"):
        run(checkpoint=tmp_path / "c")
    run(checkpoint=tmp_path / "d")
    saved = read_checkpoint(tmp_path / "d")
    saved.notes["device"] = "cuda"
    write_checkpoint(tmp_path / "d", saved)
    run(checkpoint=tmp_path / "d")


@pytest.mark.parametrize("name", ["checkpoint", "store_path"])
def test_two_runs_do_not_write_the_same_files(name, tmp_path):
    settings = {"store": "disk", "checkpoint": tmp_path / "c", "store_path": tmp_path / "s"}
    other = {"checkpoint": settings["checkpoint"]} if name == "checkpoint" else {**settings, "checkpoint": None}
    found = []

    def hook(kernel, params, stage, i):
        if stage == "Sample" and i == 2:
            with pytest.raises(CheckpointError) as error:
                # As another thread does: Pyro's handlers are not for two runs within each other.
                Run(Walk(), driver(**other)._settings, DATA, {}, ExitStack()).sample()
            found.append(str(error.value))

    assert torch.equal(theta(run(**settings, hook_fn=hook)), theta(run()))
    (message,) = found
    assert message.startswith(f"{name}='{settings[name]}' is in use by another run: this process, {os.getpid()}")
    assert sorted(os.listdir(tmp_path)) == ["c", "c.previous", "s"]
    run(**settings)


def full_after(monkeypatch, count):
    """A disk on which ``count`` writes of draws succeed."""
    whole, calls = os.pwrite, []

    def pwrite(file, data, position):
        calls.append(position)
        if len(calls) > count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(file, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_on_a_full_disk_draws_are_kept_and_the_run_resumes(store, tmp_path, monkeypatch):
    settings = {"checkpoint": tmp_path / "c", "checkpoint_every": 2, "store": store}
    mcmc = driver(**settings)
    with monkeypatch.context() as patch:
        full_after(patch, 2 * 5)
        with pytest.raises(OSError, match=r"Cannot write draw 5 of chain 0 to '.*c.draws'.*intact.*continues from"):
            mcmc.run(*DATA)
        assert {value.shape[0] for value in mcmc.get_samples().values()} == {5}
    assert torch.equal(theta(run(**settings)), theta(run()))


def test_a_checkpoint_that_cannot_be_written_says_how_to_go_on(tmp_path, monkeypatch):
    settings = {"checkpoint": tmp_path / "c", "checkpoint_every": 2}
    mcmc = driver(**settings)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def hook(kernel, params, stage, i):
        if stage == "Sample" and i == 3:
            patch.setattr(os, "replace", fail)

    with monkeypatch.context() as patch:
        mcmc = driver(**settings, hook_fn=hook)
        with pytest.raises(
            OSError, match=r"Cannot write '.*c': No space left.*'.*c' is as it was.*\[5\] by chain"
        ) as error:
            mcmc.run(*DATA)
    assert f"the same call continues from '{tmp_path / 'c'}'" in str(error.value)
    assert len(str(error.value)) < 1000
    assert mcmc.get_samples()["w"].shape[0] == 5
    assert torch.equal(theta(run(**settings)), theta(run()))


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    def hook(kernel, params, stage, i):
        if stage == "Sample" and i == 3:
            shutil.rmtree(tmp_path / "folder")

    mcmc = driver(checkpoint=tmp_path / "folder" / "c", checkpoint_every=2, hook_fn=hook)
    with pytest.raises(
        FileNotFoundError, match=r"Cannot write '.*c': there is no folder.* \[5\] by chain, are in get_s"
    ):
        mcmc.run(*DATA)
    assert torch.equal(mcmc.get_samples()["w"], run().get_samples()["w"][:5])


def test_files_of_draws_that_cannot_be_read_are_said(tmp_path):
    def hook(kernel, params, stage, i):
        if stage == "Sample" and i == 3:
            (tmp_path / "c.draws" / "theta.npy").write_bytes(b"x")
            (tmp_path / "c.draws" / "statistics.npy").write_bytes(b"x")
            shutil.move(tmp_path / "c", tmp_path / "aside")
            (tmp_path / "c").mkdir()

    mcmc = driver(checkpoint=tmp_path / "c", checkpoint_every=2, hook_fn=hook)
    with pytest.raises(IsADirectoryError, match=r"it is a folder.*draws cannot be read.*continues from") as error:
        mcmc.run(*DATA)
    assert "not in get_samples()" in error.value.__notes__[0]


@pytest.mark.parametrize(("name", "path"), [("checkpoint", "file/c"), ("store_path", "file/s")])
def test_a_folder_that_cannot_be_made(name, path, tmp_path):
    (tmp_path / "file").write_text("")
    store = {"store": "disk"} if name == "store_path" else {}
    with pytest.raises(OSError, match=rf"{name}='.*{path}': its folder cannot be made.* Nothing was written. Make the"):
        run(**{name: tmp_path / path, **store})


def test_no_room_for_the_files_of_the_draws(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyro_apd.chains.stores.disk.make_npy", fail)
    with pytest.raises(OSError, match=r"Cannot write the draws to '.*c.draws': No space.* Nothing was sampled yet"):
        run(checkpoint=tmp_path / "c")


def test_another_version_of_torch_is_said(tmp_path, monkeypatch, caplog):
    stopped(tmp_path / "c")
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        run(checkpoint=tmp_path / "c")
    assert "may differ in the last bits" in caplog.text


def test_an_interrupted_run_resumes_from_its_checkpoint(method, tmp_path):
    settings = {"num_chains": 2, "chain_method": method, "checkpoint": tmp_path / "c", "checkpoint_every": 2}
    with pytest.warns(RuntimeWarning, match="run.. again resumes from the checkpoint"):
        run(**settings, hook_fn=interrupting(5))
    assert torch.equal(theta(run(**settings)), theta(run(num_chains=2, chain_method=method)))


def test_a_dead_worker_leaves_a_checkpoint(tmp_path):
    settings = {"num_chains": 2, "chain_method": "parallel", "checkpoint": tmp_path / "c", "checkpoint_every": 1}
    with pytest.raises(WorkerError):
        run(**settings, hook_fn=dying(lambda: os._exit(1)))
    assert torch.equal(theta(run(**settings)), theta(run(num_chains=2)))


def test_a_divergence_is_remembered(method, tmp_path):
    kernel, settings = Walk(diverges_after={1: 6}), {"num_chains": 2, "chain_method": method}
    with pytest.warns(RuntimeWarning, match=r"Chains \[1\] of 2 diverged"):
        whole = run(kernel, **settings)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"Chains \[1\] of 2 diverged"):
            again = run(kernel, **settings, checkpoint=tmp_path / "c", checkpoint_every=4)
        assert torch.equal(theta(again), theta(whole))
        assert again.diagnostics()["divergences"] == whole.diagnostics()["divergences"]


def test_a_run_that_diverged_altogether_says_so_again(tmp_path):
    for _ in range(2):
        with pytest.raises(DivergenceError) as caught:
            run(Walk(diverges_after={0: 6}), checkpoint=tmp_path / "c")
        assert len(caught.value.draws["w"]) == 3


# -- kernels of others ------------------------------------------------------------------------------------------------


def gaussian():
    pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("a", dist.Normal(torch.ones(3), 0.1).to_event(1))


@pytest.mark.parametrize("chain_method", [None, "sequential"])
def test_nuts_runs_as_in_pyro(chain_method):
    mcmc = MCMC(NUTS(gaussian), 6, 6, disable_progbar=True, chain_method=chain_method, save_params=["b", "a"])
    mcmc.run()
    draws = mcmc.get_samples()
    assert {name: value.shape for name, value in draws.items()} == {"a": (6, 3), "b": (6, 2)}
    assert float((draws["a"] - 1).abs().max()) < 0.6
    mcmc.summary()


def test_nuts_chains_run_sequentially_without_a_warning():
    start = {"a": torch.ones(2, 3), "b": torch.zeros(2, 2)}
    mcmc = MCMC(
        NUTS(gaussian), 6, 6, num_chains=2, chain_method="sequential", disable_progbar=True, initial_params=start
    )
    mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["a"].shape == (2, 6, 3)
    assert set(mcmc.diagnostics()["divergences"]) == {"chain 0", "chain 1"}


@pytest.mark.slow
def test_nuts_parallel(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 4)
    mcmc = MCMC(NUTS(gaussian), 6, 6, num_chains=2, chain_method="parallel", disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["a"].shape == (2, 6, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chain_method": "vectorized"}, "chain_method='vectorized'.*NUTS"),
        ({"store": "disk", "store_path": "x"}, "store='disk'.*NUTS"),
        ({"checkpoint": "x"}, "checkpoint=.*NUTS"),
    ],
)
def test_what_other_kernels_cannot(settings, message):
    with pytest.raises(ValueError, match=message):
        MCMC(NUTS(gaussian), 6, num_chains=2, **settings)


# -- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 2.5}, "num_samples=2.5"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"num_chains": 0}, "num_chains=0"),
        ({"chain_method": "vectorised"}, "chain_method='vectorised' must be one of 'vectorized'"),
        ({"store": "tape"}, "store='tape'"),
        ({"store": "disk"}, "needs store_path="),
        ({"store_path": "x"}, "store_path='x' goes with store='disk'"),
        ({"checkpoint_every": 5}, "needs checkpoint="),
        ({"checkpoint": "x", "checkpoint_every": 0}, "checkpoint_every=0"),
        ({"num_chains": 2, "initial_params": {"w": torch.zeros(3, 3)}}, r"'w' of shape \(3, 3\).*must be 2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        driver(**settings)


def test_what_the_kernel_says_at_the_end_is_in_the_diagnostics(method, tmp_path):
    for _ in range(2):  # sampled, and read from a finished checkpoint
        mcmc = driver(num_chains=2, chain_method=method, checkpoint=tmp_path / "c")
        mcmc.run(*DATA)
        assert mcmc.diagnostics()["path"] == {f"chain {i}": "on foot, seen 8 times" for i in range(2)}


# -- threads ----------------------------------------------------------------------------------------------------------


def test_runs_in_two_threads_come_one_after_the_other(method):
    expected = [theta(run(Walk(), num_chains=n, chain_method=method)) for n in (1, 2)]
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: theta(run(Walk(), num_chains=n, chain_method=method))}))
        for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
    assert torch.equal(results[1], expected[0])
    assert torch.equal(results[2], expected[1])
    assert pyro.distributions.is_validation_enabled()
    assert not am_i_wrapped()


def test_a_run_lets_other_threads_run_models():
    order, end = [], threading.Event()

    def serve():
        while not end.is_set():
            with one_thread():
                order.append((am_i_wrapped(), dist.is_validation_enabled()))

    def hook(*call):
        order.append("draw")

    thread = threading.Thread(target=serve)
    thread.start()
    found = theta(run(num_samples=500, hook_fn=hook))
    end.set()
    thread.join(_PATIENCE)
    first, last = order.index("draw"), len(order) - order[::-1].index("draw")
    assert (False, True) in order[first:last]
    assert set(order) == {"draw", (False, True)}
    assert torch.equal(found, theta(run(num_samples=500)))
