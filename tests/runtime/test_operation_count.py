# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The arithmetic of a call, counted."""

import sys

import pytest
import torch
from torch import nn

from pyro_apd.runtime.operation_count import OperationCount


def test_products_and_results_of_a_call():
    layer, filters = nn.Linear(30, 20), nn.Conv2d(1, 4, 3)
    x, images = torch.ones(1, 30), torch.ones(1, 1, 10, 10)
    assert OperationCount.of(lambda: layer(x).relu()) == OperationCount(600, 2 * 20 * 4)
    assert OperationCount.of(lambda: filters(images).flatten(1)) == OperationCount(8 * 8 * 4 * 9, 8 * 8 * 4 * 4)
    assert OperationCount.of(lambda: 1 / 0) == OperationCount()


def test_without_torchs_dispatch_modes_nothing_is_counted(monkeypatch):
    """They are no public interface of torch; the test above notices if they change."""
    layer, x = nn.Linear(30, 20), torch.ones(1, 30)
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    assert OperationCount.of(lambda: layer(x)) == OperationCount()


def test_a_gradient_takes_three_times_as_long_as_its_call():
    assert OperationCount(10**9).gradient_seconds == pytest.approx(0.12)
    assert OperationCount(0, 10**9).gradient_seconds == pytest.approx(0.75)
