# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.chains.identity import arguments_digest
from pyro_apd.data.minibatch import RowSubsample
from pyro_apd.data.row_reader import RowReader, has_stored_rows, is_stored
from pyro_apd.errors import DataError
from pyro_apd.models.building import build_potential
from tests.support.models import Conjugate

X, Y = torch.arange(60.0).reshape(20, 3), torch.arange(20)


class Rows:
    """Gives rows for an array of indices, in order and each once, as HDF5 does."""

    def __init__(self, values, fails_at=None):
        self.values, self.asked, self.threads, self.fails_at = values, 0, set(), fails_at

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        self.asked += 1
        self.threads.add(threading.current_thread().name)
        if self.asked == self.fails_at:
            raise OSError("the disk is gone")
        assert isinstance(rows, np.ndarray)
        assert (np.diff(rows) > 0).all()
        return self.values[rows]


@pytest.fixture
def mapped(tmp_path):
    """X in a file: as numpy maps it, as torch does, and behind an object."""
    np.save(tmp_path / "x.npy", X.numpy())
    (tmp_path / "x.bin").write_bytes(X.numpy().tobytes())
    by_torch = torch.from_file(str(tmp_path / "x.bin"), size=60, dtype=torch.float32).reshape(20, 3)
    return {"numpy": np.load(tmp_path / "x.npy", mmap_mode="r"), "torch": by_torch.numpy(), "rows": Rows(X)}


def generators(num_chains):
    made = [torch.Generator().manual_seed(i) for i in range(num_chains or 1)]
    return made if num_chains else made[0]


def started(source, num_chains=None, ahead=0, at_once=1):
    source.prefetch, source.at_once = ahead // at_once, at_once
    source.start(generators(num_chains))
    return source


@pytest.mark.parametrize("kind", ["numpy", "torch", "rows"])
@pytest.mark.parametrize(("ahead", "at_once"), [(0, 1), (1, 1), (5, 1), (4, 2)])
@pytest.mark.parametrize("num_chains", [None, 3])
@pytest.mark.parametrize("replacement", [False, True])
def test_batches_are_those_of_tensors_in_memory(mapped, kind, ahead, at_once, num_chains, replacement):
    prior = torch.ones(3)
    reader = started(
        RowReader((mapped[kind], prior), {"y": Y, "flag": True}, 6, replacement=replacement), num_chains, ahead, at_once
    )
    memory = started(RowSubsample((X, prior), {"y": Y}, 6, replacement=replacement), num_chains)
    for _ in range(11):
        inputs = reader.draw()
        (rows,) = memory.draw()
        call = reader.bind(inputs)
        assert torch.equal(call.args[0], X[rows])
        assert torch.equal(call.kwargs["y"], Y[rows])
        assert call.args[1] is prior
        assert call.kwargs["flag"] is True
        if num_chains is None:
            assert reader.scale(inputs) == memory.scale((rows,)) == 20 / 6
    reader.close()


@pytest.mark.parametrize(("ahead", "at_once"), [(0, 1), (4, 1), (6, 3)])
@pytest.mark.parametrize("taken", [0, 2, 3, 7])
def test_a_source_goes_on_where_it_was_and_not_where_it_had_read_ahead_to(ahead, at_once, taken):
    source = started(RowReader((X.numpy(),), {}, 6), ahead=ahead, at_once=at_once)
    for _ in range(taken):
        source.draw()
    state = source.state_dict()
    expected = [source.draw()[0] for _ in range(8)]
    for resumed in (started(RowReader((X.numpy(),), {}, 6), ahead=ahead, at_once=at_once), source):
        resumed.load_state_dict(state)
        assert all(torch.equal(resumed.draw()[0], rows) for rows in expected)
        resumed.close()


def test_a_thread_reads_ahead_and_no_further():
    rows = Rows(X)
    source = started(RowReader((rows,), {}, 5), ahead=3)
    source.draw()
    source._worker.wait()
    assert rows.asked == 4
    assert threading.current_thread().name not in rows.threads
    source.close()


@pytest.mark.parametrize("ahead", [0, 3])
def test_errors_of_reading_keep_their_message(ahead):
    source = started(RowReader((Rows(X, fails_at=4),), {}, 5), ahead=ahead)
    for _ in range(3):
        source.draw()
    with pytest.raises(OSError, match="the disk is gone"):
        source.draw()
    source.close()


def test_rows_come_in_order_to_cover_the_data():
    source = started(RowReader((X.numpy(), Y), {}, 8))
    batches, weights = zip(*source.cover(), strict=True)
    assert torch.equal(torch.cat([x for x, _ in batches]), X)
    assert torch.equal(torch.cat([y for _, y in batches]), Y)
    assert weights == (0.4, 0.4, 0.2)


def test_what_is_stored(mapped):
    assert is_stored(X.numpy())
    assert is_stored(mapped["numpy"])
    assert is_stored(mapped["torch"])
    assert is_stored(mapped["rows"])
    for other in (X, np.float64(1.0), np.ones(()), torch.ones(()), "name", b"12", range(20), nn.Sequential(), 3, None):
        assert not is_stored(other)
    assert has_stored_rows(({"x": [X.numpy()]},), {})
    assert not has_stored_rows((X,), {"y": Y})


def test_numbers_of_other_kinds():
    big_endian = X.numpy().astype(">f8")
    source = started(RowReader((big_endian, np.arange(20, dtype=np.uint8)), {}, 20))
    x, y = source.draw()
    assert x.dtype == torch.float64
    assert y.dtype == torch.uint8
    assert torch.equal(x, X[y.long()].double())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array(["a"] * 20), r"#0 .* rows that cannot be made a tensor \(ndarray"),
        (Rows([None] * 20), "only integer scalar arrays"),
        (DataLoader(TensorDataset(X)).dataset, r"#0 .* cannot be made a tensor|gives shape"),
    ],
)
def test_rows_that_are_no_rows(rows, message):
    with pytest.raises((DataError, TypeError), match=message):
        started(RowReader((rows,), {}, 4)).draw()


def test_an_object_must_give_a_row_for_each_index():
    class Whole(Rows):
        def __getitem__(self, rows):
            return self.values

    with pytest.raises(DataError, match=r"#0 .* gives shape \(20, 3\) for 4 indices"):
        started(RowReader((Whole(X),), {}, 4)).draw()


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="batch_size=21 is more than the 20 rows"):
        RowReader((X.numpy(),), {}, 21)
    with pytest.raises(ValueError, match=r"num_data=7 rows; .* \[20\]"):
        RowReader((X.numpy(),), {}, 2, num_data=7)


def test_the_model_is_examined_by_batches_alone():
    problem = Conjugate(num_data=200)
    rows = Rows(problem.x)
    potential, _ = build_potential(problem.full, (rows, problem.y), {}, batch_size=40)
    assert isinstance(potential.source, RowReader)
    assert rows.asked < 5
    theta = torch.ones(3)
    found = sum(weight * potential.gradient(theta, batch)[0] for batch, weight in potential.source.cover())
    expected = theta + problem.x.T @ (problem.x @ theta - problem.y)
    torch.testing.assert_close(found, expected)


def test_fingerprints_of_files(mapped):
    def of(x):
        return arguments_digest(((x,), {}))

    changed = X.numpy().copy()
    changed[7, 1] += 1
    assert of(mapped["numpy"]) == of(X.numpy()) == of(mapped["torch"])
    assert len({of(X.numpy()), of(changed), of(X.numpy().T), of(Rows(X)), of(Rows(X[:10]))}) == 5
    assert of(np.arange(10_000)) != of(np.arange(10_000) + 1)
