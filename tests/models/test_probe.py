# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which models are sums over rows in every style of mini-batches; what is not is refused, and what is runs exactly."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.data.minibatch import RowSubsample
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.building import build_potential
from pyro_apd.models.probe import Probe

N, B = 24, 6
_GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(N, 3, generator=_GENERATOR)
Y = torch.randn(N, generator=_GENERATOR)
V = torch.rand(N, generator=_GENERATOR) + 0.5


def weights():
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def scored(mean, y, scale=1.0):
    pyro.sample("obs", dist.Normal(mean, scale), obs=y)


# How a model is given its rows: (the model for a body, arguments, settings).
def by_batch_size(body, rows=(X, Y, V)):
    return given_rows(body), rows, {"batch_size": B}


def by_reader(body):
    return given_rows(body), tuple(t.numpy() for t in (X, Y, V)), {"batch_size": B}


def by_loader(body):
    return given_rows(body), (DataLoader(TensorDataset(X, Y, V), batch_size=B),), {}


def by_plate(body):
    def model(x, y, v):
        plate = pyro.plate("data", len(x), subsample_size=B)
        with plate as rows:
            pass
        body(x[rows], y[rows], v[rows], plate)

    return model, (X, Y, V), {}


def by_full_batch(body):
    return given_rows(body), (X, Y, V), {}


def given_rows(body):
    return lambda x, y, v: body(x, y, v, pyro.plate("data", len(x)))


STYLES = {"batch_size": by_batch_size, "reader": by_reader, "loader": by_loader, "plate": by_plate}


def lagged(x, y, v, plate):
    w = weights()
    with plate:
        scored(x @ w + torch.cat([torch.zeros(1), y[:-1]]), y)


def centred(x, y, v, plate):
    w = weights()
    with plate:
        scored((x - x.mean(0)) @ w, y)


def standardised_in_a_module(x, y, v, plate):
    w = weights()
    with plate:
        scored(nn.functional.batch_norm(x, None, None, training=True) @ w, y)


def contrasted(x, y, v, plate):
    w = weights()
    with plate:
        pyro.factor("fit", torch.log_softmax((x * w) @ x.T, -1).diagonal())


def gaussian_process(x, y, v, plate):
    covariance = (x * weights().exp()) @ x.T + torch.eye(len(x))
    with poutine.scale(scale=1.0), plate:
        pass
    pyro.sample("obs", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def by_place(x, y, v, plate):
    w = weights()
    with plate:
        scored(torch.linspace(-1, 1, len(x)) * (x @ w), y)


def centred_where_the_batch_leans(x, y, v, plate):
    w = weights()
    with plate:
        scored((x - x.mean(0) if x.mean() > 0 else x) @ w, y)


def mean_over_rows(x, y, v, plate):
    w = weights()
    with plate:
        pyro.factor("fit", dist.Normal(x @ w, 1.0).log_prob(y) / len(x))


def number_in_a_factor(x, y, v, plate):
    w = weights()
    with plate:
        pyro.factor("fit", N / len(x) * dist.Normal(x @ w, 1.0).log_prob(y))


def noise_by_number(x, y, v, plate):
    w = weights()
    with plate:
        scored(x @ w, y, len(x) ** 0.5)


def prior_by_number(x, y, v, plate):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), len(x) ** -0.5).to_event(1))
    with plate:
        scored(x @ w, y)


def prior_by_rows(x, y, v, plate):
    w = pyro.sample("w", dist.Normal(x.mean(0), 1.0).to_event(1))
    with plate:
        scored(x @ w, y)


def prior_in_a_scale(x, y, v, plate):
    with poutine.scale(scale=N / len(x)):
        w = weights()
    with plate:
        scored(x @ w, y)


def penalty_by_number(x, y, v, plate):
    w = weights()
    pyro.factor("penalty", -len(x) * w.square().sum())
    with plate:
        scored(x @ w, y)


