# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.generators.frames import fitted_frame, num_pinned, scale_exponents, short


@pytest.mark.parametrize(("size", "expected"), [(10, 10), (12, 12), (13, 10), (100, 10)])
def test_a_frame_has_all_columns_where_nearly_all_are_pinned(size, expected):
    assert num_pinned(size, 10) == expected


@pytest.mark.parametrize(("mean", "is_fine"), [(0.0, False), (300.0, True)])
def test_frames_are_as_fine_as_inputs_ask_for(mean, is_fine):
    """Outputs of a layer vary as the weights say also where its inputs have a mean of many times their deviation."""
    generator = torch.Generator().manual_seed(0)
    inputs_NI = torch.randn(500, 12, generator=generator, dtype=torch.float64) + mean * torch.arange(1.0, 13.0)
    moment_II = inputs_NI.mT @ inputs_NI / 500
    root_II = torch.linalg.cholesky(torch.linalg.inv(moment_II + 0.01 * torch.eye(12, dtype=torch.float64)))
    rows_NI = torch.randn(300, 12, generator=generator, dtype=torch.float64) @ root_II.mT
    integers_KI, step = fitted_frame(moment_II, 12, 0.4, rows_NI)
    assert integers_KI.dtype == torch.int16
    assert bool(integers_KI.abs().max() > 127) == is_fine
    assert float(short(torch.tensor(step, dtype=torch.float64))) == step


def test_columns_that_deviate_alike_have_no_scales():
    rows_CTOI = torch.tensor([[1.0, 2.0, 0.5, 0.4], [-1.0, -2.0, -0.5, -0.4]])[None, :, None]
    assert scale_exponents(rows_CTOI) is None
    assert scale_exponents(1e-20 * rows_CTOI) is None
    assert scale_exponents(torch.ones(2, 3, 5, 4)) is None


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_scales_are_powers_of_two_near_the_deviations(unit):
    rows_CTOI = unit * torch.tensor([[1.0, 1.0, 1e-3, 3.0], [-1.0, -1.0, -1e-3, 3.0]])[None, :, None]
    assert scale_exponents(rows_CTOI).tolist() == [0.0, 0.0, -9.0, -20.0]  # relative to their root mean square, 0.7
