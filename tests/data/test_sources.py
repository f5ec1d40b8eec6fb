# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which source the arguments of a run give, and what each source says about itself."""

import numpy as np
import pytest
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.data.loader import LoaderBatches
from pyro_apd.data.minibatch import FullBatch, PlateSubsample, RowSubsample, joined
from pyro_apd.data.row_reader import RowReader
from pyro_apd.data.sources import check_full_batches, model_device, open_source, shown_arguments
from pyro_apd.errors import DataError

X, Y = torch.arange(60.0).reshape(20, 3), torch.arange(20.0)


def opened(*args, kwargs=None, **settings):
    return open_source(args, kwargs or {}, generator=torch.Generator().manual_seed(0), **settings)


def loader(batch_size=6):
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size)


@pytest.mark.parametrize(
    ("args", "settings", "kind", "epoch_length"),
    [
        ((X, Y), {}, FullBatch, 1),
        ((X, Y), {"batch_size": 6}, RowSubsample, 3),
        ((X, Y), {"batch_size": 20}, RowSubsample, 1),
        ((X, Y), {"batch_size": 6, "replacement": True}, RowSubsample, None),
        ((X.numpy(), Y), {"batch_size": 6}, RowReader, 3),
        ((X.numpy(), Y), {"batch_size": 6, "replacement": True}, RowReader, None),
        ((loader(),), {}, LoaderBatches, None),
        (([(X, Y)],), {"num_data": 20}, LoaderBatches, None),
    ],
)
def test_arguments_choose_the_source(args, settings, kind, epoch_length):
    source, inputs = opened(*args, **settings)
    assert type(source) is kind
    assert source.epoch_length == epoch_length
    assert source.num_data == 20
    assert source.is_full == (kind is FullBatch)
    assert not source.plates
    x, y = source.bind(inputs).args
    assert torch.equal(x[:, 0], 3 * y)


@pytest.mark.parametrize(
    ("plates", "replacement", "epoch_length"),
    [({"a": (20, 6)}, False, 3), ({"a": (20, 6)}, True, None), ({"a": (20, 6), "b": (8, 4)}, False, None)],
)
def test_epochs_of_plates(plates, replacement, epoch_length):
    source = PlateSubsample((X,), {}, plates, replacement)
    assert source.epoch_length == epoch_length
    assert (source.plates, source.num_data, source.is_full) == (plates, 20, False)


def rows_of(call):
    return (call.args[0][:, 0] / 3).tolist()


def probed(source):
    source.start(torch.Generator().manual_seed(0))
    inputs = source.draw()
    return source.probe_rows(inputs), inputs


def test_rows_in_memory_are_all_there_to_be_probed():
    (rows,), _ = probed(RowSubsample((X, Y), {}, 6))
    assert (rows.num_rows, rows.batch_size, rows.has_all, rows.plate) == (20, 6, True, None)
    assert rows.row_size == X.shape[1] + 1
    assert rows_of(rows.call(torch.tensor([19, 0, 0]))) == [19, 0, 0]


@pytest.mark.parametrize(
    "source", [RowReader((X.numpy(), Y), {}, 7), LoaderBatches(loader(7), {}, None)], ids=["reader", "loader"]
)
def test_of_rows_outside_memory_some_batches_are_probed(source):
    (rows,), inputs = probed(source)
    assert (rows.batch_size, rows.has_all) == (7, False)
    assert rows.num_rows > 20
    assert rows_of(rows.call(torch.arange(7))) == rows_of(source.bind(inputs))
    assert len(set(rows_of(rows.call(torch.arange(rows.num_rows))))) > 7


def test_of_an_iterator_the_first_batch_is_probed_alone():
    (rows,), _ = probed(LoaderBatches(iter(loader(7)), {}, 20))
    assert (rows.num_rows, rows.batch_size) == (7, 7)


def test_batches_of_other_shapes_are_not_joined():
    batches = [(torch.zeros(2, 3),), (torch.ones(2, 4),)]
    assert joined(batches) is batches[0]
    torch.testing.assert_close(joined([batches[0], (torch.ones(1, 3),)])[0][:, 0], torch.tensor([0.0, 0.0, 1.0]))


def test_full_batches_are_not_probed():
    assert probed(FullBatch((X,), {}))[0] == ()


def test_plates_are_probed_one_at_a_time():
    source = PlateSubsample((X,), {}, {"a": (20, 6), "b": (8, 4)})
    (a, b), inputs = probed(source)
    assert [(rows.plate, rows.num_rows, rows.batch_size) for rows in (a, b)] == [("a", 20, 6), ("b", 8, 4)]
    call = b.call(torch.tensor([7, 7]))
    assert call.indices["b"].tolist() == [7, 7]
    assert call.indices["a"] is inputs[0]


@pytest.mark.parametrize(
    ("args", "settings", "error", "words"),
    [
        ((loader(),), {"batch_size": 3}, ValueError, "batch_size=3 is for full tensors.*Leave batch_size out"),
        ((loader(),), {"replacement": True}, ValueError, "sampler=RandomSampler"),
        ((X, Y), {"batch_size": 21}, ValueError, "batch_size=21 is more than the 20 rows"),
        ((X, Y.to("meta")), {}, DataError, "#0 on cpu, #1 on meta"),
        ((X.numpy(), torch.ones(3, device="meta")), {"batch_size": 4}, DataError, "#0 on cpu, #1 on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args, settings, error, words):
    with pytest.raises(error, match=words):
        opened(*args, **settings)


def test_full_batches_are_checked(caplog):
    with pytest.raises(ValueError, match="replacement=True is about mini-batches"):
        check_full_batches(10, True)
    check_full_batches(4999, False)
    check_full_batches(None, False)
    assert not caplog.records
    check_full_batches(5000, False)
    assert "Every step uses all 5000 rows" in caplog.text


def test_batches_go_to_the_model_where_it_is_not_on_the_cpu():
    net = nn.Linear(3, 2)
    assert model_device(net, {}) is None
    wrapped = InitMessenger(init_to_sample)(net.to("meta"))
    assert model_device(wrapped, {}) == torch.device("meta")
    assert model_device(lambda x: x, {"w": X.to("meta")}) == torch.device("meta")
    assert np.array_equal(opened(X.numpy(), batch_size=4, device=torch.device("cpu"))[1][0].shape, (4, 3))


def test_shown_arguments():
    args, kwargs, has_all = shown_arguments((X.numpy(), 3), {"y": Y})
    assert torch.equal(args[0], X)
    assert args[1] == 3
    assert torch.equal(kwargs["y"], Y)
    assert has_all
    args, _, has_all = shown_arguments((np.arange(10_000),), {})
    assert torch.equal(args[0], torch.arange(2000) * 5)
    assert not has_all
    args, kwargs, has_all = shown_arguments((X, Y), {"flag": True})
    assert args[0] is X
    assert (kwargs, has_all) == ({"flag": True}, True)


def test_of_a_loader_the_first_batch_is_shown():
    before = torch.get_rng_state()
    args, kwargs, has_all = shown_arguments((loader(4),), {"flag": True})
    assert torch.equal(args[0], X[:4])
    assert torch.equal(args[1], Y[:4])
    assert (kwargs, has_all) == ({"flag": True}, False)
    assert torch.equal(torch.get_rng_state(), before)
    iterator = iter([(X, Y)])
    assert shown_arguments((iterator,), {}, 20) == ((iterator,), {}, False)
    assert next(iterator)[0] is X