NOT_BY_ROW = [lagged, centred, standardised_in_a_module, contrasted, by_place, centred_where_the_batch_leans]
BY_NUMBER = [mean_over_rows, number_in_a_factor, noise_by_number]
CHANGING = [prior_by_number, prior_by_rows, prior_in_a_scale, penalty_by_number]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("body", [*NOT_BY_ROW, *BY_NUMBER, *CHANGING], ids=lambda body: body.__name__)
def test_what_is_not_a_sum_over_rows_is_refused(body, style):
    model, args, settings = STYLES[style](body)
    site = "w|penalty" if body in CHANGING else "obs|fit"
    with pytest.raises(ModelError, match=f"'({site})'"):
        build_potential(model, args, {}, **settings)


@pytest.mark.parametrize("style", ["batch_size", "reader", "loader"])
def test_a_gaussian_process_is_refused_in_batches(style):
    model, args, settings = STYLES[style](gaussian_process)
    with pytest.raises(ModelError, match="'obs' is not a sum over rows"):
        build_potential(model, args, {}, **settings)


@pytest.mark.parametrize("body", [*NOT_BY_ROW, *BY_NUMBER, *CHANGING, gaussian_process], ids=lambda body: body.__name__)
def test_with_the_full_batch_they_run(body):
    model, args, settings = by_full_batch(body)
    potential, start = build_potential(model, args, {}, **settings)
    trace = poutine.trace(poutine.condition(model, start)).get_trace(*args)
    torch.testing.assert_close(potential.value(potential.layout.unconstrain(start), ()), -trace.log_prob_sum())


def plain(x, y, v, plate):
    w = weights()
    with plate:
        scored(x @ w, y)


def weighted(x, y, v, plate):
    w = weights()
    with plate, poutine.scale(scale=v):
        scored(x @ w, y)


def masked(x, y, v, plate):
    w = weights()
    with plate, poutine.mask(mask=v > 1):
        scored(x @ w, y)


def in_another_order(x, y, v, plate):
    w = weights()
    order = y.argsort()
    with plate:
        scored(x[order] @ w, y[order])


def zero_inflated(x, y, v, plate):
    w = weights()
    with plate:
        pyro.sample("obs", dist.ZeroInflatedPoisson((0.3 * x @ w).exp(), gate=torch.tensor(0.3)), obs=y.abs().floor())


def mixture_by_mask(x, y, v, plate):
    w = weights()
    with plate:
        fn = dist.MaskedMixture(y > 0, dist.Normal(x @ w, 1.0), dist.Normal(x @ w, 2.0))
        pyro.sample("obs", fn, obs=y)


def overdispersed(x, y, v, plate):
    w = weights()
    with plate:
        fn = dist.LogNormalNegativeBinomial(torch.tensor(3.0), 0.3 * x @ w, torch.tensor(0.5))
        pyro.sample("obs", fn, obs=y.abs().floor())


def several_outputs(x, y, v, plate):
    w = weights()
    with plate:
        pyro.sample("obs", dist.Normal(x * w, 1.0).to_event(1), obs=torch.stack([y, v, y], -1))


def hidden(size):
    def body(x, y, v, plate):
        w = weights()
        with pyro.plate("hidden", size):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with plate:
            scored(x @ w + b.sum(), y)

    body.__name__ = f"hidden_plate_of_{size}"
    return body


def grouped(size):
    def body(x, y, v, plate):
        w = weights()
        with pyro.plate("groups", size):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with plate:
            scored(x @ w + b[(10 * v).long() % size], y)

    body.__name__ = f"groups_of_{size}"
    return body


