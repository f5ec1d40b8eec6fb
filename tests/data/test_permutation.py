# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_apd.data.permutation import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**64), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_it_is_a_permutation_of_any_size(size, key, number):
    assert np.array_equal(np.sort(Permutation(size, key, number)(np.arange(size))), np.arange(size))


@given(st.integers(1, 2**62), st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_large_sizes_stay_inside_and_keep_numbers_apart(size, key):
    positions = np.unique(np.linspace(0, size - 1, 200).astype(np.int64).clip(0, size - 1))
    rows = Permutation(size, key)(positions)
    assert rows.min() >= 0
    assert rows.max() < size
    assert len(np.unique(rows)) == len(positions)


def test_it_depends_on_key_and_number_and_on_nothing_else():
    def rows(key, number):
        return Permutation(1000, key, number)(np.arange(1000))

    assert np.array_equal(rows(3, 1), rows(3, 1))
    # Sums and neighbours of both are others, too.
    others = [rows(*pair) for pair in [(3, 1), (3, 2), (4, 1), (1, 3), (2, 2), (4, 0), (3, 0)]]
    matches = [(a == b).mean() for i, a in enumerate(others) for b in others[:i]]
    assert max(matches) < 0.01


def test_positions_may_come_one_by_one_and_in_any_shape():
    permutation = Permutation(1_000_003, 9)
    positions = np.arange(12).reshape(3, 4) * 83_333
    assert np.array_equal(permutation(positions), [[int(permutation(p)) for p in row] for row in positions])
    assert permutation(positions).dtype == np.int64


def test_every_row_is_everywhere_equally_often():
    """Chi-square of rows by position, and of pairs of rows that are neighbours, over permutations."""
    size, times = 23, 2000
    orders = np.stack([Permutation(size, 7, number)(np.arange(size)) for number in range(times)])
    counts = np.stack([np.bincount(orders[:, position], minlength=size) for position in range(size)])
    places = ((counts - times / size) ** 2 / (times / size)).sum()
    freedom = (size - 1) ** 2
    assert abs(places - freedom) < 5 * (2 * freedom) ** 0.5
    pairs = np.bincount((orders[:, :-1] * size + orders[:, 1:]).ravel(), minlength=size * size)
    expected = times * (size - 1) / (size * (size - 1))
    apart = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
    assert abs(((apart - expected) ** 2 / expected).sum() - len(apart)) < 5 * (2 * len(apart)) ** 0.5


def test_neighbours_are_scattered_over_a_large_size():
    """Of a billion, the first hundred thousand: uniform over the range, and no order among them."""
    size = 10**9
    rows = Permutation(size, 1)(np.arange(100_000))
    counts = np.histogram(rows, bins=100, range=(0, size))[0]
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 5 * 198**0.5
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.02
    assert abs((np.diff(rows) > 0).mean() - 0.5) < 0.01


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_sizes_out_of_range(size):
    with pytest.raises(ValueError, match=f"size={size}"):
        Permutation(size, 0)
