# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Observed sites as users write them: labels of other dtypes, lists, and targets that are missing."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_apd as apd
from pyro_apd.errors import DataError
from pyro_apd.models.building import build_potential
from pyro_apd.predictive.predictive import log_likelihood

N = 40
torch.manual_seed(1)
X = torch.randn(N, 3)
LABELS = X[:, 0] > 0
IS_KNOWN = torch.rand(N) > 0.3
TARGETS = torch.where(IS_KNOWN, X[:, 1], torch.nan)


def gradient(model, x, y, batch_size=10, capture=False):
    """Of the full data, from batches that cover them; the full batch by itself."""
    with pyro.validation_enabled(False):
        potential, _ = build_potential(model, (x, y), {}, batch_size=batch_size, capture=capture)
        theta = torch.linspace(-0.3, 0.4, potential.layout.size)
        if batch_size is None:
            return potential.gradient(theta, potential.source.draw())[0]
        return sum(weight * potential.gradient(theta, inputs)[0] for inputs, weight in potential.source.cover())


def labelled(event):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        fn = dist.Bernoulli(logits=x @ w)
        if event:
            fn = fn.expand((len(x),)).mask(True)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", fn, obs=y)

    return model


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.uint8, torch.float64])
@pytest.mark.parametrize("event", [False, True])
def test_labels_of_any_dtype_are_scored(dtype, event):
    model = labelled(event)
    expected = gradient(model, X, LABELS.float())
    for batch_size in (10, None):
        torch.testing.assert_close(gradient(model, X, LABELS.to(dtype), batch_size), expected)


def test_labels_of_any_dtype_are_evaluated():
    draws = {"w": torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.0, 0.4]])}
    expected = log_likelihood(labelled(False), draws, X, LABELS.float())
    torch.testing.assert_close(log_likelihood(labelled(False), draws, X, LABELS), expected)


def test_labels_of_a_captured_graph_are_scored():
    expected = gradient(labelled(False), X, LABELS.float())
    torch.testing.assert_close(gradient(labelled(False), X, LABELS, capture=True), expected)


@pytest.mark.parametrize("batch_size", [10, None])
def test_lists_of_targets_are_tensors(batch_size):
    classifier = apd.BNN(nn.Linear(3, 2))
    expected = gradient(classifier, X, LABELS.long(), batch_size)
    torch.testing.assert_close(gradient(classifier, X, LABELS.long().tolist(), batch_size), expected)
    expected = gradient(labelled(False), X, LABELS.float(), batch_size)
    torch.testing.assert_close(gradient(labelled(False), X, tuple(LABELS.tolist()), batch_size), expected)


def masked(fill):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=~y.isnan()):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y.nan_to_num() if fill else y)

    return model


@pytest.mark.parametrize("batch_size", [10, None])
def test_targets_that_the_model_masks_may_be_missing(batch_size):
    found = gradient(masked(True), X, TARGETS, batch_size)
    torch.testing.assert_close(found, gradient(masked(True), X[IS_KNOWN], TARGETS[IS_KNOWN], None))


def test_a_plate_of_the_model_may_have_missing_targets():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows, poutine.mask(mask=~y[rows].isnan()):
            pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0), obs=y[rows].nan_to_num())

    potential, _ = build_potential(model, (X, TARGETS), {}, capture=False)
    theta = torch.linspace(-0.3, 0.4, 3)
    found = sum(weight * potential.gradient(theta, inputs)[0] for inputs, weight in potential.source.cover())
    torch.testing.assert_close(found, gradient(masked(True), X[IS_KNOWN], TARGETS[IS_KNOWN], None))


def plain(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


# A masked NaN has a gradient of NaN all the same.
@pytest.mark.parametrize("model", [plain, masked(False)])
@pytest.mark.parametrize("missing", [3, 31])  # of which one is in the first batch
@pytest.mark.parametrize("style", ["rows", "full", "stored"])
def test_missing_targets_are_refused_where_they_count(model, missing, style):
    y = X[:, 1].clone()
    y[missing] = torch.nan
    if style == "stored":
        args, size = (X[[missing]].repeat(20, 1).numpy(), y[[missing]].repeat(20).numpy()), 10
    else:
        args, size = (X, y), 10 if style == "rows" else None
    with pyro.validation_enabled(False), pytest.raises(DataError, match=r"#1 .*NaN or infinite.*poutine\.mask"):
        build_potential(model, args, {}, batch_size=size, capture=False)


def test_a_later_batch_with_missing_targets_is_named():
    y = X[:, 1].clone()
    y[35] = torch.nan
    kernel = apd.SGLD(plain, 1e-4, seed=0, prefetch=0, compile=False, capture=False)
    with pytest.raises(DataError, match="value nan in batch 4 of an epoch, row 5"):
        apd.MCMC(kernel, 5, 5, disable_progbar=True).run(DataLoader(TensorDataset(X, y), 10))


def with_obs_mask(x, y, is_known):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y, obs_mask=is_known)


@pytest.mark.parametrize("capture", [False, True])
def test_obs_mask_leaves_targets_out(capture):
    expected = gradient(plain, X[IS_KNOWN], TARGETS[IS_KNOWN], None)
    args = (X, TARGETS.nan_to_num(), IS_KNOWN)
    potential, _ = build_potential(with_obs_mask, args, {}, batch_size=10, capture=capture)
    assert potential.layout.names == ("w",)
    theta = torch.linspace(-0.3, 0.4, 3)
    found = sum(weight * potential.gradient(theta, inputs)[0] for inputs, weight in potential.source.cover())
    torch.testing.assert_close(found, expected)


def test_a_run_with_obs_mask_is_one_with_a_mask():
    def model(x, y, is_known, by_pyro):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            if by_pyro:
                pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y, obs_mask=is_known)
            else:
                pyro.sample("obs", dist.Bernoulli(logits=x @ w).mask(is_known), obs=y)

    def drawn(by_pyro):
        kernel = apd.SGLD(model, 1e-3, batch_size=10, seed=0, capture=False, compile=False)
        mcmc = apd.MCMC(kernel, 3, 2, num_chains=2, initial_params={"w": torch.zeros(2, 3)}, disable_progbar=True)
        mcmc.run(X, LABELS, IS_KNOWN, by_pyro)
        return mcmc.get_samples()

    assert list(drawn(True)) == ["w"]
    torch.testing.assert_close(drawn(True)["w"], drawn(False)["w"])


def test_inputs_that_are_missing_are_latents_and_need_all_rows():
    def model(x, y, is_known):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            x = pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0), obs=x, obs_mask=is_known)
            pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)

    args = (X[:, 0], X[:, 1], IS_KNOWN)
    potential, _ = build_potential(model, args, {}, capture=False)
    assert potential.layout.names == ("w", "x_unobserved")
    with pytest.raises(ValueError, match=r"'obs' has no finite .*obs_mask= .*use the full batch"):
        build_potential(model, args, {}, batch_size=10, capture=False)
