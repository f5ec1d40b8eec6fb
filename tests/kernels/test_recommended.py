# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which kernel is recommended by size of data and network, and that it runs on the same arguments."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_apd as apd
from pyro_apd.kernels import recommended
from pyro_apd.kernels.recommended import Problem, recommend, recommended_kernel
from tests.support.models import Classifier, Conjugate

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


@pytest.fixture
def little_is_affordable(monkeypatch):
    monkeypatch.setattr(recommended, "FULL_BATCH_WORK", 100)


def test_small_data_are_used_whole(caplog):
    with caplog.at_level(logging.INFO, logger="pyro_apd"):
        kernel = recommended_kernel(PROBLEM.full, *DATA, seed=0)
    assert isinstance(kernel, apd.SGHMC)
    assert (kernel.schedule, kernel.batch_size, kernel.thinning, kernel.seed) == (None, None, 20, 0)
    assert f"{len(PROBLEM.x):,} rows and {PROBLEM.x.shape[1]} weights" in kernel.reason
    assert "all rows" in kernel.reason
    assert kernel.reason in caplog.text
    mcmc = apd.MCMC(kernel, 3, 3, disable_progbar=True)
    mcmc.run(*DATA)
    assert mcmc.diagnostics()["tuning"]["chain 0"]["step_size"] > 0


@pytest.mark.usefixtures("little_is_affordable")
def test_large_data_are_used_in_batches():
    kernel = recommended_kernel(PROBLEM.full, *DATA)
    assert isinstance(kernel, apd.PSGLD)
    assert kernel.batch_size == recommended.BATCH_SIZE
    assert "mini-batches of 100" in kernel.reason


@pytest.mark.usefixtures("little_is_affordable")
def test_rows_that_cannot_be_drawn_are_used_whole():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((x @ w).cumsum(0), 1.0).to_event(1), obs=y)

    kernel = recommended_kernel(model, *DATA)
    assert kernel.batch_size is None
    assert "cannot be drawn" in kernel.reason


@pytest.mark.parametrize(
    ("model", "args", "settings"),
    [
        (PROBLEM.full, DATA, {"batch_size": 30}),
        (PROBLEM.subsampling, DATA, {}),
        (PROBLEM.full, (DataLoader(TensorDataset(*DATA), batch_size=50),), {}),
    ],
    ids=["batch_size", "plate", "loader"],
)
def test_batches_that_are_given_are_kept(model, args, settings):
    kernel = recommended_kernel(model, *args, **settings)
    assert isinstance(kernel, apd.PSGLD)
    assert kernel.batch_size == settings.get("batch_size")
    assert "mini-batches that are given" in kernel.reason


def test_settings_and_keyword_arguments_are_kept():
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    kernel = recommended_kernel(Classifier(), x, model_kwargs={"y": y}, thinning=3, temperature=0.5)
    assert (kernel.thinning, kernel.temperature) == (3, 0.5)


def test_the_choice_is_by_rows_times_weights():
    assert "all rows" in recommend(Problem(10_000, 1_000, has_batches=False)).reason
    assert "mini-batches" in recommend(Problem(10_000, 1_001, has_batches=False)).reason
    assert "no data rows" in recommend(Problem(None, 1_000, has_batches=False)).reason


@pytest.mark.parametrize(
    ("num_weights", "expected"),
    [(4, apd.SGHMC), (99, apd.SGHMC), (100, apd.MCLMC), (2_000, apd.MCLMC), (2_001, apd.SGHMC)],
)
def test_networks_of_some_hundred_weights_get_the_microcanonical_kernel(num_weights, expected):
    found = recommend(Problem(200, num_weights, has_batches=False))
    assert found.kernel is expected
    assert found.reason.startswith(f"{expected.__name__} on all rows")
    assert recommend(Problem(200, num_weights, has_batches=False, is_cold=True)).kernel is apd.SGHMC


def test_a_mode_is_not_for_the_microcanonical_kernel():
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(150), 1.0).to_event(1))

    assert isinstance(recommended_kernel(model), apd.MCLMC)
    assert isinstance(recommended_kernel(model, temperature=0.0), apd.SGHMC)


def test_a_kernel_of_ones_own_has_no_reason():
    assert apd.SGLD(PROBLEM.full, 1e-3).reason == ""


def test_a_step_size_is_refused():
    with pytest.raises(TypeError, match="step_size='auto'"):
        recommended_kernel(PROBLEM.full, *DATA, step_size=1e-3)


def test_a_model_that_a_run_refuses_is_refused():
    with pytest.raises(apd.DataError):
        recommended_kernel(PROBLEM.full, PROBLEM.x, PROBLEM.y * float("nan"))
