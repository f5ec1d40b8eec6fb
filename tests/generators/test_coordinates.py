# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Principal coordinates against a plain singular value decomposition."""

import pytest
import torch

from pyro_apd.generators import draw_blocks
from pyro_apd.generators.coordinates import principal_coordinates


def draws(num_draws=30, size=12, dtype=torch.float64):
    scale = torch.linspace(3.0, 0.5, size, dtype=dtype)
    return torch.randn(num_draws, size, dtype=dtype) * scale + 5.0


def test_full_rank_gives_the_draws_back():
    theta_SD = draws()
    found = principal_coordinates(theta_SD, 12)
    torch.testing.assert_close(found.location_D + found.coordinates_SR @ found.basis_RD, theta_SD)


def test_basis_is_that_of_the_svd():
    theta_SD = draws()
    found = principal_coordinates(theta_SD, 4)
    _, lengths, directions = torch.linalg.svd(theta_SD - theta_SD.mean(0), full_matrices=False)
    torch.testing.assert_close(found.basis_RD.norm(dim=1), lengths[:4] / 30**0.5)
    alignment = (found.basis_RD / found.basis_RD.norm(dim=1, keepdim=True)) @ directions[:4].mT
    torch.testing.assert_close(alignment.abs(), torch.eye(4, dtype=torch.float64))


def test_columns_in_parts_give_the_same_basis(monkeypatch):
    theta_SD = draws(size=50)
    whole = principal_coordinates(theta_SD, 4)
    monkeypatch.setattr(draw_blocks, "_MIN_BYTES", 30 * 8 * 7)
    parts = principal_coordinates(theta_SD, 4)
    torch.testing.assert_close(parts.location_D, whole.location_D)
    torch.testing.assert_close(parts.basis_RD, whole.basis_RD)
    torch.testing.assert_close(parts.coordinates_SR, whole.coordinates_SR)


def test_draws_stay_as_they_were():
    theta_SD = draws()
    before = theta_SD.clone()
    principal_coordinates(theta_SD, 4)
    assert torch.equal(theta_SD, before)


def test_coordinates_have_mean_zero_and_unit_covariance():
    coordinates_SR = principal_coordinates(draws(), 5).coordinates_SR
    torch.testing.assert_close(coordinates_SR.mean(0), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(coordinates_SR.mT @ coordinates_SR / 30, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_without_variance_are_left_out(dtype):
    plane = torch.randn(40, 2, dtype=dtype) @ torch.randn(2, 50, dtype=dtype)
    assert principal_coordinates(plane, 20).basis_RD.shape == (2, 50)


def test_fewer_draws_than_coordinates():
    assert principal_coordinates(draws(num_draws=6), 20).basis_RD.shape[0] == 5


def test_the_wide_case_needs_no_square_matrix():
    found = principal_coordinates(torch.randn(5, 200_000), 3)
    assert found.basis_RD.shape == (3, 200_000)


def test_draws_that_are_all_the_same():
    with pytest.raises(ValueError, match="All draws are the same"):
        principal_coordinates(torch.ones(20, 3), 2)
    # The mean of equal numbers may be off by its rounding, which is no direction.
    with pytest.raises(ValueError, match="All draws are the same"):
        principal_coordinates(torch.rand(50).expand(7, 50).clone(), 2)
