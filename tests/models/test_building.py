# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is refused around a model: its plates' own rows, and handlers; and targets that a model masks."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.building import build_potential, checked_model

N, B = 24, 6
_GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(N, 3, generator=_GENERATOR)
Y = torch.randn(N, generator=_GENERATOR)
COUNTS = torch.arange(N) % 4 - 1


def weights(*shape):
    return pyro.sample("w", dist.Normal(torch.zeros(*shape), 1.0).to_event(len(shape)))


def regression(x, y):
    w = weights(3)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


def on_rows(rows):
    def model(x, y):
        w = weights(3)
        with pyro.plate("data", N, subsample=rows()) as i:
            pyro.sample("obs", dist.Normal(x[i] @ w, 1.0), obs=y[i])

    return model


def test_a_plate_of_rows_that_the_model_chose_is_refused():
    model = on_rows(lambda: torch.arange(0, N, 4))
    with pytest.raises(ModelError, match=r"Plate 'data' is given the same 6 rows.*subsample_size=6"):
        build_potential(model, (X, Y), {})
    with pytest.raises(ModelError, match="Plate 'data' is given the same 3 rows"):
        build_potential(on_rows(lambda: [1, 2, 3]), (X, Y), {})


def test_a_plate_of_rows_that_the_model_draws_is_one_that_subsamples():
    potential, _ = build_potential(on_rows(lambda: torch.randperm(N)[:B]), (X, Y), {}, seed=0)
    assert potential.source.plates == {"data": (N, B)}
    potential, _ = build_potential(on_rows(lambda: torch.arange(N)), (X, Y), {}, seed=0)
    assert potential.source.is_full


@pytest.mark.parametrize(
    "handler",
    [
        lambda: poutine.scale(scale=0.1),
        lambda: poutine.mask(mask=torch.arange(N) < 4),
        lambda: poutine.condition(data={"w": torch.zeros(3)}),
        lambda: pyro.plate("outer", 3, dim=-2),
    ],
)
def test_a_run_inside_handlers_is_refused(handler):
    with handler(), pytest.raises(ModelError, match=r"inside handlers of Pyro.*put them around the model"):
        build_potential(regression, (X, Y), {}, batch_size=B)
    with poutine.trace(), poutine.block():
        build_potential(regression, (X, Y), {}, batch_size=B)


def test_obs_mask_in_a_plate_that_subsamples_is_a_mask():
    keep = torch.arange(N) % 3 > 0

    def model(x, y, masked):
        w = weights(3)
        with pyro.plate("data", N, subsample_size=B) as i:
            fn = dist.Normal(x[i] @ w, 1.0)
            if masked:
                pyro.sample("obs", fn.mask(keep[i]), obs=y[i])
            else:
                pyro.sample("obs", fn, obs=y[i], obs_mask=keep[i])

    energies = []
    for masked in (True, False):
        potential, start = build_potential(model, (X, Y), {"masked": masked}, seed=0, capture=False)
        assert list(start) == ["w"]
        inputs = (torch.arange(B),)
        energies.append(potential.gradient(torch.ones(3), inputs)[1])
    assert torch.equal(*energies)


def poisson(x, y):
    w = weights(3)
    with pyro.plate("data", len(x)), poutine.mask(mask=y >= 0):
        pyro.sample("obs", dist.Poisson((x @ w).exp()), obs=y)


@pytest.mark.parametrize(
    ("args", "batch_size"),
    [
        ((X, COUNTS.float()), None),
        ((X, COUNTS.float()), B),
        ((DataLoader(TensorDataset(X, COUNTS.float()), batch_size=B),), None),
    ],
)
def test_targets_outside_the_support_may_be_masked(args, batch_size):
    potential, _ = build_potential(poisson, args, {}, batch_size=batch_size, seed=0)
    assert potential.is_finite_at_start(potential.source.draw())


def test_masked_labels_that_are_no_class_are_refused():
    def model(x, y):
        w = weights(3, 3)
        with pyro.plate("data", len(x)), poutine.mask(mask=y >= 0):
            pyro.sample("obs", dist.Categorical(logits=x @ w), obs=y)

    for batch_size in (None, B):
        with pytest.raises(DataError, match=r"'obs'(.|\n)*masked is scored all the same(.|\n)*y.clamp\(min=0\)"):
            build_potential(model, (X, COUNTS), {}, batch_size=batch_size, seed=0)


def test_rows_of_0_and_1_are_no_class_labels():
    def model(x, y):
        w = weights(3, 3)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=x @ w), obs=y)

    with pytest.raises(DataError, match=r"y.argmax\(-1\), or OneHotCategorical"):
        build_potential(model, (X, torch.eye(3)[COUNTS]), {})


def test_a_plate_of_some_rows_of_a_batch_is_refused():
    def model(x, y, keep):
        w = weights(3)
        with pyro.plate("data", int(keep.sum())):
            pyro.sample("obs", dist.Normal(x[keep] @ w, 1.0), obs=y[keep])

    with pytest.raises(ModelError, match=r"size cannot be zero.*mask=keep"):
        build_potential(model, (X, Y, torch.arange(N) == 3), {}, batch_size=B)


def test_what_is_no_model():
    with pytest.raises(ValueError, match=r"model=3 must be a Pyro model, that is a callable; got int"):
        checked_model(3)
    with pytest.raises(ValueError, match=r"model=Module is a class; give an instance of it, such as Module\(\)"):
        checked_model(torch.nn.Module)
    assert checked_model(weights) is weights