SUMS = [plain, weighted, masked, in_another_order, zero_inflated, mixture_by_mask, overdispersed, several_outputs]
SUMS += [build(size) for build in (hidden, grouped) for size in (B // 2, B, B + 1, N)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("body", SUMS, ids=lambda body: body.__name__)
def test_the_mean_gradient_of_an_epoch_is_that_of_the_full_data(body, style):
    model, args, settings = STYLES[style](body)
    potential, start = build_potential(model, args, {}, capture=False, **settings)
    full, _ = build_potential(given_rows(body), (X, Y, V), {}, capture=False)
    theta = potential.layout.unconstrain(start)
    batches = [(inputs, weight) for inputs, weight in potential.source.cover()]
    mean = sum(weight * potential.gradient(theta, inputs)[0] for inputs, weight in batches)
    torch.testing.assert_close(mean, full.gradient(theta, ())[0], rtol=1e-4, atol=1e-4)


def test_weights_that_count_the_rows_already_are_not_scaled_again():
    def body(x, y, v, plate):
        w = weights()
        with plate, poutine.scale(scale=v * N / len(x)):
            scored(x @ w, y)

    potential, start = build_potential(given_rows(body), (X, Y, V), {}, batch_size=B, capture=False)
    full, _ = build_potential(given_rows(weighted), (X, Y, V), {}, capture=False)
    theta = potential.layout.unconstrain(start)
    mean = sum(weight * potential.gradient(theta, inputs)[0] for inputs, weight in potential.source.cover())
    torch.testing.assert_close(mean, full.gradient(theta, ())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 3, N - 1, N])
def test_batches_of_any_size(batch_size):
    for body in (plain, weighted, hidden(batch_size)):
        build_potential(given_rows(body), (X, Y, V), {}, batch_size=batch_size, capture=False)
    with pytest.raises(ModelError, match=r"'obs'"):
        build_potential(given_rows(lagged), (X, Y, V), {}, batch_size=batch_size, capture=False)


def test_rows_that_are_all_masked_in_a_batch_do_not_hide_others():
    def body(x, y, v, plate):
        w = weights()
        with plate, poutine.mask(mask=v > 1):
            scored((x - x.mean(0)) @ w, y)

    order = V.argsort()  # the first batch holds masked rows alone
    loader = DataLoader(TensorDataset(X[order], Y[order], V[order]), batch_size=B)
    with pytest.raises(ModelError, match="not a sum over rows"):
        build_potential(given_rows(body), (loader,), {})


def test_a_scale_of_n_over_b_around_the_whole_model_is_refused():
    def model(x, y, v):
        with poutine.scale(scale=N / B):
            plain(x, y, v, pyro.plate("data", len(x)))

    with pytest.raises(ModelError, match="latent site 'w' is scaled by 4"):
        build_potential(model, by_loader(plain)[1], {})


def test_a_loop_over_rows_is_refused_in_batches_and_runs_with_all_of_them():
    def model(x, y):
        w = weights()
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"obs_{i}", dist.Normal(x[i] @ w, 1.0), obs=y[i])

    build_potential(model, (X, Y), {}, capture=False)
    with pytest.raises(ModelError, match="'obs_"):
        build_potential(model, (X, Y), {}, batch_size=B, capture=False)


def test_two_plates_that_subsample_are_probed_one_at_a_time():
    table = torch.randn(N, 10, generator=torch.Generator().manual_seed(2))

    def model(table, fault=0.0):
        plates = pyro.plate("i", N, subsample_size=B, dim=-2), pyro.plate("j", 10, subsample_size=4, dim=-1)
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with plates[0] as i, plates[1] as j:
            part = table[i][:, j]
            pyro.sample("obs", dist.Normal(u + fault * part.mean(0, keepdim=True), 1.0), obs=part)

    build_potential(model, (table,), {}, capture=False)
    with pytest.raises(ModelError, match="'obs' is not a sum over rows"):
        build_potential(model, (table,), {"fault": torch.tensor(1.0)}, capture=False)


def test_a_point_at_which_the_model_fails_is_left_out():
    def model(x, y):
        w = weights()
        with pyro.plate("data", len(x)):
            scored(x @ w, y, 2.0 - w.abs().max())

    source = RowSubsample((X, Y), {}, B)
    source.start(torch.Generator().manual_seed(0))
    (rows,) = source.probe_rows(source.draw())
    probe = Probe(model, N, rows, [{"w": torch.ones(3)}, {"w": 3 * torch.ones(3)}])
    assert len(probe.runs) == 1
    with pytest.raises(DataError, match="to satisfy the constraint"):
        _ = Probe(model, N, rows, [{"w": 3 * torch.ones(3)}]).runs


