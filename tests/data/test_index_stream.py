# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_apd.data.index_stream import EpochStream, IndependentStream, batches_per_epoch, index_stream

KINDS = [EpochStream, IndependentStream]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(num_data=st.integers(1, 50), batch_size=st.integers(1, 50), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_an_epoch_shows_each_row_at_most_once(num_data, batch_size, seed):
    batch_size = min(batch_size, num_data)
    stream = EpochStream(num_data, batch_size, generator(seed))
    for _ in range(2):
        rows = torch.cat([next(stream) for _ in range(num_data // batch_size)])
        assert rows.dtype == torch.int64
        assert len(rows) == num_data - num_data % batch_size
        assert len(rows.unique()) == len(rows)
        assert int(rows.min()) >= 0
        assert int(rows.max()) < num_data


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_drawn_uniformly_also_where_batches_do_not_divide_the_data(kind):
    stream = kind(7, 3, generator())
    counts = torch.bincount(torch.cat([next(stream) for _ in range(4000)]), minlength=7)
    assert (counts / counts.sum() - 1 / 7).abs().max() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_streams_depend_on_the_seed_and_epochs_differ(kind):
    def drawn(seed):
        stream = kind(1000, 100, generator(seed))
        return torch.stack([next(stream) for _ in range(20)])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(drawn(1)[:10], drawn(1)[10:])


@pytest.mark.parametrize("kind", KINDS)
def test_chains_together_draw_as_each_alone(kind):
    together = kind(50, 8, [generator(i) for i in range(3)])
    alone = [kind(50, 8, generator(i)) for i in range(3)]
    for _ in range(15):
        assert torch.equal(next(together), torch.stack([next(stream) for stream in alone]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken", [0, 1, 6, 7, 20])
def test_a_stream_goes_on_where_it_was(kind, taken):
    source = generator(3)
    stream = kind(50, 8, source)
    for _ in range(taken):
        next(stream)
    state, at = stream.state_dict(), source.get_state()
    expected = [next(stream) for _ in range(10)]
    resumed_from = generator(4)
    resumed = kind(50, 8, resumed_from)
    resumed.load_state_dict(state)
    resumed_from.set_state(at)
    assert all(torch.equal(next(resumed), rows) for rows in expected)


def test_many_rows_are_drawn_independently_without_a_table(monkeypatch):
    assert isinstance(index_stream(10**6, 10, generator()), EpochStream)
    assert batches_per_epoch(10**7, 10, False) == 10**6
    assert batches_per_epoch(10**7, 10, True) is None
    assert batches_per_epoch(10**7 + 1, 10, False) is None
    stream = index_stream(10**12, 100, generator())
    assert isinstance(stream, IndependentStream)
    monkeypatch.setattr(torch, "randperm", None)
    rows = torch.cat([next(stream) for _ in range(200)])
    assert len(rows.unique()) == 20_000
    assert abs(float(rows.double().mean()) / 10**12 - 0.5) < 0.01


def test_independent_rows_come_twice():
    stream = index_stream(100, 50, generator(), replacement=True)
    assert isinstance(stream, IndependentStream)
    distinct = [len(next(stream).unique()) for _ in range(200)]
    expected = 100 * (1 - 0.99**50)
    assert abs(sum(distinct) / 200 - expected) < 0.7
