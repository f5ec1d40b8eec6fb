# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Every ``stride``-th draw, whatever the length of the run, in a buffer that never grows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_apd.chains.stores.even import EvenStore
from pyro_apd.models.layout import Layout

# Each example writes some hundred draws; on a machine that is busy, that has no upper limit.
unhurried = settings(deadline=None, max_examples=25)

LAYOUT = Layout({"w": (2,), "b": ()})


def make(num_chains=1, capacity=4, dtype=torch.float64):
    return EvenStore(LAYOUT, num_chains, capacity, torch.empty(0, dtype=dtype))


def write(store, chain, draw, width=1):
    """A draw that tells its number and its chain's, and so do its figures."""
    number_C = torch.arange(chain, chain + width, dtype=torch.float64)
    theta_CD = torch.stack([torch.full((width,), float(draw)).double(), number_C, -number_C], 1)
    store.write(chain, draw, theta_CD, {"potential": 2.0 * draw + number_C, "grad_norm": float(draw), "step_size": 0.5})


def kept(store, chain):
    """Numbers of the draws that a chain has, after a look at what came with them."""
    count = store.counts[chain]
    theta_SD = store.theta_CSD[chain, :count]
    assert (theta_SD[:, 1] == chain).all()
    assert torch.equal(store.statistics["potential"][chain, :count], 2 * theta_SD[:, 0] + chain)
    assert torch.equal(store.statistics["grad_norm"][chain, :count], theta_SD[:, 0])
    return theta_SD[:, 0].long().tolist()


def stride_of(length, capacity):
    """The smallest power of two at which so many draws fit."""
    stride = 1
    while -(-length // stride) > capacity:
        stride *= 2
    return stride


@unhurried
@given(capacity=st.integers(2, 40), length=st.integers(0, 400))
def test_what_is_kept_is_every_strideth_draw_from_the_first_on(capacity, length):
    store = make(capacity=capacity)
    for draw in range(length):
        write(store, 0, draw)
    assert store.stride == stride_of(length, capacity)
    assert kept(store, 0) == list(range(0, length, store.stride))
    if length >= capacity:
        assert capacity / 2 <= store.counts[0] <= capacity
    assert length == 0 or length - 1 - kept(store, 0)[-1] < store.stride  # the last is as near as can be


@unhurried
@given(capacity=st.integers(2, 12), length=st.integers(1, 100))
def test_several_chains_at_once_or_one_after_the_other(capacity, length):
    together, apart = make(3, capacity), make(3, capacity)
    for draw in range(length):
        write(together, 0, draw, width=3)
    for chain in (0, 1, 2):
        for draw in range(length):
            write(apart, chain, draw)
    for store in (together, apart):
        assert [kept(store, chain) for chain in range(3)] == [list(range(0, length, store.stride))] * 3
    assert torch.equal(together.unconstrained(), apart.unconstrained())
    assert together.unconstrained().shape == (3, -(-length // together.stride), 3)


def test_the_buffer_stays_where_it_is():
    store = make(2, 8)
    tensors = [store.theta_CSD, *store.statistics.values()]
    places = [value.data_ptr() for value in tensors]
    for draw in range(300):
        write(store, 0, draw, width=2)
    now = [store.theta_CSD, *store.statistics.values()]
    assert [value.data_ptr() for value in now] == places
    assert [tuple(value.shape) for value in now] == [(2, 8, 3), (2, 8), (2, 8), (2, 8)]


def test_writing_copies():
    store, theta_CD = make(), torch.zeros(1, 3, dtype=torch.float64)
    store.write(0, 0, theta_CD, {"potential": 0.0, "grad_norm": 0.0, "step_size": 0.0})
    theta_CD += 1
    assert not store.theta_CSD[0, 0].any()


@unhurried
@given(capacity=st.integers(2, 12), length=st.integers(0, 80), count=st.integers(0, 100))
def test_truncating_counts_all_draws_that_were_written(capacity, length, count):
    store = make(capacity=capacity)
    for draw in range(length):
        write(store, 0, draw)
    store.truncate(0, count)
    assert kept(store, 0) == list(range(0, min(length, count), store.stride))


@unhurried
@given(capacity=st.integers(2, 12), end=st.integers(0, 60), more=st.integers(0, 120))
def test_a_chain_that_ended_keeps_what_it_had_and_gets_no_more(capacity, end, more):
    store = make(2, capacity)
    for draw in range(end + 3):
        write(store, 0, draw, width=2)
    store.end(1, end)  # the last three were no draws of the posterior
    for draw in range(end + 3, end + 3 + more):
        write(store, 0, draw, width=2)
    assert kept(store, 0) == list(range(0, end + 3 + more, store.stride))
    assert kept(store, 1) == list(range(0, end, store.stride))


def test_the_largest_block_leaves_out_a_chain_that_ended_early():
    store = make(2, 8)
    for draw in range(8):
        write(store, 0, draw, width=2)
    store.end(1, 2)
    assert store.complete_part() == ([0], 8)
    assert store.unconstrained().shape == (1, 8, 3)


def test_state_round_trip_goes_on_as_if_nothing_had_been():
    whole, first, second = make(2, 6), make(2, 6), make(2, 6)
    for draw in range(40):
        write(whole, 0, draw, width=2)
        write(first if draw < 25 else second, 0, draw, width=2)
        for store in (whole, first) if draw == 20 else ():
            store.end(1, 15)
        if draw == 24:
            state = {name: value.clone() if isinstance(value, torch.Tensor) else value
                     for name, value in first.state_dict().items()}  # fmt: skip
            second.load_state_dict(state)
            second.flush(durably=True)
    assert (second.stride, second.counts) == (whole.stride, whole.counts)
    assert [kept(second, chain) for chain in (0, 1)] == [[0, 8, 16, 24, 32], [0, 8]]
    assert torch.equal(second.theta_CSD[0, :5], whole.theta_CSD[0, :5])


def test_a_state_is_copied_in():
    first, second = make(), make()
    write(first, 0, 0)
    second.load_state_dict(first.state_dict())
    write(second, 0, 1)
    assert (first.counts, second.counts) == ([1], [2])
    assert second.theta_CSD.data_ptr() != first.theta_CSD.data_ptr()


def test_samples_are_by_site():
    store = make(2, 4)
    for draw in range(6):
        write(store, 0, draw, width=2)
    samples = store.samples()
    assert {name: tuple(value.shape) for name, value in samples.items()} == {"b": (2, 3), "w": (2, 3, 2)}
    assert samples["w"][1, :, 0].tolist() == [0, 2, 4]
    assert store.theta_CSD.dtype == torch.float64


@pytest.mark.parametrize("capacity", [1, 0, -3])
def test_too_small_a_capacity(capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity} must be at least 2"):
        make(capacity=capacity)