def rarely_observed(x, y, v, plate):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    w = weights()
    rare = v > 1.4
    with plate:
        with poutine.mask(mask=~rare):
            scored(x @ w, y)
        if rare.any():
            with poutine.mask(mask=rare):
                pyro.sample("rare", dist.Normal(a, 1.0).expand([len(x)]), obs=y)


def test_a_site_that_only_some_batches_observe_is_refused():
    order = V.argsort()
    with pytest.raises(ModelError, match="'rare'"):
        build_potential(given_rows(rarely_observed), (X[order], Y[order], V[order]), {}, batch_size=B)


def test_a_site_that_the_checks_have_not_met_ends_the_run():
    seen = V.clamp(max=1.0)
    data = (X.clone(), Y.clone(), seen)
    potential, start = build_potential(given_rows(rarely_observed), data, {}, batch_size=B, capture=False)
    theta = potential.layout.unconstrain(start)
    potential.gradient(theta, potential.source.draw())
    seen.fill_(1.5)  # as rows that come later
    with pytest.raises(ModelError, match="'rare' appears in some batches only"):
        potential.gradient(theta, potential.source.draw())


def counted_in_the_batch(x, y, g):
    w = weights()
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        scored(x @ w + a[torch.unique(g, return_inverse=True)[1]], y)


@pytest.mark.parametrize("rare", [[7], [7, 150]])
def test_groups_by_their_rank_in_the_batch_are_refused(rare):
    groups = torch.zeros(200, dtype=torch.long)
    groups[rare] = torch.arange(1, 1 + len(rare))
    data = torch.randn(200, 3, generator=_GENERATOR), torch.randn(200, generator=_GENERATOR), groups
    with pytest.raises(ModelError, match=r"torch.unique finds in a batch"):
        build_potential(counted_in_the_batch, data, {}, batch_size=B)
    loader = DataLoader(TensorDataset(*(t[groups.argsort()] for t in data)), batch_size=B)
    with pytest.raises(ModelError, match=r"torch.unique finds in a batch"):
        build_potential(counted_in_the_batch, (loader,), {})
    in_memory = build_potential(lambda x, y, g: counted_in_the_batch(x, y, torch.arange(3)[g]), data, {})
    assert in_memory[0].source.is_full


def test_values_of_the_batch_that_are_computed_once_are_taken():
    def model(x, y, g):
        w = weights()
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        values, places = g.unique(return_inverse=True)
        with pyro.plate("data", len(x)):
            scored(x @ w + a[values].exp()[places], y)

    assert build_potential(model, (X, Y, torch.arange(N) % 3), {}, batch_size=B)[0].num_data == N


def test_labels_of_the_batch_show_in_batches_of_one_label():
    def model(x, y, g):
        w = weights()
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            scored(x @ w + a * (g == g.max()), y)

    groups = torch.zeros(200)
    groups[150] = 1.0
    data = torch.randn(200, 3, generator=_GENERATOR), torch.randn(200, generator=_GENERATOR), groups
    with pytest.raises(ModelError, match="not a sum over rows"):
        build_potential(model, data, {}, batch_size=B)


def test_a_factor_of_what_sorted_batches_have_in_common_is_refused():
    def model(x, g, reads_data=True):
        w = weights()
        pyro.factor("fit", -((w.sum() - (g.float().mean() if reads_data else 1.0)) ** 2))
        with pyro.plate("data", len(x)):
            scored(x @ w, x[:, 0])

    loader = DataLoader(TensorDataset(torch.randn(200, 3), torch.arange(200) // 50), batch_size=5)
    with pytest.raises(ModelError, match="'fit' depends on data that are the same in the first batches"):
        build_potential(model, (loader,), {})
    potential, _ = build_potential(model, (loader,), {"reads_data": False})
    assert potential._structure.scaled == {"obs": False}


def test_a_lean_of_parameters_that_means_do_not_show_is_refused():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 0.01))
        sizes = (x.square().sum(-1, keepdim=True) - 1 + w).expand(-1, 3)
        sizes = 2 * sizes if sizes.mean() > 0 else sizes
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Dirichlet(torch.nn.functional.softplus(sizes)), obs=y)

    # All rows have the same sum and the same mean; the outputs of one have another sign.
    x = torch.where(torch.arange(60) == 41, 2.0, 0.1).unsqueeze(1) * torch.tensor([1.0, -1.0])
    with pytest.raises(ModelError, match="'obs' is not a sum over rows"):
        build_potential(model, (x, torch.full((60, 3), 1 / 3)), {}, batch_size=3)


