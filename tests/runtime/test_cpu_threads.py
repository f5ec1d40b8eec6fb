# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Small steps run on one thread, and the number of threads is restored."""

from contextlib import nullcontext

import pytest
import torch
from pyro.infer import MCMC as PyroMCMC
from torch import nn

import pyro_apd as apd
from pyro_apd.kernels import SGLD
from pyro_apd.runtime.cpu_threads import SMALL_SECONDS, cpu_threads, threads_for

X, LABELS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


@pytest.fixture(autouse=True)
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    Watched.threads, Watched.error = [], None
    yield
    torch.set_num_threads(before)


class Watched(nn.Module):
    """A network that notes the threads, and raises an error where it is told to; all copies of it alike."""

    threads: list[int]
    error: BaseException | None

    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.wide = nn.Linear(width, width)

    def forward(self, x):
        if self.error is not None and torch.get_num_threads() == 1:
            raise self.error
        self.threads.append(torch.get_num_threads())
        return self.layer(x)


def test_small_steps_on_a_cpu_take_one_thread():
    cpu = torch.device("cpu")
    assert threads_for(SMALL_SECONDS, cpu) == 1
    assert threads_for(2 * SMALL_SECONDS, cpu) is None
    with cpu_threads(2):
        assert threads_for(2 * SMALL_SECONDS, cpu) == 1
        assert threads_for(20 * SMALL_SECONDS, cpu) is None
    assert threads_for(0.0, torch.device("cuda")) is None


def test_within_and_afterwards():
    with cpu_threads(1):
        with cpu_threads(2):
            assert torch.get_num_threads() == 2
        with cpu_threads(None):
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_restored_after_errors(error):
    with pytest.raises(error), cpu_threads(1):
        raise error
    assert torch.get_num_threads() == 3


def runs(kernel, driver):
    driver(kernel, num_samples=3, warmup_steps=2, disable_progbar=True).run(X, LABELS)


@pytest.mark.parametrize("driver", [apd.MCMC, PyroMCMC])
def test_steps_of_a_small_network(driver):
    runs(SGLD(apd.BNN(Watched()), 1e-3, batch_size=20, seed=1, capture=False), driver)
    assert Watched.threads[-5:] == [1] * 5  # the checks before the first step are not steps
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("driver", [apd.MCMC, PyroMCMC])
def test_restored_after_a_step_that_fails(driver, error):
    Watched.error = error("in a step")
    with pytest.raises(error):
        runs(SGLD(apd.BNN(Watched()), 1e-3, batch_size=20, seed=1, capture=False), driver)
    assert torch.get_num_threads() == 3


def test_steps_of_a_large_network_take_all_threads():
    # All weights are moved at each step, though nothing is computed with most of them.
    runs(SGLD(apd.BNN(Watched(width=800)), 1e-6, batch_size=20, seed=1, capture=False), apd.MCMC)
    assert set(Watched.threads) == {3}


def test_draws_of_a_small_network_do_not_depend_on_the_threads():
    def draws(num_threads):
        with cpu_threads(num_threads):
            kernel = SGLD(apd.BNN(nn.Linear(4, 3)), 1e-3, batch_size=20, seed=1, capture=False)
            mcmc = apd.MCMC(kernel, 4, 2, disable_progbar=True)
            mcmc.run(X, LABELS)
            return mcmc.get_samples()

    one, three = draws(1), draws(3)
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_distilling_a_small_network(monkeypatch, error):
    from pyro_apd.distillation import offline

    seen, train = [], offline.train

    def watched(*args, **options):
        seen.append(torch.get_num_threads())
        if error is not None:
            raise error
        return train(*args, **options)

    monkeypatch.setattr(offline, "train", watched)
    draws = {"w": torch.randn(60, 5, generator=torch.Generator().manual_seed(0))}
    with nullcontext() if error is None else pytest.raises(error):
        apd.distill(draws, num_steps=1, seed=0, progress=False, strict=False)
    assert seen == [1]
    assert torch.get_num_threads() == 3
