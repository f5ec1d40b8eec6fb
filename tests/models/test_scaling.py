# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Each way to write a mini-batch model: unbiased for the full data, or refused with the fix."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.building import build_potential
from tests.support.models import Conjugate

N = 60
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randn(N, generator=torch.Generator().manual_seed(2))


def loader(batch_size=20, shuffle=True):
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size, shuffle=shuffle)


def observe(mean, y):
    pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def weights():
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def plain(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        observe(x @ w, y)


def indexed(x, y):
    w = weights()
    with pyro.plate("data", N, subsample_size=20) as rows:
        observe(x[rows] @ w, y[rows])


def stating_size(size):
    def model(x, y):
        w = weights()
        with pyro.plate("data", size, subsample_size=len(x)):
            observe(x @ w, y)

    return model


def scaled_by_hand(scale):
    def model(x, y):
        w = weights()
        with pyro.poutine.scale(scale=scale), pyro.plate("data", len(x)):
            observe(x @ w, y)

    return model


def scaled_twice(x, y):
    w = weights()
    with pyro.poutine.scale(scale=N / len(x)), pyro.plate("data", N, subsample_size=len(x)):
        observe(x @ w, y)


def indexed_and_scaled(x, y):
    with pyro.poutine.scale(scale=N / 20):
        indexed(x, y)


def to_event(x, y):
    pyro.sample("obs", dist.Normal(x @ weights(), 1.0).to_event(1), obs=y)


def with_pseudo_observation(x, y):
    w = weights()
    pyro.sample("pinned", dist.Normal(w[0], 1.0), obs=torch.tensor(0.3))
    pyro.deterministic("total", w.sum())
    with pyro.plate("data", len(x)):
        observe(x @ w, y)


def factored(x, y):
    w = weights()
    pyro.factor("fit", -(x @ w - y).square().sum())


def constant_plate(x, y):
    w = weights()
    with pyro.plate("data", N):
        observe(x @ w, y)


def local_latent(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(x @ w + z, y)


def local_latent_in_subsample(x, y):
    w = weights()
    with pyro.plate("data", N, subsample_size=20) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(x[rows] @ w + z, y[rows])


def outside_its_plate(x, y):
    w = weights()
    with pyro.plate("data", N, subsample_size=20) as rows:
        pass
    pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0).to_event(1), obs=y[rows])


def discrete(x, y):
    z = pyro.sample("z", dist.Bernoulli(0.5))
    observe(x[:, 0] * z, y)


UNBIASED = {
    "full batch": (plain, {}, (X, Y), 1.0),
    "(i) plate indices": (indexed, {}, (X, Y), 1.0),
    "(ii) plate of the rows": (plain, {"batch_size": 20}, (X, Y), 1.0),
    "(ii) batches that do not divide N": (plain, {"batch_size": 7}, (X, Y), 1.0),
    "(ii) one row": (plain, {"batch_size": 1}, (X, Y), 1.0),
    "(ii) all rows": (plain, {"batch_size": N}, (X, Y), 1.0),
    "(ii) no plate": (to_event, {"batch_size": 20}, (X, Y), 1.0),
    "(ii) plate states N": (stating_size(N), {"batch_size": 20}, (X, Y), 1.0),
    "(ii) tempered by hand": (scaled_by_hand(0.5), {"batch_size": 20}, (X, Y), 0.5),
    "(iii) loader": (plain, {}, (loader(),), 1.0),
    "(iii) ragged, in order": (plain, {}, (loader(16, shuffle=False),), 1.0),
    "(iii) plate states N": (stating_size(N), {}, (loader(),), 1.0),
    "(iii) plate states N, ragged": (stating_size(N), {}, (loader(16, shuffle=False),), 1.0),
    "(iii) N/B by hand": (scaled_by_hand(3.0), {}, (loader(),), 1.0),
    "(iii) list with num_data": (plain, {"num_data": N}, ([(X[:30], Y[:30]), (X[30:], Y[30:])],), 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UNBIASED)
def test_gradient_over_many_batches_is_that_of_the_full_potential(case):
    model, settings, args, weight = UNBIASED[case]
    potential, _ = build_potential(model, args, {}, **settings)
    theta = torch.tensor([0.3, -0.7, 1.1])
    gradients = torch.stack([potential.traced_gradient(theta, potential.source.draw())[0] for _ in range(420)])
    expected = weight * X.T @ (X @ theta - Y) + theta
    # Without replacement an epoch is exact; where B does not divide N, the mean has a standard error.
    error = gradients.std(0) / 420**0.5 if settings.get("batch_size") == 7 else torch.zeros(3)
    assert ((gradients.mean(0) - expected).abs() <= 4 * error + 1e-4 * expected.norm()).all()


def test_what_is_not_about_the_rows_counts_once():
    potential, _ = build_potential(with_pseudo_observation, (X, Y), {}, batch_size=20)
    theta = torch.tensor([0.3, -0.7, 1.1])
    gradient = torch.stack([potential.traced_gradient(theta, potential.source.draw())[0] for _ in range(3)]).mean(0)
    expected = X.T @ (X @ theta - Y) + theta + torch.tensor([0.3 - 0.3, 0.0, 0.0])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "factor in batches": (factored, {"batch_size": 20}, (X, Y), "cannot be scaled by N/B"),
    "factor from a loader": (factored, {}, (loader(),), "cannot be scaled by N/B"),
    "constant plate in batches": (constant_plate, {"batch_size": 20}, (X, Y), r"pyro\.plate\('data', len\(x\)\)"),
    "constant plate from a loader": (constant_plate, {}, (loader(),), r"pyro\.plate\('data', len\(x\)\)"),
    "local latent in batches": (local_latent, {"batch_size": 20}, (X, Y), "'z' lies inside the subsampled plate"),
    "local latent from a loader": (local_latent, {}, (loader(),), "'z' lies inside the subsampled plate"),
    "local latent in a subsample": (local_latent_in_subsample, {}, (X, Y), "'z' lies inside the subsampled plate"),
    "plate states another N": (stating_size(100), {}, (loader(),), "20 of 100 rows"),
    "batch fed as if it were the data": (stating_size(N), {}, (X[:20], Y[:20]), "would see the same rows"),
    "N/B by plate and by hand": (scaled_twice, {"batch_size": 20}, (X, Y), "counts twice"),
    "N/B by plate and by hand, loader": (scaled_twice, {}, (loader(),), "counts twice"),
    "N/B by kernel and by hand": (scaled_by_hand(3.0), {"batch_size": 20}, (X, Y), "counts twice"),
    "N/B twice in a subsampling model": (indexed_and_scaled, {}, (X, Y), "which is N/B"),
    "unexplained scale": (scaled_by_hand(2.0), {}, (loader(),), "neither 1 nor N/B"),
    "observed outside its plate": (outside_its_plate, {}, (X, Y), "lies outside it"),
    "subsampling model fed batches": (indexed, {"batch_size": 30}, (X, Y), "without batch_size="),
    "discrete latent": (discrete, {}, (X, Y), "'z' is a discrete latent"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unclear_scaling_is_refused_with_the_fix(case):
    model, settings, args, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        build_potential(model, args, {}, **settings)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X * float("nan"), Y), "#0 .* NaN or infinite"),
        ((X, Y / 0.0), "#1 .* NaN or infinite"),
        ((DataLoader(TensorDataset(X, Y / 0.0), batch_size=20),), "NaN or infinite"),
    ],
)
def test_nan_in_the_data(args, message):
    with pytest.raises(DataError, match=message):
        build_potential(plain, args, {})