@pytest.mark.parametrize("likelihood", ["a sample site", "a factor"])
@pytest.mark.parametrize("style", ["batch_size", "plate"])
def test_what_depends_on_the_side_to_which_outputs_lean_is_refused(style, likelihood):
    def doubled(x, y, v, plate):
        mean = x @ weights()
        mean = 2 * mean if mean.mean() > 0 else mean
        with plate:
            if likelihood == "a factor":
                pyro.factor("obs", dist.Poisson((0.3 * mean).exp()).log_prob(v))
            else:
                scored(mean, y)

    # Batches of several rows lean the same way, unless they hold both rows that lean the other way.
    x = 1.0 + 0.1 * torch.rand(60, 1, generator=_GENERATOR).expand(60, 3)
    x[[1, 29]] = -1.3
    rows = x, torch.randn(60, generator=_GENERATOR), torch.poisson(torch.full((60,), 3.0), generator=_GENERATOR)
    model, _, settings = STYLES[style](doubled)
    with pytest.raises(ModelError, match="'obs' is not a sum over rows"):
        build_potential(model, rows, {}, **settings)


def test_labels_that_are_true_or_false_show_in_batches_of_one_label():
    def model(x, y, g):
        w = weights()
        with pyro.plate("data", len(x)):
            scored(x @ w * (1.0 + g.any()), y)

    g = torch.zeros(200, dtype=torch.bool)
    g[150] = True
    with pytest.raises(ModelError, match="not a sum over rows"):
        build_potential(model, (torch.randn(200, 3), torch.randn(200), g), {}, batch_size=B)


def normalised_weights(x, y, v, plate):
    w = weights()
    with plate, pyro.poutine.scale(scale=v / v.mean()):
        scored(x @ w, y)


def missing_at_first(x, y, v, plate):
    w = weights()
    with plate, pyro.poutine.mask(mask=v > 0.9):
        scored(x @ w, y, len(x) ** 0.5)


ONE_ROW = {
    "leaning": (centred_where_the_batch_leans, 30, lambda rows: (rows, {"batch_size": 1})),
    "two data": (normalised_weights, 2, lambda rows: ((DataLoader(TensorDataset(*rows), batch_size=1),), {})),
    "masked": (
        missing_at_first,
        4,
        lambda rows: ((list(DataLoader(TensorDataset(*rows), batch_size=1)),), {"num_data": 4}),
    ),
}


@pytest.mark.parametrize("case", ONE_ROW)
def test_in_batches_of_one_row_others_are_joined_to_it(case):
    body, count, given = ONE_ROW[case]
    x = torch.full((count, 3), -0.5) + 0.1 * torch.randn(count, 3, generator=_GENERATOR)
    x[-1] += 2.0
    v = torch.full((count,), 0.5)
    v[-1] = 1.0
    args, settings = given((x, torch.randn(count, generator=_GENERATOR), v))
    with pytest.raises(ModelError, match=r"'obs'.* changes with the number of rows"):
        build_potential(given_rows(body), args, {}, **settings)


def test_a_penalty_by_number_shows_in_a_plate_that_takes_all_rows_but_one():
    def model(x, y):
        w = weights()
        with pyro.plate("data", len(x), subsample_size=len(x) - 1) as rows:
            scored(x[rows] @ w, y[rows])
        pyro.factor("penalty", -w.square().sum() * len(rows))

    with pytest.raises(ModelError, match="'penalty' depends on the number of rows"):
        build_potential(model, (X, Y), {})


def test_data_that_seldom_differ_are_taken_from_a_plate():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=1) as rows:
            scored(mean, y[rows])

    y = torch.zeros(12)
    y[5] = 1.0
    assert build_potential(model, (y,), {})[0].num_data == 12
    assert build_potential(model, (torch.tensor([0.0, 1.0]),), {})[0].num_data == 2
