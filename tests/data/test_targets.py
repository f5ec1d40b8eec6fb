# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Rows of arguments against the support of the site that they are the values of."""

import pytest
import torch
from torch.distributions import constraints

from pyro_apd.data import targets as module
from pyro_apd.data.minibatch import Call
from pyro_apd.data.targets import Targets, TargetsOfBatches, among, outside_message, shown_value
from pyro_apd.errors import DataError


def binary(leaf=0, shape=()):
    return Targets("obs", "#1", leaf, constraints.boolean, "Bernoulli", shape, torch.float32)


def test_rows_are_checked_in_parts(monkeypatch):
    monkeypatch.setattr(module, "_MAX_NUMBERS", 4)
    rows = torch.zeros(11, 2)
    binary(shape=(2,)).check(rows, str)
    rows[[7, 8, 10], 1] = 5.0
    with pytest.raises(DataError, match=r"value 5 in row 7 of argument #1.* 0 or 1") as caught:
        binary(shape=(2,)).check(rows, lambda row: f"row {row}")
    assert len(str(caught.value)) < 1000


def test_batches_are_checked_until_all_rows_have_come():
    good, bad = (torch.ones(4), torch.zeros(4)), (torch.ones(4), torch.full((4,), 3.0))
    checks = TargetsOfBatches([binary(leaf=1)], 8)
    checks.look(good, str)
    with pytest.raises(DataError, match="3 other rows"):
        checks.look(bad, str)
    checks.look(bad, str)  # eight rows have come
    with pytest.raises(DataError):
        checks.again(4).look(bad, str)
    TargetsOfBatches([], 8).look(bad, str)


def test_arguments_that_do_not_change_with_the_batch_are_left_out():
    x, y, fixed = torch.ones(4), torch.zeros(4), torch.zeros(4)
    call = Call((x, fixed, y), {})
    assert [target.leaf for target in among([binary(leaf=2), binary(leaf=1)], call, (x, y))] == [1]


@pytest.mark.parametrize(
    ("value", "support", "shown"),
    [
        (torch.tensor(0.25), constraints.boolean, "0.25"),
        (torch.tensor([0, 7, 1]), constraints.independent(constraints.boolean, 1), "7"),
        (torch.tensor([0.5, 0.6]), constraints.simplex, "[0.5, 0.6]"),
        (torch.arange(9.0), constraints.simplex, "[0, 1, 2, 3, 4, ...]"),
        (torch.tensor(float("nan")), constraints.real, "nan"),
    ],
)
def test_values_are_shown_in_short(value, support, shown):
    assert shown_value(value, support) == shown


@pytest.mark.parametrize(
    ("support", "words"),
    [
        (constraints.boolean, ": 0 or 1. For {-1, 1} use (y + 1) / 2."),
        (constraints.integer_interval(0, 3), ": integers from 0 to 3. Classes that count from 1 need y - 1."),
        (constraints.integer_interval(0, torch.tensor(3)), ": integers from 0 to 3. Correct"),
        (constraints.integer_interval(0, torch.arange(9)), ": IntegerInterval with bounds that differ by row. Correct"),
        (constraints.independent(constraints.positive, 1), ": GreaterThan(lower_bound=0.0). Correct"),
    ],
)
def test_supports_are_described_in_short(support, words):
    assert words in outside_message("obs", "Name", support, "9", "row 3")
