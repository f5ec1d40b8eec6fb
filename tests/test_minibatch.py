# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.errors import DataError
from pyro_apd.index_stream import IndexStream
from pyro_apd.minibatch import (
    Call,
    LoaderBatches,
    RowSubsample,
    check_finite,
    is_loader,
    model_arguments,
)

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def started(source, seed=0):
    source.start(torch.Generator().manual_seed(seed))
    return source


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_epoch_shows_each_row_at_most_once(num_data, batch_size, seed):
    batch_size = min(batch_size, num_data)
    stream = IndexStream(num_data, batch_size, torch.Generator().manual_seed(seed))
    for _ in range(2):
        rows = torch.cat([next(stream) for _ in range(num_data // batch_size)])
        assert len(rows.unique()) == len(rows)
        assert int(rows.min()) >= 0
        assert int(rows.max()) < num_data


def test_rows_are_drawn_uniformly_also_where_batches_do_not_divide_the_data():
    stream = IndexStream(7, 3, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.cat([next(stream) for _ in range(7000)]), minlength=7)
    assert (counts / counts.sum() - 1 / 7).abs().max() < 0.005


def test_row_subsample_slices_every_tensor_with_n_rows_and_only_those():
    prior = torch.ones(3)
    source = started(RowSubsample((X, {"nested": Y}, prior, "name"), {"w": Y.float()}, 4))
    (rows,) = source.draw()
    call = source.bind((rows,))
    assert torch.equal(call.args[0], X[rows])
    assert torch.equal(call.args[1]["nested"], Y[rows])
    assert call.args[2] is prior
    assert call.args[3] == "name"
    assert torch.equal(call.kwargs["w"], Y[rows].float())
    assert source.scale((rows,)) == 2.5


def test_row_subsample_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="batch_size=11 is more than the 10 rows"):
        RowSubsample((X, Y), {}, 11)
    with pytest.raises(ValueError, match="none of the arguments is a tensor"):
        RowSubsample((3,), {}, 2)
    with pytest.raises(ValueError, match="num_data=7"):
        RowSubsample((X, Y), {}, 2, num_data=7)


def test_loader_shuffles_by_seed_and_leaves_the_global_generator_alone():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        source = started(LoaderBatches(loader, {}, None), seed)
        runs.append(torch.cat([source.draw()[1] for _ in range(6)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_loader_scale_makes_the_mean_over_an_epoch_exact(batch_size):
    source = started(LoaderBatches(DataLoader(TensorDataset(X), batch_size=batch_size), {}, None))
    num_batches = -(-10 // batch_size)
    batches = [source.draw() for _ in range(num_batches)]
    estimate = torch.stack([source.scale(b) * b[0].sum(0) for b in batches]).mean(0)
    torch.testing.assert_close(estimate, X.sum(0))


def test_loader_that_drops_rows_scales_by_rows():
    loader = DataLoader(TensorDataset(X), batch_size=4, drop_last=True)
    source = started(LoaderBatches(loader, {}, None))
    assert source.scale(source.draw()) == 2.5


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"x": X, "y": Y}])
def test_batches_become_arguments_of_the_model(batch):
    source = started(LoaderBatches([batch], {"z": 1}, 10))
    call = source.bind(source.draw())
    given_x, given_y = (call.kwargs["x"], call.kwargs["y"]) if isinstance(batch, dict) else call.args
    assert torch.equal(given_x, X)
    assert torch.equal(given_y, Y)
    assert call.kwargs["z"] == 1


def test_loader_errors():
    with pytest.raises(ValueError, match="num_data=N"):
        LoaderBatches([X], {}, None)
    source = started(LoaderBatches(iter([(X,)]), {}, 10))
    source.draw()
    with pytest.raises(DataError, match="exhausted"):
        source.draw()
    with pytest.raises(DataError, match="must consist of tensors"):
        started(LoaderBatches([(X, "label")], {}, 10)).draw()


def test_what_counts_as_a_loader():
    loader = DataLoader(TensorDataset(X), batch_size=4)
    assert is_loader((loader,), None)
    assert is_loader((iter(loader),), None)
    assert is_loader(([(X,)],), 10)
    assert not is_loader(([(X,)],), None)  # a model may take a list
    assert not is_loader((X,), 10)
    assert not is_loader((loader, X), None)


def test_model_arguments_of_a_loader_are_its_first_batch():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    before = torch.get_rng_state()
    args, kwargs = model_arguments((loader,), {"flag": True})
    assert torch.equal(args[0], X[:4])
    assert torch.equal(args[1], Y[:4])
    assert kwargs == {"flag": True}
    assert torch.equal(torch.get_rng_state(), before)
    assert model_arguments((X, Y), {})[0][0] is X


def test_nan_is_named():
    check_finite(Call((X, Y), {"z": None}))
    with pytest.raises(DataError, match=r"#1 .* 2 NaN or infinite"):
        check_finite(Call((X, torch.tensor([1.0, float("nan"), float("inf")])), {}))
    with pytest.raises(DataError, match="'y'"):
        check_finite(Call((X,), {"y": torch.tensor(float("nan"))}))
