# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a new user meets first: each mistake is named, and the message says what to do."""

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.infer import MCMC
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

import pyro_apd as apd
from pyro_apd.data.arguments import (
    check_kinds,
    check_one_device,
    drawn_latents,
    explaining_errors,
    named_tensors,
    not_finite,
    with_tensors,
)
from pyro_apd.errors import DataError, DivergenceError, ModelError
from pyro_apd.models.building import build_potential
from tests.support.models import Classifier

X, Y = torch.randn(40, 4), torch.arange(40) % 3


def run(model, *args, step_size=1e-3, batch_size=10, num_samples=12):
    kernel = apd.SGLD(model, step_size, batch_size=batch_size, seed=0)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=1, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


def inside(x, y=None):
    """As many write it at first."""
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        pyro.sample("obs", dist.Categorical(logits=x @ w), obs=y)


def forgot_to_take_rows(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=10):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


def factored(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.factor("fit", dist.Bernoulli(logits=x @ w).log_prob(y))


MISTAKES = {
    "network inside the plate": (lambda: run(inside, X, Y), ModelError, "before"),
    "plate subsamples, rows not taken": (
        lambda: run(forgot_to_take_rows, X, X[:, 0], batch_size=None),
        ModelError,
        "subsample",
    ),
    "step size too large": (lambda: run(regression, X, X[:, 0], step_size=1e3), DivergenceError, "try step_size="),
    "labels as floats": (lambda: run(apd.BNN(nn.Linear(4, 3)), X, Y.float()), DataError, r"y\.long\(\)"),
    "labels from 1": (lambda: run(Classifier(), X, Y + 1), DataError, "row 5.* from 0 to 2.*y - 1"),
    "a column of labels": (lambda: run(Classifier(), X, Y[:, None]), DataError, r"y\.squeeze\(-1\)"),
    "a column of targets": (lambda: run(regression, X, X[:, :1]), DataError, r"y\.squeeze\(-1\)"),
    "labels as booleans in a factor": (lambda: run(factored, X, Y > 0), DataError, r"#1 torch\.bool.*y\.float\(\)"),
    "a label too few": (lambda: run(Classifier(), X, Y[:-1]), DataError, "as many rows as inputs"),
    "inputs in double precision": (lambda: run(Classifier(), X.double(), Y), DataError, r"x\.to\(torch\.float32\)"),
    "inputs as whole numbers": (lambda: run(Classifier(), X.long(), Y), DataError, r"x\.to\(torch\.float32\)"),
    "labels on another device": (lambda: run(Classifier(), X, Y.to("meta")), DataError, "#0 on cpu, #1 on meta"),
    "no labels": (lambda: run(Classifier(), X), ModelError, "was the target given"),
    "no targets": (lambda: run(regression, X), ModelError, "was the target given"),
    "a plain network": (lambda: run(nn.Linear(4, 3), X, Y), ModelError, r"apd\.BNN\(net\)"),
    "a class for a model": (lambda: run(Classifier, X, Y), ValueError, r"Classifier\(\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_says_what_to_do(mistake):
    make, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        make()


@pytest.mark.parametrize(
    ("rows", "settings", "is_said"), [(5000, {}, True), (5000, {"batch_size": 10}, False), (40, {}, False)]
)
def test_a_forgotten_batch_size_is_said(rows, settings, is_said, caplog):
    kernel = apd.SGLD(regression, 1e-6, **settings)
    kernel.begin((torch.randn(rows, 4), torch.randn(rows)), {}, warmup_steps=0)
    assert ("subsample_size=" in caplog.text) == is_said


def test_predictions_on_data_of_another_dtype():
    model = Classifier()
    draws = run(model, X, Y).get_samples()
    for predict in (
        lambda: apd.Predictive(model, draws)(X.double()),
        lambda: apd.outputs(model, draws, X.double()),
    ):
        with pytest.raises(DataError, match=r"argument #0 is torch.float64 .* x.to\(torch.float32\)"):
            predict()


def test_a_model_on_another_device_than_its_data():
    """Without a second device: torch's own words for it."""
    latents = {"w": torch.zeros(2, device="meta")}
    with (
        pytest.raises(DataError, match=r"argument #0 is on cpu and latent site 'w' on meta. Move the data"),
        explaining_errors((X,), {}, lambda: latents),
    ):
        raise RuntimeError("Expected all tensors to be on the same device")


def test_other_failures_are_left_as_they_are():
    with pytest.raises(TypeError, match="unsupported"), explaining_errors((X,), {}, dict):
        object() + 1
    with pytest.raises(TypeError, match="argument"), explaining_errors((X,), {}, lambda: {"w": X}):
        raise TypeError("bad argument, of something that the model calls")


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.last = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.layer(x[:, None])[0][:, -1])


class Convolution(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 2), nn.Flatten(), nn.Linear(3, 3))


@pytest.mark.parametrize("net", [Recurrent(nn.GRU), Recurrent(nn.LSTM), Convolution(), nn.Linear(4, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_data_of_another_dtype_are_named_whatever_the_layer(net, dtype):
    with pytest.raises(DataError, match=rf"#0 is {dtype} and latent site .*\.to\(torch\.float32\)"):
        run(apd.BNN(net), X.to(dtype), Y)


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (regression, (X[:, 0], X), r"#0 torch\.float32 \(10,\), #1 torch\.float32 \(10, 4\): check the order"),
        (apd.BNN(nn.Linear(4, 3)), (Y, X), r"#0 torch\.int64 \(10,\).*mcmc\.run\(x, y\)"),
        (Classifier(), (X[:, :2], Y), r"cannot be multiplied.*#0 torch\.float32 \(10, 2\)"),
        (
            apd.BNN(nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3))),
            (X[:, 0].abs(), Y),
            "Long, Int.*#0 torch.float32",
        ),
    ],
)
def test_arguments_of_the_wrong_order_or_shape_are_listed(model, args, words):
    with pytest.raises(DataError, match=words):
        run(model, *args)


