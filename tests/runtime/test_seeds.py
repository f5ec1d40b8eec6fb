# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_apd.runtime import seeds

PARTS = st.lists(st.integers(0, 2**70) | st.text(max_size=3), max_size=3)


@given(st.integers(0, 2**64 - 1), PARTS)
def test_a_derived_seed_suits_every_generator_and_repeats(seed, path):
    found = seeds.derived_seed(seed, *path)
    assert 0 <= found < 2**62
    assert found == seeds.derived_seed(seed, *path)


@given(PARTS, PARTS)
def test_other_paths_have_other_words(first, second):
    def words(path):
        return [word for part in path for word in seeds._words(part)]

    assert (words(first) == words(second)) == (first == second)


def test_neighbouring_seeds_and_chains_have_nothing_in_common():
    found = {seeds.derived_seed(seed, "chain", i) for seed in range(50) for i in range(50)}
    assert len(found) == 2500
    bits = np.array([[value >> bit & 1 for bit in range(62)] for value in found])
    assert abs(bits.mean(0) - 0.5).max() < 0.06


def test_the_derivation_is_fixed():
    """Files and checkpoints depend on it: a change is a change for users, and belongs into CHANGELOG."""
    assert seeds.derived_seed(0) == 3948308845846928943
    assert seeds.derived_seed(7, "noise", 3) == 2491438021011614192


def test_generators_repeat():
    a, b = (torch.randn(3, generator=seeds.derived_generator(1, "x")) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.randn(3, generator=seeds.derived_generator(1, "y")))


def test_fresh_seeds_come_from_the_global_generator():
    torch.manual_seed(5)
    first = seeds.fresh_seed()
    assert seeds.seed_or_fresh(None) != first
    torch.manual_seed(5)
    assert seeds.seed_or_fresh(None) == first
    assert seeds.seed_or_fresh(np.int64(3)) == 3


@pytest.mark.parametrize("seed", [True, -1, 2**64, 1.0, "0"])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match=r"seed=.* must be None or an integer from 0"):
        seeds.checked_seed(seed)


def test_negative_numbers_in_a_path():
    with pytest.raises(ValueError, match="negative; got -1"):
        seeds.derived_seed(0, -1)
