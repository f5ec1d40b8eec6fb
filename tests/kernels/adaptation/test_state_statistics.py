# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_apd.kernels.adaptation.state_statistics import (
    RunningMoments,
    autocorrelation_time,
    mean_without_outliers,
    step_change,
)


def test_moments_are_those_of_all_states():
    states = torch.randn(1000, 2, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 5) + 1.0
    moments = RunningMoments()
    for state in states:
        moments.add(state)
    logs = states.var(0, correction=0).log()
    share = 1000 / 1005
    expected = (0.5 * (share * logs + (1 - share) * logs.mean(-1, keepdim=True))).exp()
    torch.testing.assert_close(moments.scale(), expected, rtol=1e-3, atol=0)


def test_few_states_have_no_scale():
    moments = RunningMoments()
    assert moments.scale() is None
    for _ in range(9):
        moments.add(torch.randn(3))
    assert moments.scale() is None


def test_a_saved_state_does_not_change():
    moments = RunningMoments()
    for i in range(12):
        moments.add(torch.arange(3.0) * i)
    saved = moments.state_dict()
    moments.add(torch.ones(3))
    again = RunningMoments()
    again.load_state_dict(saved)
    assert again.count == 12
    torch.testing.assert_close(again.mean, torch.arange(3.0) * 5.5)


def test_autocorrelation_time_of_an_autoregression():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 2, 20, generator=generator, dtype=torch.float64)
    rho = torch.tensor([0.0, 0.8], dtype=torch.float64).reshape(2, 1)
    points = [noise[0]]
    for step in noise[1:]:
        points.append(rho * points[-1] + (1 - rho**2).sqrt() * step)
    found = autocorrelation_time(torch.stack(points))
    assert found.tolist() == pytest.approx([1.0, 9.0], rel=0.15)


def test_outliers_count_as_ten_medians():
    assert mean_without_outliers([1.0, 1.0, 1.0, 1e9]) == pytest.approx(13 / 4)


@pytest.mark.parametrize(
    ("variances", "expected"),
    [([64.0, 1e9, 0.0], 0.5), ([1 / 64, 1 / 64], 2.0), ([1e-20], 3.0), ([math.nan, math.inf, 1.0], 0.25), ([], 1.0)],
)
def test_step_sizes_change_by_the_sixth_root(variances, expected):
    assert step_change(torch.tensor(variances), 1.0, 1.0, 3.0) == pytest.approx(expected)


def test_a_part_of_the_change():
    assert step_change(torch.tensor([64.0]), 1.0, 0.5, 3.0) == pytest.approx(0.5**0.5)