def test_arrays_where_a_model_takes_tensors_are_named():
    with pytest.raises(DataError, match=r"#0 is a ndarray, #1 is a ndarray.*torch\.as_tensor"):
        run(regression, X.numpy(), Y.numpy(), batch_size=None)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((np.ma.masked_array(X.numpy(), mask=False), Y), r"#0 .*masked array.*x\.filled"),
        ((pandas.DataFrame(X.numpy()), Y), r"#0 .*DataFrame.*torch\.tensor\(x\.to_numpy\(dtype=\"float32\"\)\)"),
        ((X, pandas.Series(Y.numpy())), "#1 .*Series"),
        ((X.to_sparse(), Y), r"#0 .*sparse.*x\.to_dense\(\)"),
        ((X, {"rows": X.to_sparse()}), r"#1\['rows'\] .*sparse"),
        ((X[:0], Y[:0]), "#0 .*no rows"),
        ((X[:0].numpy(), Y[:0]), "#0 .*no rows"),
    ],
)
def test_kinds_of_data_that_models_do_not_take(args, words):
    with pytest.raises(DataError, match=words):
        check_kinds(args, {})
    with pytest.raises(DataError):
        check_kinds((), {str(i): arg for i, arg in enumerate(args)})


def test_lists_of_a_number_per_row_become_tensors():
    sizes, ragged, words = [50, 50], [[1], [2, 3]] * 20, ["a"] * 40
    given = (X, Y.tolist(), [0.5] * 40, ([True, False] * 20), [[1, 2]] * 40, sizes, ragged, words, [X[0]] * 40)
    args, kwargs = with_tensors(given, {"y": tuple(Y.tolist())})
    assert [arg.dtype for arg in args[1:5]] == [torch.int64, torch.float32, torch.bool, torch.int64]
    assert torch.equal(args[1], Y)
    assert args[4].shape == (40, 2)
    assert torch.equal(kwargs["y"], Y)
    assert all(one is other for one, other in zip(args[5:], given[5:], strict=True))
    assert with_tensors(([1, 2], 3), {}) == (([1, 2], 3), {})


