# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Noise on matrices of weights: its law, and where it may be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_apd.generators.residual import Block, MatrixNoise

ROWS, COLUMNS = 4, 6
ROW_SCALE = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
COLUMN_SCALE = torch.tensor([0.3, 1.0, 1.0, 2.0, 0.7, 5.0], dtype=torch.float64)
# One direction, in units of the columns' scales, in which inputs pin the weights to a tenth.
PINNED = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64) / 6**0.5
SHRINK = 0.1


def matrix_noise(row_scale, column_scale, directions, damping):
    noise = MatrixNoise(Block(0, len(row_scale), len(column_scale), len(directions))).double()
    with torch.no_grad():
        for parameter, value in zip(
            (noise.row_scale, noise.column_scale, noise.directions, noise.damping),
            (row_scale, column_scale, directions, damping),
            strict=True,
        ):
            parameter.copy_(value)
    return noise


@torch.no_grad()
def covariance_of(noise):
    """Exact: the noise is linear in its latent."""
    map_LN = noise(torch.eye(noise.block.latent_size, dtype=torch.float64))
    return map_LN.mT @ map_LN


def expected_covariance(row_scale, column_scale, shrink=SHRINK):
    """Of rows by columns: kron of the squares of the rows' scales and what columns have in common."""
    within_II = torch.eye(len(column_scale), dtype=torch.float64) - (1 - shrink**2) * torch.outer(PINNED, PINNED)
    columns_II = column_scale.unsqueeze(-1) * within_II * column_scale
    return torch.kron(torch.diag(row_scale.square()), columns_II)


def residuals(count, row_scale=ROW_SCALE, column_scale=COLUMN_SCALE):
    """Draws ``(count, rows * columns)`` of just that law."""
    latent_SOI = torch.randn(count, len(row_scale), len(column_scale), dtype=torch.float64)
    latent_SOI -= (1 - SHRINK) * (latent_SOI @ PINNED).unsqueeze(-1) * PINNED
    return (row_scale.unsqueeze(-1) * latent_SOI * column_scale).flatten(1)


def fitted(residual_SN, rank, rows=ROWS, columns=COLUMNS):
    noise = MatrixNoise(Block(0, rows, columns, rank)).double()
    noise.fit(residual_SN)
    return noise


def test_its_covariance_is_that_of_the_formula():
    noise = matrix_noise(ROW_SCALE, COLUMN_SCALE, PINNED.unsqueeze(0), torch.tensor([1 - SHRINK]))
    torch.testing.assert_close(covariance_of(noise), expected_covariance(ROW_SCALE, COLUMN_SCALE))


def test_undamped_every_weight_moves_by_itself():
    noise = matrix_noise(ROW_SCALE, COLUMN_SCALE, PINNED.unsqueeze(0), torch.zeros(1))
    torch.testing.assert_close(
        covariance_of(noise), torch.kron(torch.diag(ROW_SCALE.square()), torch.diag(COLUMN_SCALE.square()))
    )


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_fitting_finds_scales_and_the_pinned_direction(rank):
    # Equal scales of columns: among unequal ones, what the direction takes of each is not found exactly.
    column_scale = 2 * torch.ones(COLUMNS, dtype=torch.float64)
    noise = fitted(residuals(20_000, column_scale=column_scale), rank)
    expected = expected_covariance(ROW_SCALE, column_scale)
    assert (covariance_of(noise) - expected).abs().max() < 0.04 * expected.abs().max()
    moved_N = torch.kron(torch.ones(ROWS), PINNED.float()).double() / 2
    pinned = moved_N @ covariance_of(noise) @ moved_N
    assert pinned.item() == pytest.approx(float(SHRINK**2 * ROW_SCALE.square().sum()), rel=0.15)


def test_fitting_keeps_the_variance_of_rows_and_of_columns_whatever_the_rank():
    residual_SN = residuals(500)
    square_OI = residual_SN.square().mean(0).reshape(ROWS, COLUMNS)
    for rank in (1, 2, 6):
        found_OI = covariance_of(fitted(residual_SN, rank)).diagonal().reshape(ROWS, COLUMNS)
        torch.testing.assert_close(found_OI.sum(1) / found_OI.sum(), square_OI.sum(1) / square_OI.sum())
        torch.testing.assert_close(found_OI.sum(), square_OI.sum(), rtol=0.15, atol=0.0)


