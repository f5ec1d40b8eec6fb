# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Every row is looked at once: a value outside the support is named with its row, in every style of mini-batches."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_apd as apd
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models import supports
from pyro_apd.models.building import build_potential

N, BAD = 60, 47
torch.manual_seed(0)
X = torch.randn(N, 3)
BINARY = (X[:, 0] > 0).float()
POSITIVE = torch.rand(N) * 0.8 + 0.1
CLASSES = torch.arange(N) % 4


def changed(values, value, row=BAD):
    values = values.clone()
    values[row] = torch.as_tensor(value, dtype=values.dtype)
    return values


def model_of(likelihood, target=lambda y: y, context=None, outputs=()):
    """A linear model; ``target`` is applied to its targets, and ``context`` is entered around the observed site."""

    def model(x, y):
        shape = (3, *outputs)
        w = pyro.sample("w", dist.Normal(torch.zeros(shape), 0.1).to_event(len(shape)))
        with pyro.plate("data", len(x)), poutine.scale(scale=1.0) if context is None else context(y):
            pyro.sample("obs", likelihood(x @ w), obs=target(y))

    return model


def opened(model, x, y, style="rows"):
    """The potential; of what comes from outside memory, an epoch is drawn."""
    if style == "loader":
        potential, _ = build_potential(model, (DataLoader(TensorDataset(x, y), 10),), {}, capture=False)
    else:
        args = (x.numpy(), y.numpy()) if style == "stored" else (x, y)
        batch_size = None if style in ("plate", "full") else 10
        potential, _ = build_potential(model, args, {}, batch_size=batch_size, capture=False)
    for _ in range(6):
        potential.source.draw()
    return potential


def bernoulli(logits):
    return dist.Bernoulli(logits=logits)


def categorical(logits):
    return dist.Categorical(logits=logits)


def normal(mean):
    return dist.Normal(mean, 1.0)


# A model, targets of which one row is outside the support, and what the message says of it.
OUTSIDE = {
    "bernoulli": (model_of(bernoulli), changed(BINARY, 700), "value 700 .*Bernoulli: 0 or 1"),
    "categorical": (model_of(categorical, outputs=(4,)), changed(CLASSES, 9), "value 9 .*from 0 to 3"),
    "small integers": (
        model_of(categorical, outputs=(4,)),
        changed(CLASSES.to(torch.uint8), 9),
        "value 9 .*Categorical: integers from 0 to 3",
    ),
    "poisson": (model_of(lambda f: dist.Poisson(f.exp())), changed(BINARY, -1), "value -1 .*Poisson"),
    "beta": (model_of(lambda f: dist.Beta(f.exp(), 1.0)), changed(POSITIVE, 1.5), r"value 1\.5 .*Beta"),
    "images": (
        model_of(lambda f: bernoulli(f).to_event(1), outputs=(2,)),
        changed(BINARY[:, None].repeat(1, 2), [1.0, 255.0]),
        "value 255 .*Bernoulli",
    ),
    "shares": (
        model_of(lambda f: dist.Dirichlet(f.exp()), outputs=(2,)),
        changed(torch.full((N, 2), 0.5), [0.5, 0.6]),
        r"value \[0\.5, 0\.6\] .*Simplex",
    ),
}


