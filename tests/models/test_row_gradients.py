# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Effects of other rows that are lost in the rounding of large terms."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.errors import ModelError
from pyro_apd.models.building import build_potential
from pyro_apd.models.row_gradients import rounding_hides

_GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(24, 3, generator=_GENERATOR)
Y = torch.randn(24, generator=_GENERATOR)


def by_rows(x, w):
    return x @ w


def centred(x, w):
    return (x - x.mean(0)) @ w


def lagged(x, w):
    return x @ w + 0.5 * (x @ w).roll(1)


def by_number(x, w):
    return x @ w * (1 + 1 / len(x))


def squared(x, w):
    return (x @ w).square() - (x @ w).mean().square()


def build(mean, offset, plate_subsamples=False):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 24 if plate_subsamples else len(x), 6 if plate_subsamples else None) as rows:
            if plate_subsamples:
                x, y = x[rows], y[rows]
            pyro.sample("obs", dist.Normal(mean(x, w), 1.0), obs=y)

    return build_potential(model, (X, Y + offset), {}, batch_size=None if plate_subsamples else 6, seed=0)


@pytest.mark.parametrize("plate_subsamples", [False, True])
@pytest.mark.parametrize("mean", [centred, by_number, squared])
def test_effects_of_other_rows_show_beside_large_terms(mean, plate_subsamples):
    with pytest.raises(ModelError, match=r"'obs'.*(not a sum over rows|number of rows)"):
        build(mean, 1e5, plate_subsamples)


def test_an_observation_outside_its_plate_shows_beside_large_terms():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 24, subsample_size=6) as rows:
            pass
        pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0).to_event(1), obs=y[rows])

    with pytest.raises(ModelError, match="Move it inside the plate"):
        build_potential(model, (X, Y + 1e5), {})


def test_a_lag_shows_beside_large_terms():
    with pytest.raises(ModelError, match="not a sum over rows"):
        build(lagged, 1e3)


@pytest.mark.parametrize("offset", [1e3, 1e5, 1e6])
def test_large_terms_that_are_a_sum_over_rows_are_taken(offset):
    assert build(by_rows, offset)[0].num_data == 24
    assert build(by_rows, offset, plate_subsamples=True)[0].num_data == 24


def test_terms_hide_what_is_small_beside_them():
    terms = torch.tensor([5e9, 5e9])
    assert rounding_hides(terms, terms + 1e5)
    assert not rounding_hides(terms.double(), terms.double() + 1e5)
    assert not rounding_hides(torch.tensor([1.0, 2.0]), torch.tensor([1.1, 2.2]))
