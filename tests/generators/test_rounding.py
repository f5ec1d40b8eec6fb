# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.generators import rounding
from pyro_apd.generators.base import peak

SCALED_ROK = torch.tensor([[[0.6, 0.2], [-1.7, 2.0]], [[0.4, -0.3], [0.0, 3.5]]])


@pytest.mark.parametrize("numbers_at_once", [1, 2**22])
def test_magnitudes_lose_what_they_gained_on_average(monkeypatch, numbers_at_once):
    monkeypatch.setattr(rounding, "_NUMBERS_AT_ONCE", numbers_at_once)
    integers_ROK = torch.full((2, 2, 2), 99, dtype=torch.int16)
    lost_R = rounding.rounded(integers_ROK, lambda rows: SCALED_ROK[:, rows])
    assert integers_ROK.tolist() == [[[1, 0], [-2, 2]], [[0, 0], [0, 4]]]
    assert lost_R.tolist() == pytest.approx([(0.4 + 0.3) / 3, 0.5])


def test_dithered_integers_are_right_on_average_and_lose_nothing():
    torch.manual_seed(0)
    integers_ROK = torch.zeros(1, 2, 20_000, dtype=torch.int16)
    expected_OK = torch.tensor([[0.3], [-1.75]])
    lost_R = rounding.rounded(integers_ROK, lambda rows: expected_OK[None, rows].expand(-1, -1, 20_000), True)
    torch.testing.assert_close(integers_ROK[0].float().mean(1), expected_OK[:, 0], atol=0.02, rtol=0)
    assert lost_R.tolist() == [0.0]


def test_the_least_integer_has_the_largest_magnitude():
    assert peak(torch.tensor([-128, 5], dtype=torch.int8)) == 128.0