@pytest.mark.parametrize("style", ["rows", "stored", "loader", "full"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_value_outside_the_support_is_named(name, style):
    model, y, words = OUTSIDE[name]
    place = "batch 5 of an epoch, row 7" if style == "loader" else f"row {BAD}"
    with pytest.raises(DataError, match=f"'obs' has the {words.replace(' .*', f' in {place}.*', 1)}"):
        opened(model, X, y, style)


# The same where the argument alone does not show it, so that the model runs on all rows.
BY_RUNNING = {
    "a function of the argument": (
        model_of(normal, target=torch.log),
        changed(POSITIVE, 0.0),
        "no finite log-density for its value -inf",
    ),
    "bounds by row": (
        model_of(lambda f: dist.Binomial(3 + (f > 0).float(), logits=f)),
        changed(BINARY, 3.5),
        r"value 3\.5 .*bounds that differ by row",
    ),
    "masked elsewhere": (
        model_of(bernoulli, context=lambda y: poutine.mask(mask=y < 1e4)),
        changed(BINARY, 700),
        "value 700",
    ),
    "masked by the distribution": (
        model_of(lambda f: bernoulli(f).mask(f < 1e4)),
        changed(BINARY, 700),
        "value 700",
    ),
    "a part of an argument": (
        model_of(bernoulli, target=lambda y: y[:, 1]),
        changed(BINARY[:, None].repeat(1, 2), 3),
        "value 3 ",
    ),
}


@pytest.mark.parametrize("style", ["rows", "stored", "loader"])
@pytest.mark.parametrize("name", BY_RUNNING)
def test_a_value_that_only_the_model_shows_is_named(name, style):
    model, y, words = BY_RUNNING[name]
    place = "row . of a batch" if style == "loader" else f"row {BAD}"
    with pytest.raises(DataError, match=words) as caught:
        opened(model, X, y, style)
    caught.match(place)


RIGHT = {
    "brought into range": (model_of(bernoulli, target=lambda y: y.clamp(0, 1)), changed(BINARY, 700)),
    "masked": (model_of(bernoulli, context=lambda y: poutine.mask(mask=y < 2)), changed(BINARY, 700)),
    "masked by the distribution": (
        model_of(lambda f: bernoulli(f).mask(torch.tensor(False))),
        changed(BINARY, 700),
    ),
    "all numbers": (model_of(normal), X[:, 0]),
    "a mixture": (
        model_of(
            lambda f: dist.MixtureSameFamily(categorical(torch.zeros(len(f), 2)), normal(torch.stack([f, -f], -1)))
        ),
        X[:, 0],
    ),
    "squeezed": (model_of(lambda f: normal(f.squeeze()), outputs=(1,)), X[:, 0]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_refused(name):
    model, y = RIGHT[name]
    with pyro.validation_enabled(False):  # as in a run: Pyro's validation looks at masked values, too
        for style in ("rows", "stored", "loader", "full"):
            assert_finite(opened(model, X, y, style))


def assert_finite(potential):
    """The next batch has a finite density and gradient."""
    gradient, energy = potential.gradient(torch.full((potential.layout.size,), 0.1), potential.source.draw())
    assert bool(torch.isfinite(gradient).all() & torch.isfinite(energy))


def test_a_masked_factor_is_not_refused():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 0.1).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=y < 0.5):
            pyro.factor("ll", -((x @ w - y.log().nan_to_num()) ** 2))

    for style in ("rows", "stored", "loader", "full"):
        assert_finite(opened(model, X, POSITIVE, style))


def own_rows(target):
    """A model that subsamples itself."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 0.1).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample(
                "obs", normal(x[rows] @ w) if target is torch.log else bernoulli(x[rows] @ w), obs=target(y[rows])
            )

    return model


@pytest.mark.parametrize("seed", [0, 1, 2])  # the bad row is in the first batch, or is not
@pytest.mark.parametrize(
    ("model", "y"),
    [
        (own_rows(lambda y: y), changed(BINARY, 700)),
        (own_rows(torch.log), changed(POSITIVE, 0.0)),
        (apd.BNN(nn.Linear(3, 4), subsample_size=10), changed(CLASSES, 5)),
        (apd.BNN(nn.Linear(3, 1), likelihood="bernoulli", subsample_size=10), changed(CLASSES // 2, 5)),
    ],
)
def test_rows_of_a_model_that_subsamples_are_named(model, y, seed):
    torch.manual_seed(seed)
    with pytest.raises(DataError, match=rf"row {BAD}\b"):
        opened(model, X, y, "plate")


def test_rows_of_a_model_that_states_its_size_are_named():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 0.1).to_event(1))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("obs", normal(x @ w), obs=y.log())

    opened(model, X, POSITIVE)
    with pytest.raises(DataError, match=rf"row {BAD}\b"):
        opened(model, X, changed(POSITIVE, 0.0))


def embedded(ids, y):
    table = pyro.sample("table", dist.Normal(torch.zeros(5, 2), 0.1).to_event(2))
    with pyro.plate("data", len(ids)):
        pyro.sample("obs", normal(nn.functional.embedding(ids, table).sum(-1)), obs=y)


@pytest.mark.parametrize(
    ("style", "row", "where"),
    [
        ("rows", 3, "row 3"),
        ("rows", 47, "row 47"),
        ("full", 47, "row 47"),
        ("stored", 12, "a batch"),
        ("stored", 47, "row 47"),  # it is in the first batch
        ("loader", 3, "row 3 of the first batch"),
        ("loader", 47, "a batch"),
    ],
)
def test_an_index_out_of_range_is_found(style, row, where):
    opened(embedded, CLASSES, X[:, 0], style)
    with pytest.raises(DataError, match=f"fails on {where} of its arguments.*embedding"):
        opened(embedded, changed(CLASSES, 7, row), X[:, 0], style)


def test_a_model_that_fails_on_all_rows_keeps_its_error():
    def local(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", normal(z), obs=y)

    with pytest.raises(ModelError, match="'z' lies inside the subsampled plate"):
        opened(local, X, X[:, 0])


def test_parts_are_run_and_no_more_than_needed(monkeypatch):
    """A site whose value is an argument's rows is checked without the model."""
    parts = []
    monkeypatch.setattr(supports, "_PART_ROWS", 25)
    original = supports._Rows._check
    monkeypatch.setattr(
        supports._Rows,
        "_check",
        lambda self, call, rows, *rest, **kw: (parts.append(len(rows)), original(self, call, rows, *rest, **kw)),
    )
    opened(model_of(bernoulli), X, BINARY)
    assert parts == []
    opened(model_of(normal, target=torch.log), X, POSITIVE)
    assert parts == [20, 20, 20]


def test_looking_changes_neither_batches_nor_the_global_generator():
    def drawn(y):
        torch.manual_seed(0)
        potential = opened(model_of(normal, target=torch.log), X, y, "loader")
        return potential.source.draw()[1], torch.get_rng_state()

    (one, state), (two, other) = drawn(POSITIVE), drawn(POSITIVE)
    assert torch.equal(one, two)
    assert torch.equal(state, other)


def test_later_batches_are_looked_at_where_a_chain_has_diverged():
    """After N rows, batches are no longer checked one by one."""
    epochs = [0]

    class Batches:
        def __iter__(self):
            epochs[0] += 1
            y = changed(BINARY, 1e30) if epochs[0] > 3 else BINARY
            return iter([(X, y)])

    kernel = apd.SGLD(model_of(bernoulli), 1e-4, num_data=N, seed=0, prefetch=0, compile=False, capture=False)
    mcmc = apd.MCMC(kernel, 20, 5, disable_progbar=True)
    with pytest.raises(DataError, match=rf"row {BAD}\b"):
        mcmc.run(Batches())


def test_a_density_that_overflows_far_out_only_is_not_refused():
    """At the start a wide prior may give a rate that no number holds; the chain need not stay there."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(200.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Poisson((x * w).exp()), obs=y.round())

    opened(model, changed(torch.zeros(N), 1.0, row=12), BINARY)  # which is not in the first batch
    with pytest.raises(DataError, match=rf"row {BAD} at the starting point"):
        opened(model, changed(torch.zeros(N), 1.0), BINARY)


@pytest.mark.parametrize("padding", [0, -1])
@pytest.mark.parametrize("batch_size", [4, None])
def test_padded_sequences_whose_mask_lies_inside_an_event(padding, batch_size):
    tokens = torch.randint(1, 5, (12, 4), generator=torch.Generator().manual_seed(0))
    tokens[torch.arange(12) % 3 == 0, 2:] = padding

    def model(tokens):
        w = pyro.sample("w", dist.Normal(torch.zeros(5, 5), 1.0).to_event(2))
        known = tokens > 0
        logits = w[tokens.clamp(min=0)]
        with pyro.plate("data", len(tokens)):
            fn = dist.Categorical(logits=logits, validate_args=False).mask(known).to_event(1)
            pyro.sample("obs", fn, obs=tokens.clamp(min=0) if padding else tokens)

    potential, _ = build_potential(model, (tokens,), {}, batch_size=batch_size, capture=False)
    theta = torch.linspace(-1, 1, 25)
    full, _ = build_potential(model, (tokens,), {}, capture=False)
    covering = [((), 1.0)] if batch_size is None else potential.source.cover()
    found = sum(weight * potential.gradient(theta, inputs)[0] for inputs, weight in covering)
    torch.testing.assert_close(found, full.gradient(theta, ())[0])
    logits_NTK = theta.reshape(5, 5)[tokens.clamp(min=0)]
    scores = -torch.nn.functional.cross_entropy(
        logits_NTK.flatten(0, 1), tokens.clamp(min=0).flatten(), reduction="none"
    )
    prior = dist.Normal(0.0, 1.0).log_prob(theta).sum()
    torch.testing.assert_close(full.value(theta, ()), -(scores[tokens.flatten() > 0].sum() + prior))


def test_a_likelihood_that_is_not_to_be_validated_takes_any_value():
    def model(x, y, validate):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w, validate_args=validate), obs=y)

    data = torch.randn(20, 3), torch.linspace(0, 1, 20)
    assert build_potential(model, data, {"validate": False}, batch_size=5)[0].num_data == 20
    with pytest.raises(DataError, match=r"'obs' has the value .*Bernoulli"):
        build_potential(model, data, {"validate": None}, batch_size=5)


def test_a_table_with_as_many_rows_as_the_data_is_no_argument_of_rows():
    def model(x, y, groups, table):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w + table[groups], 1.0), obs=y)

    data = torch.randn(20, 3), torch.randn(20), torch.arange(20), torch.randn(20)
    with pytest.raises(DataError, match=r"reduced to the rows of the batch.*functools.partial"):
        build_potential(model, data, {}, batch_size=5)
