# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pyro_apd.diagnostics.comparison.evaluation import Evaluation
from pyro_apd.diagnostics.comparison.standard_errors import (
    balanced_halves,
    combined,
    even_halves,
    halves_by_chain,
    resolved_errors,
    share_between_pieces,
    standard_errors,
)


def of_numbers(mean_SN, kind="numbers"):
    return Evaluation(mean_SN, kind, {"": torch.stack([mean_SN, torch.ones_like(mean_SN)])}, targets=torch.zeros(1))


@given(st.integers(1, 9), st.integers(1, 40))
@settings(deadline=None)
def test_halves_are_equal_disjoint_and_balanced(num_chains, num_draws):
    if num_chains * num_draws < 8:
        with pytest.raises(ValueError, match="At least 8"):
            balanced_halves(num_chains, num_draws)
        return
    halves = balanced_halves(num_chains, num_draws)
    assert len(halves) == 7
    for first, second in halves:
        assert len(first) == len(second)
        assert not set(first) & set(second)
        if num_draws >= 8:  # every chain counts the same in both
            count = [sum(i // num_draws == c for i in first) for c in range(num_chains)]
            assert len(set(count)) == 1
    # Any two halvings agree on exactly half of the draws.
    signs = [[1 if i in set(first) else -1 for i in sorted(first + second)] for first, second in halves]
    for i in range(7):
        for j in range(i):
            assert sum(a * b for a, b in zip(signs[i], signs[j], strict=True)) == 0


@pytest.mark.parametrize(("num_chains", "ways", "used"), [(1, 0, 0), (2, 1, 2), (3, 1, 2), (5, 3, 4), (17, 7, 16)])
def test_halves_by_chain(num_chains, ways, used):
    halves = halves_by_chain(num_chains, 5)
    assert len(halves) == ways
    for first, second in halves:
        assert len(first) == len(second) == used * 5 // 2
        assert not {i // 5 for i in first} & {i // 5 for i in second}
    assert len({tuple(sorted(first)) for first, _ in halves}) == ways


def test_chains_that_disagree_show():
    # Each chain stands still at a place of its own: time says nothing, the chains do.
    places = torch.tensor([10.0, 11.0, 12.0, 13.0], dtype=torch.float64).repeat_interleave(16).reshape(-1, 1)
    assert standard_errors(of_numbers(places), balanced_halves(4, 16))["rmse"] == 0
    expected = math.sqrt((4 + 1 + 0) / 3) / 2
    assert resolved_errors(of_numbers(places), 4, 16)["rmse"] == pytest.approx(expected)
    assert resolved_errors(of_numbers(places), 1, 64)["rmse"] > 0


def test_slowest_halvings_come_first():
    changes = []
    for first, _ in balanced_halves(1, 8):
        held = [i in first for i in range(8)]
        changes.append(sum(a != b for a, b in pairwise(held)))
    assert changes == sorted(changes) == list(range(1, 8))


@pytest.mark.slow
def test_standard_error_of_a_mean_of_independent_draws():
    errors = []
    for seed in range(200):
        draws = torch.randn(64, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 10
        errors.append(standard_errors(of_numbers(draws), balanced_halves(1, 64))["rmse"] ** 2)
    assert 0.85 / 64 < sum(errors) / len(errors) < 1.15 / 64


def test_a_slow_chain_is_not_taken_for_a_fast_one():
    # A step half way: one of seven halvings sees it, and that is one of the three slowest.
    step = torch.cat([torch.zeros(32, 1), torch.ones(32, 1)]).double() + 10
    assert resolved_errors(of_numbers(step), 1, 64)["rmse"] == pytest.approx(math.sqrt(1 / 3) / 2)
    alternating = torch.arange(64).reshape(-1, 1) // 8 % 2 + 10.0
    fast = resolved_errors(of_numbers(alternating), 1, 64)["rmse"]
    assert fast == pytest.approx(math.sqrt(1 / 15) / 2)


def test_even_halves_cut_time_and_chains():
    for number, ways in ((8, 7), (31, 7), (32, 15), (100, 15)):
        halves = even_halves(number)
        assert len(halves) == ways
        assert len({tuple(sorted(first)) for first, _ in halves}) == ways
        for i, (first, second) in enumerate(halves):
            assert len(first) == len(second)
            assert not set(first) & set(second)
            # Any two halvings agree on exactly half of the draws.
            for other, _ in halves[:i]:
                assert 2 * len(set(first) & set(other)) == len(first)
    with pytest.raises(ValueError, match="At least 8"):
        even_halves(7)


def test_slow_ways_count_where_they_say_clearly_more():
    assert combined(1.0, [1.5, 0.2]) == 1.0
    assert combined(1.0, [1.6, 0.2]) == 1.6
    assert combined(1.0, []) == 1.0


def test_share_between_pieces():
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, 20, generator=g)
    assert share_between_pieces(of_numbers(mixed), 4, 100) < 0.05
    stuck = torch.randn(4, 1, 20, generator=g).expand(4, 100, 20).reshape(400, 20) + 0.1 * mixed
    assert share_between_pieces(of_numbers(stuck), 4, 100) > 0.9
    # One chain that moved once, half way.
    moved = torch.cat([mixed[:50], 5 + mixed[50:100]])
    assert share_between_pieces(of_numbers(moved), 1, 100) > 0.8
    assert math.isnan(share_between_pieces(of_numbers(mixed), 400, 1))
    assert math.isnan(share_between_pieces(Evaluation(mixed, "weights", {}), 4, 100))
    assert math.isnan(share_between_pieces(of_numbers(torch.zeros(400, 20)), 4, 100))
