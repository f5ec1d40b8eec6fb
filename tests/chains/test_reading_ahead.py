# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Runs on data outside memory: the draws are those of data in memory, and no thread outlives the run."""

import threading

import numpy as np
import pyro
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_apd as apd
from pyro_apd.chains.checkpoint import CheckpointError
from pyro_apd.data import index_stream
from pyro_apd.models.building import build_potential
from pyro_apd.runtime.prefetch import THREAD_NAME
from tests.support.models import Classifier, Conjugate

PROBLEM = Conjugate()
X, Y = PROBLEM.x, PROBLEM.y
MEMORY = (X, Y)
FILE = (X.numpy(), Y.numpy())


def kernel(**settings):
    return apd.SGLD(PROBLEM.full, **{"step_size": 1e-3, "batch_size": 40, "thinning": 5, "seed": 1, **settings})


def loader():
    return DataLoader(TensorDataset(X, Y), batch_size=40, shuffle=True)


def draws_of(args, driver=apd.MCMC, num_chains=1, **settings):
    mcmc = driver(kernel(**settings), 12, 8, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()["w"]


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not reading_threads()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"num_chains": 3}, {"replacement": True}, {"driver": pyro.infer.MCMC}])
def test_draws_from_a_file_are_those_from_memory(settings):
    expected = draws_of(MEMORY, **settings)
    for prefetch in (0, 1, 3):
        assert torch.equal(draws_of(FILE, prefetch=prefetch, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_chains", [1, 3])
def test_draws_from_a_loader_do_not_depend_on_how_far_it_is_read_ahead(num_chains):
    settings = {"batch_size": None, "num_chains": num_chains}
    expected = draws_of((loader(),), prefetch=0, **settings)
    assert torch.equal(draws_of((loader(),), **settings), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_apd.WarmupWarning")
def test_steps_found_by_themselves_with_control_variates_and_momenta():
    for made in (lambda **s: kernel(control_variates=True, **s), lambda **s: kernel(**s)):
        runs = []
        for args, prefetch in ((MEMORY, 2), (FILE, 0), (FILE, 2)):
            mcmc = apd.MCMC(made(prefetch=prefetch), 10, 10, disable_progbar=True)
            mcmc.run(*args)
            runs.append(mcmc.get_samples()["w"])
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[1], runs[2])


class Failing:
    """Rows of which the thirty-first batch cannot be read."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return len(X)

    def __getitem__(self, rows):
        self.asked += 1
        if self.asked > 30:
            raise OSError("the disk is gone")
        return X[rows]


@pytest.mark.slow
@pytest.mark.parametrize("driver", [apd.MCMC, pyro.infer.MCMC])
def test_an_error_of_reading_reaches_the_user_and_ends_the_thread(driver):
    mcmc = driver(kernel(), 20, 5, disable_progbar=True)
    with pytest.raises(OSError, match="the disk is gone"):
        mcmc.run(Failing(), Y)
    assert not reading_threads(), "while the run is still there to be looked at"


@pytest.mark.slow
@pytest.mark.parametrize("args", [FILE, (loader(),)], ids=["file", "loader"])
def test_cleaning_up_ends_the_thread_also_of_a_chain_that_is_kept(args):
    sampler = kernel(**({"batch_size": None} if len(args) == 1 else {}))
    chain = sampler.begin(args, {}, warmup_steps=0)
    with torch.no_grad():
        chain.advance(10)
    assert len(reading_threads()) == 1
    sampler.cleanup()
    assert not reading_threads()
    assert chain.step == 10


@pytest.mark.slow
@pytest.mark.parametrize("args", [FILE, (loader(),)], ids=["file", "loader"])
def test_an_interrupt_ends_the_thread(args):
    seen = []

    def interrupt(*_):
        seen.append(len(reading_threads()))
        if len(seen) == 15:
            raise KeyboardInterrupt

    settings = {"batch_size": None} if len(args) == 1 else {}
    mcmc = apd.MCMC(kernel(**settings), 20, 5, hook_fn=interrupt, disable_progbar=True)
    with pytest.warns(RuntimeWarning, match="Interrupted: 10 of 20"):
        mcmc.run(*args)
    assert seen[-1] == 1


@pytest.mark.slow
def test_a_checkpoint_knows_what_was_used_and_not_what_was_read(tmp_path):
    def run(num_draws=None, **settings):
        def stop(_, __, ___, i):
            if i == num_draws:
                raise RuntimeError("crash")

        mcmc = apd.MCMC(
            kernel(**settings), 12, 8, checkpoint=tmp_path / "c", checkpoint_every=3, hook_fn=stop, disable_progbar=True
        )
        mcmc.run(*FILE)
        return mcmc.get_samples()["w"]

    with pytest.raises(RuntimeError, match="crash"):
        run(10)
    with pytest.raises(CheckpointError, match="replacement"):
        run(replacement=True)
    assert torch.equal(run(prefetch=0), draws_of(MEMORY))


def batch_gradients(args, num_batches, batch_size=50, **settings):
    """Estimates of the likelihood's gradient at the mode ``(S, 3)``, and each row's own ``(N, 3)``."""
    theta = PROBLEM.mean
    source = build_potential(PROBLEM.full, args, {}, batch_size=batch_size, **settings)[0].source
    source.start(torch.Generator().manual_seed(0))
    found = []
    for _ in range(num_batches):
        x, y = source.bind(source.draw()).args
        found.append(len(X) / len(x) * x.T @ (x @ theta - y))
    return torch.stack(found), (X @ theta - Y).unsqueeze(-1) * X, source


@pytest.mark.parametrize("kind", ["independent", "epochs", "many rows"])
def test_gradients_of_batches_are_unbiased_with_the_variance_of_their_distribution(kind, monkeypatch):
    """N^2/B times the variance of a row's gradient; without replacement (N - B)/(N - 1) of it."""
    if kind == "many rows":
        monkeypatch.setattr(index_stream, "MAX_EPOCH_ROWS", 0)
    found, rows, source = batch_gradients(FILE, 1200, replacement=kind == "independent")
    n, batch_size = len(X), 50
    share = (n - batch_size) / (n - 1) if kind == "epochs" else 1.0
    variance = share * n**2 / batch_size * rows.var(0, correction=0)
    assert (found.var(0) / variance - 1).abs().max() < 0.15
    assert (found.mean(0) - rows.sum(0)).norm() < 5 * (variance.sum() / 1200).sqrt()
    assert source.epoch_length == (4 if kind == "epochs" else None)


@pytest.mark.parametrize("args", [MEMORY, FILE], ids=["memory", "file"])
def test_within_an_epoch_the_noise_of_batches_cancels(args):
    found, rows, _ = batch_gradients(args, 40)
    epochs = found.reshape(10, 4, 3).mean(1)
    torch.testing.assert_close(epochs, rows.sum(0).expand(10, 3), rtol=1e-4, atol=1e-2)
    assert found.std(0).min() > 10


def test_replacement_where_nothing_is_drawn_or_a_loader_draws():
    with pytest.raises(ValueError, match=r"every step here uses all data. .* batch_size="):
        apd.MCMC(kernel(batch_size=None, replacement=True), 2, 2).run(*MEMORY)
    with pytest.raises(ValueError, match=r"iterable of batches draws by itself. .*RandomSampler"):
        apd.MCMC(kernel(batch_size=None, replacement=True), 2, 2).run(loader())


@pytest.mark.parametrize("settings", [{"replacement": 1}, {"prefetch": -1}, {"prefetch": 1.5}, {"prefetch": True}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        kernel(**settings)


@pytest.mark.slow
def test_what_follows_a_run_on_a_file(tmp_path):
    """A distillation sees the model's arguments, and so do comparisons, where they are few enough to be read."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    np.save(tmp_path / "x.npy", x.numpy())
    mcmc = apd.MCMC(apd.SGLD(Classifier(), 1e-3, batch_size=20, seed=1), 40, 5, disable_progbar=True)
    mcmc.run(np.load(tmp_path / "x.npy", mmap_mode="r"), labels.numpy())
    posterior = apd.distill(mcmc, num_steps=3, seed=0, progress=False)
    assert posterior.metadata["space"] == "functions"
    fidelity = apd.diagnostics.compare(mcmc, posterior, num_samples=20, seed=0)
    assert "nll" in str(fidelity).lower()
