# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Entries of a draw as rows of matrices, and back."""

import pytest
import torch

from pyro_apd.generators import weight_matrices
from pyro_apd.generators.weight_matrices import WeightMatrix, other_spans

PLAIN = WeightMatrix(1, 2, 3)
BIASED = WeightMatrix(2, 2, 3, bias=8)
TRANSPOSED = WeightMatrix(0, 2, 3, bias=7, is_transposed=True)


def rows_of(matrix, theta_SD, rows):
    weights, *bias = [theta_SD[:, span] for span in matrix.row_spans(rows)]
    return matrix.gather(weights, bias[0] if bias else None)


def test_rows_have_the_bias_as_last_column():
    theta_SD = torch.arange(10.0).unsqueeze(0)
    every = slice(0, 2)
    assert rows_of(PLAIN, theta_SD, every).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert rows_of(BIASED, theta_SD, every).tolist() == [[[2, 3, 4, 8], [5, 6, 7, 9]]]
    assert rows_of(BIASED, theta_SD, slice(1, 2)).tolist() == [[[5, 6, 7, 9]]]
    assert rows_of(TRANSPOSED, theta_SD, every).tolist() == [[[0, 2, 4, 7], [1, 3, 5, 8]]]
    assert [matrix.columns for matrix in (PLAIN, BIASED, TRANSPOSED)] == [3, 4, 4]


@pytest.mark.parametrize("matrix", [PLAIN, BIASED, TRANSPOSED])
@pytest.mark.parametrize("numbers_at_once", [1, 2**22])
def test_scattered_rows_come_back(matrix, numbers_at_once, monkeypatch):
    monkeypatch.setattr(weight_matrices, "_NUMBERS_AT_ONCE", numbers_at_once)
    theta_SD = torch.randn(3, 10)
    again_SD = torch.full_like(theta_SD, torch.nan)
    blocks = list(matrix.row_blocks(3))
    assert len(blocks) == (2 if numbers_at_once == 1 and not matrix.is_transposed else 1)
    for rows in blocks:
        matrix.scatter(rows_of(matrix, theta_SD, rows), rows, again_SD)
    inside = torch.zeros(10, dtype=torch.bool)
    for span in matrix.spans:
        inside[span] = True
    assert torch.equal(again_SD[:, inside], theta_SD[:, inside])
    assert again_SD[:, ~inside].isnan().all()
    assert int(inside.sum()) == matrix.units * matrix.columns


def test_entries_in_no_matrix():
    assert other_spans([], 4) == [slice(0, 4)]
    assert other_spans([BIASED], 11) == [slice(0, 2), slice(10, 11)]
    assert other_spans([WeightMatrix(0, 2, 3, bias=6)], 8) == []
    with pytest.raises(ValueError, match="Matrices overlap at entry 2"):
        other_spans([PLAIN, BIASED], 10)
    with pytest.raises(ValueError, match="Matrices overlap at entry 6"):
        other_spans([PLAIN, WeightMatrix(6, 1, 2)], 10)
    with pytest.raises(ValueError, match="Matrices overlap at entry 6"):
        other_spans([WeightMatrix(0, 2, 4, bias=6)], 10)


def test_entries_of_settings():
    assert WeightMatrix.checked(TRANSPOSED.entry, 9) == TRANSPOSED
    assert TRANSPOSED.entry == (0, 2, 3, 7, 1)


NO_MATRICES = [
    (0, 2, 3, -1), (0, 0, 3, -1, 0), (-1, 2, 3, -1, 0), (0, 2, 3, -2, 0), (0, 2, 3, 6, 2), (0, 2, 3.0, -1, 0),
    ("0", 2, 3, -1, 0), (0, 2, 3, -1, True),
]  # fmt: skip


@pytest.mark.parametrize("entry", NO_MATRICES)
def test_settings_that_are_no_matrix(entry):
    with pytest.raises(ValueError, match=r"must be \(start, units, inputs, bias, is_transposed\)"):
        WeightMatrix.checked(entry, 100)


@pytest.mark.parametrize("entry", [(0, 2, 3, -1, 0), (0, 1, 3, 5, 0), (3, 1, 3, -1, 1)])
def test_matrices_beyond_the_draw(entry):
    with pytest.raises(ValueError, match="reaches beyond the 5 numbers"):
        WeightMatrix.checked(entry, 5)