def test_the_three_styles_agree_with_the_full_potential_at_one_point():
    problem = Conjugate()
    theta = torch.tensor([0.1, 0.2, -0.3])
    data = (problem.x, problem.y)
    full, _ = build_potential(problem.full, data, {})
    expected = full.value(theta, ())
    batches = DataLoader(TensorDataset(*data), batch_size=50, shuffle=True)
    for model, args, settings in (
        (problem.subsampling, data, {}),
        (problem.full, data, {"batch_size": 50}),
        (problem.without_plate, data, {"batch_size": 50}),
        (problem.full, (batches,), {}),
        (problem.stating_size, (batches,), {}),
    ):
        potential, _ = build_potential(model, args, {}, **settings)
        mean = torch.stack([potential.value(theta, potential.source.draw()) for _ in range(4)]).mean()
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-3)


def test_a_scale_written_once_for_each_row_is_a_scale():
    def model(x, y, factor=N / 20, size=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), size and 20) as rows:
            x, y = (x[rows], y[rows]) if size else (x, y)
            with poutine.scale(scale=torch.full((len(x),), factor)):
                pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"'obs' is scaled by .*counts twice"):
        build_potential(model, (X, Y), {}, batch_size=20)
    with pytest.raises(ModelError, match=r"'obs' is scaled by .*counts twice"):
        build_potential(model, (X, Y), {"size": N})
    assert build_potential(model, (loader(),), {})[0]._structure.scaled == {"obs": True}
    for factor in (1.0, 2.0):
        assert build_potential(model, (X, Y), {"factor": factor}, batch_size=20)[0]._structure.scaled == {"obs": False}


def test_a_model_for_one_number_of_rows_is_refused():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)), poutine.scale(scale=torch.full((20,), N / 20)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"takes batches of 20 rows and fails on one row more.*len\(x\)"):
        build_potential(model, (X, Y), {}, batch_size=20)


def test_n_over_b_of_one_of_two_plates_by_hand_is_refused():
    def model(y, factor):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        rows, outputs = pyro.plate("data", 10, 2, dim=-2), pyro.plate("outputs", 3, 2, dim=-1)
        with rows as i, outputs as j, poutine.scale(scale=factor):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y[i][:, j])

    y = torch.linspace(-1.0, 1.0, 30).reshape(10, 3)
    build_potential(model, (y, 0.7), {})
    for factor in (10 / 2, 3 / 2, 10 / 2 * 3 / 2):
        with pytest.raises(ModelError, match=r"'obs' is scaled by .*counts twice"):
            build_potential(model, (y, factor), {})