def test_of_full_rank_it_has_the_covariance_that_columns_have():
    """Whitened by scales of rows and columns, the fit is exact but for the mean of what is not damped."""
    residual_SN = residuals(300)
    noise = fitted(residual_SN, rank=6)
    residual_SOI = residual_SN.unflatten(1, (ROWS, COLUMNS))
    square_OI = residual_SOI.square().mean(0)
    row_O, column_I = (square_OI.mean(1) / square_OI.mean()).sqrt(), square_OI.mean(0).sqrt()
    white_NI = (residual_SOI / row_O.unsqueeze(-1) / column_I).flatten(0, 1)
    within_II = column_I.unsqueeze(-1) * (white_NI.mT @ white_NI / len(white_NI)) * column_I
    # Of six directions five are damped, relative to the one with most variance.
    torch.testing.assert_close(covariance_of(noise), torch.kron(torch.diag(row_O.square()), within_II))


@pytest.mark.parametrize("still", [[0], [0, 1, 2], [1, 2, 3, 4, 5]], ids=str)
def test_columns_that_never_move_get_no_noise_and_pin_nothing(still):
    residual_SN = torch.randn(200, ROWS, COLUMNS, dtype=torch.float64)
    residual_SN[:, :, still] = 0
    noise = fitted(residual_SN.flatten(1), rank=2)
    found_OI = covariance_of(noise).diagonal().reshape(ROWS, COLUMNS)
    assert not found_OI[:, still].any()
    moving = [i for i in range(COLUMNS) if i not in still]
    # White noise: the pinned directions are chance, and weigh little.
    assert found_OI[:, moving].mean().item() == pytest.approx(1.0, rel=0.15)
    assert not noise.directions[:, still].abs().gt(1e-7).any()


def test_rows_that_never_move_get_no_noise():
    residual_SN = residuals(50)
    residual_SN[:, :COLUMNS] = 0
    covariance = covariance_of(fitted(residual_SN, rank=2))
    assert not covariance[:COLUMNS].any()
    assert torch.isfinite(covariance).all()
    assert covariance[COLUMNS:, COLUMNS:].diagonal().gt(0).all()


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_where_nothing_moves_there_is_no_noise(rank):
    noise = fitted(torch.zeros(30, ROWS * COLUMNS, dtype=torch.float64), rank)
    assert not noise(torch.randn(5, ROWS * COLUMNS, dtype=torch.float64)).any()
    assert all(torch.isfinite(parameter).all() for parameter in noise.parameters())


def test_folding_the_unit_changes_no_draw():
    noise = fitted(1e-4 * residuals(100), rank=2)
    latent_SL = torch.randn(5, noise.block.latent_size, dtype=torch.float64)
    before, inside = noise(latent_SL), noise.column_scale.detach().square().mean()
    assert inside.item() == pytest.approx(1.0)  # one learning rate fits all
    noise.fold()
    noise.fold()
    torch.testing.assert_close(noise(latent_SL), before)
    assert noise.column_scale.detach().abs().max() < 1e-2


def test_every_parameter_can_be_trained():
    noise = fitted(residuals(100), rank=2)
    noise(torch.randn(8, noise.block.latent_size, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in noise.parameters())


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, 9), rows=st.integers(1, 5), columns=st.integers(1, 5), data=st.data())
def test_a_block_that_fits_comes_back(start, rows, columns, data):
    entry = (start, rows, columns, data.draw(st.integers(1, columns)))
    block = Block.checked(list(entry), start + rows * columns)
    assert (block.entry, block.span, block.latent_size) == (entry, slice(start, start + rows * columns), rows * columns)
    with pytest.raises(ValueError, match=f"reaches beyond the {start + rows * columns - 1} numbers"):
        Block.checked(entry, start + rows * columns - 1)


@pytest.mark.parametrize(
    "entry", [(0, 2, 3), (-1, 2, 3, 1), (0, 2, 3, 4), (0, 2, 3, 0), (0, 2.0, 3, 1), (0, True, 3, 1)]
)
def test_entries_that_are_no_block(entry):
    with pytest.raises(ValueError, match="must be \\(start, rows, columns, rank\\)"):
        Block.checked(entry, 100)