def test_arguments_have_names():
    assert list(named_tensors((X, [Y]), {"mask": X})) == ["#0", "#1[0]", "'mask'"]
    check_one_device((X, torch.zeros((), device="meta")), {})  # a single number may lie anywhere


def test_what_a_failed_model_drew():
    tracer = pyro.poutine.trace(inside)
    with pytest.raises(RuntimeError):
        tracer.get_trace(X[:, :1], Y)
    assert list(drawn_latents(tracer.msngr.trace)) in (["w"], ["data", "w"])


def test_nan_is_named():
    assert not_finite((X, Y), {"z": None, "empty": torch.empty(0)}) is None
    error = not_finite((X, torch.tensor([1.0, float("nan"), float("inf")])), {})
    assert isinstance(error, DataError)
    assert "#1 of the model, shape (3,), holds 2 NaN or infinite" in str(error)
    assert "'y'" in str(not_finite((X,), {"y": torch.tensor(float("nan"))}))


class Items(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return X[i], Y[i]


def refused(*args, model=None, **settings):
    with pytest.raises((DataError, ValueError)) as error:
        build_potential(model or Classifier(), args, {}, **settings)
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.csv", "#0 is a str. Files are not read"),
        ([(X[:20], Y[:20]), (X[20:], Y[20:])], "#0 is a list. It looks like batches: give the kernel num_data=N"),
        (Items(), "#0 is a Items. Pass torch.utils.data.DataLoader(dataset"),
        ({"x": X, "y": Y}, "mcmc.run(**data)"),
        (scipy.sparse.csr_matrix(X.numpy()), "#0 of the model is sparse (csr_matrix)"),
    ],
)
def test_arguments_of_other_kinds_are_refused_by_name(argument, words):
    assert words in refused(argument)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: (x, y, torch.tensor(1.0)), "entry #2 is a tensor without rows"),
        (lambda x, y: (x.to_sparse(), y), "entry #0 is sparse (torch.sparse_coo)"),
        (lambda x, y: {"x": x.to_sparse_csr(), "y": y}, "entry 'x' is sparse (torch.sparse_csr)"),
        (lambda x, y: (torch.nested.nested_tensor(list(x), layout=torch.jagged), y), "entry #0 is nested"),
        (lambda x, y: (pack_sequence(list(x)), y), "PackedSequence"),
        (lambda x, y: pack_sequence(list(x)), "PackedSequence"),
        (lambda x, y: (x.T, y), "Is dimension 1 of #0 the rows? Then use batch_first=True"),
        (lambda x, y: (x, y, x[:3]), "different numbers of rows: #0 (10, 4), #1 (10,), #2 (3, 4)"),
        (lambda x, y: (), "got an empty one"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_batches_that_are_no_rows_are_refused_by_entry(make, words):
    assert words in refused(DataLoader(Items(), 10, collate_fn=lambda items: make(*default_collate(items))))


def test_a_stated_number_must_have_an_effect():
    assert "no argument has 80 rows; their shapes are [(40, 4), (40,)]" in refused(X, Y, num_data=80)
    for settings in ({}, {"subsample_size": 5}):

        def model(x, y, plate=settings):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 40, **plate) as rows:
                pyro.sample("obs", dist.Normal(w * x[rows, 0], 1.0), obs=y[rows].float())

        build_potential(model, (X, Y), {}, num_data=40)
        words = "plates, of sizes {'rows': 40}" if settings else "no argument has 50 rows"
        assert words in refused(X, Y, model=model, num_data=50)


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray], ids=["tensors", "arrays"])
def test_batches_as_long_as_their_list_stay_a_list(convert):
    batches = [[convert(np.ones((3, 2))), convert(np.zeros((3, 2)))] for _ in range(3)]
    assert with_tensors((batches,), {"table": torch.zeros(3)})[0] == (batches,)
    args, _ = with_tensors(([batch[0] for batch in batches],), {})
    assert isinstance(args[0], list)
