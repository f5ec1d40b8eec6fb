# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Targets and predictions that broadcast against each other are refused; shapes that declare what they mean run."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.building import build_potential

N = 8
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
COLUMN = torch.linspace(-1, 1, N)[:, None]


def observing(make, plate=True):
    """A model that observes ``make(w, x)`` for latent w ``(3, 1)``."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
        if plate:
            with pyro.plate("data", len(x)):
                pyro.sample("obs", make(w, x), obs=y)
        else:
            pyro.sample("obs", make(w, x), obs=y)

    return model


OUTER = {
    "column of means": (lambda w, x: dist.Normal(x @ w, 1.0), COLUMN[:, 0], True),
    "two columns": (lambda w, x: dist.Normal(x @ w, 1.0), COLUMN, True),
    "column of targets": (lambda w, x: dist.Normal((x @ w)[:, 0], 1.0), COLUMN, True),
    "column of logits": (lambda w, x: dist.Bernoulli(logits=x @ w), (COLUMN[:, 0] > 0).float(), True),
    "column of rates": (lambda w, x: dist.Poisson((x @ w).exp()), torch.arange(float(N)), True),
    "without a plate": (lambda w, x: dist.Normal(x @ w, 1.0), COLUMN[:, 0], False),
    "in an event": (lambda w, x: dist.Normal(x @ w, 1.0).to_event(1), COLUMN[:, 0], False),
    "column in a row's event": (lambda w, x: dist.Normal((x @ w)[:, 0], 1.0).to_event(1), COLUMN, False),
}


@pytest.mark.parametrize("case", OUTER)
@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}], ids=["full", "batches"])
def test_outer_products_are_refused(case, settings):
    make, y, plate = OUTER[case]
    with pytest.raises(DataError, match=r"'obs'.*squeeze\(-1\).*to_event\(1\)"):
        build_potential(observing(make, plate), (X, y), {}, **settings)


def test_a_scale_of_shape_one_is_no_outer_product_and_a_mean_of_shape_one_column_is():
    def model(x, y, mean):
        b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(torch.ones(1)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean(x, b), s), obs=y)

    build_potential(model, (X, COLUMN[:, 0], lambda x, b: x[:, 0] * b), {})
    with pytest.raises(DataError, match=r"squeeze\(-1\)"):
        build_potential(model, (X, COLUMN[:, 0], lambda x, b: x[:, :1] * b), {})


def test_a_factor_for_each_pair_of_rows():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.factor("fit", dist.Normal(x @ w, 1.0).log_prob(y))

    with pytest.raises(DataError, match=r"'fit'.*pair of rows.*squeeze\(-1\)"):
        build_potential(model, (X, COLUMN[:, 0]), {})


@pytest.mark.parametrize(
    "pairs",
    [
        lambda f, y: torch.nn.functional.logsigmoid(f[:, None] - f),
        lambda f, y: (y[:, None] > y) * (f[:, None] - f),
        lambda f, y: -((f[:, None] + f) ** 2),
    ],
    ids=["differences", "in the order of targets", "symmetric"],
)
def test_a_factor_that_compares_each_row_with_each_other_runs(pairs):
    def model(x, y, column=False):
        f = x @ pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("pairs", dist.Normal(f[:, None], 1.0).log_prob(y) if column else pairs(f, y))

    build_potential(model, (X, COLUMN[:, 0]), {})
    with pytest.raises(DataError, match=r"'pairs'.*a term for each pair"):
        build_potential(model, (X, COLUMN[:, 0]), {"column": True})


@pytest.mark.parametrize("num_outputs", [2, 10])
def test_several_outputs_without_to_event(num_outputs):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, num_outputs), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    y = COLUMN.expand(N, num_outputs)
    with pytest.raises(ModelError, match=r"'obs'.*\.to_event\(1\)"):
        build_potential(model, (X, y), {})


def one_row_per_head(x, y):
    """Targets that every head is to fit; a plate says so."""
    w = pyro.sample("w", dist.Normal(torch.zeros(N, 3), 1.0).to_event(2))
    with pyro.plate("heads", N, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("obs", dist.Normal(w @ x.T, 1.0), obs=y)


def rows_at_dim_2(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("outputs", 2, dim=-1):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y[:, None].expand(-1, 2))


def column_without_plate(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
    pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y[:, None])


def one_mean_for_all(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w, 1.0), obs=y)


def soft_constraint(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("soft", dist.Normal(w, 1.0), obs=torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize(
    "model", [one_row_per_head, rows_at_dim_2, column_without_plate, one_mean_for_all, soft_constraint]
)
def test_shapes_that_mean_what_they_say_run(model):
    potential, start = build_potential(model, (X, COLUMN[:, 0]), {})
    trace = pyro.poutine.trace(pyro.poutine.condition(model, start)).get_trace(X, COLUMN[:, 0])
    torch.testing.assert_close(potential.value(potential.layout.unconstrain(start), ()), -trace.log_prob_sum())


@pytest.mark.parametrize("handler", [pyro.poutine.scale, pyro.poutine.mask])
def test_a_column_of_weights_is_refused(handler):
    def model(x, y, v):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)), handler(**{handler.__name__: v}):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    v = torch.ones(N, dtype=torch.bool) if handler is pyro.poutine.mask else torch.rand(N)
    build_potential(model, (X, COLUMN[:, 0], v), {})
    with pytest.raises(DataError, match=rf"'obs'.*{handler.__name__} of shape.*squeeze\(-1\)"):
        build_potential(model, (X, COLUMN[:, 0], v[:, None]), {})


def test_targets_as_one_event_for_each_row_are_refused():
    model = observing(lambda w, x: dist.Normal(x @ w, torch.ones(len(x))).to_event(1))
    for batch_size in (None, 4):
        with pytest.raises(DataError, match=r"every datum would be scored by every prediction"):
            build_potential(model, (X, COLUMN[:, 0]), {}, batch_size=batch_size)


def test_a_factor_for_each_pair_of_rows_is_refused_outside_a_plate():
    def model(x, y, pairs=None, total=False):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
        terms = dist.Normal(x @ w, 1.0).log_prob(y if pairs is None else pairs)
        pyro.factor("fit", terms.sum() if total else terms)

    with pytest.raises(DataError, match=r"'fit' has shape \(8, 8\).*terms.sum\(\)"):
        build_potential(model, (X, COLUMN[:, 0]), {})
    assert build_potential(model, (X, COLUMN[:, 0]), {"total": True})[0].num_data == N
    assert build_potential(model, (X, COLUMN[:, 0]), {"pairs": torch.randn(N, N)})[0].num_data == N
