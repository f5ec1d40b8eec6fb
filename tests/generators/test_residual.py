# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Noise on matrices of weights: its law, and where it may be."""

import pytest
import torch

from pyro_apd.generators.residual import Block, MatrixNoise


def matrix_normal(count, rows=4, columns=6, rank=2):
    """Residuals with a scale a row and a covariance of low rank between columns; and that covariance."""
    scale_O = torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    directions_RI = torch.randn(rank, columns, dtype=torch.float64)
    latent_SOR = torch.randn(count, rows, rank, dtype=torch.float64)
    residual_SOI = scale_O[:, None] * latent_SOR @ directions_RI
    covariance = torch.kron(torch.diag(scale_O.square()), directions_RI.mT @ directions_RI)
    return residual_SOI.flatten(1), covariance


def fitted(count=20_000, rank=2):
    residual_SN, covariance = matrix_normal(count)
    noise = MatrixNoise(Block(0, 4, 6, rank)).double()
    noise.fit(residual_SN)
    return noise, covariance


@pytest.mark.parametrize("rank", [2, 5])
def test_noise_has_the_covariance_that_it_was_fitted_to(rank):
    noise, covariance = fitted(rank=rank)
    drawn_SN = noise(torch.randn(20_000, noise.block.latent_size, dtype=torch.float64))
    assert (torch.cov(drawn_SN.mT) - covariance).abs().max() < 0.08 * covariance.abs().max()


def test_too_small_a_rank_keeps_the_largest_directions():
    noise, covariance = fitted(rank=1)
    drawn_SN = noise(torch.randn(20_000, noise.block.latent_size, dtype=torch.float64))
    found, largest = torch.cov(drawn_SN.detach().mT), torch.linalg.eigvalsh(covariance)[-1]
    assert torch.linalg.eigvalsh(found)[-1] == pytest.approx(float(largest), rel=0.1)
    assert found.trace() < covariance.trace()


def test_folding_the_unit_changes_no_draw():
    noise, _ = fitted(count=100)
    latent_SL = torch.randn(5, noise.block.latent_size, dtype=torch.float64)
    before, inside = noise(latent_SL), noise.directions.detach().square().mean()
    assert inside.item() == pytest.approx(1.0)  # one learning rate fits all
    noise.fold()
    noise.fold()
    torch.testing.assert_close(noise(latent_SL), before)


def test_rows_that_do_not_move_get_no_noise():
    residual_SN, _ = matrix_normal(50)
    residual_SN[:, :6] = 0
    noise = MatrixNoise(Block(0, 4, 6, 2)).double()
    noise.fit(residual_SN)
    drawn_SN = noise(torch.randn(20, 8, dtype=torch.float64))
    assert not drawn_SN[:, :6].any()
    assert torch.isfinite(drawn_SN).all()


@pytest.mark.parametrize(
    "entry", [(0, 2, 3), (-1, 2, 3, 1), (0, 2, 3, 4), (0, 2, 3, 0), (0, 2.0, 3, 1), (0, True, 3, 1)]
)
def test_entries_that_are_no_block(entry):
    with pytest.raises(ValueError, match="must be \\(start, rows, columns, rank\\)"):
        Block.checked(entry, 100)


def test_a_block_beyond_the_end():
    with pytest.raises(ValueError, match="reaches beyond the 9 numbers"):
        Block.checked((4, 2, 3, 1), 9)
    assert Block.checked([4, 2, 3, 1], 10).span == slice(4, 10)
