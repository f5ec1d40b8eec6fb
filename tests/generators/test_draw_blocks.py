# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Parts of draws against all of them at once."""

import pytest
import torch

from pyro_apd.generators import draw_blocks
from pyro_apd.generators.draw_blocks import DrawBlocks, items_per_block


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 800 bytes."""
    monkeypatch.setattr(draw_blocks, "_MIN_BYTES", 800)
    monkeypatch.setattr(draw_blocks, "_MAX_BYTES", 800)


INDEX = torch.tensor([0, 1, 4, 6, 7])


def draws(dtype=torch.float64):
    """Two chains of eight draws, as they lie in a longer buffer."""
    return (3.0 + torch.randn(2, 11, 37, dtype=dtype))[:, :8]


def chosen(theta_CSD):
    return theta_CSD[:, INDEX].flatten(0, 1)


def gathered(blocks):
    """Columns put side by side, and how wide they came."""
    parts = [(span, part_SW.clone()) for span, part_SW in blocks.columns()]
    assert [span.start for span, _ in parts] == [0, *(span.stop for span, _ in parts[:-1])]
    return torch.cat([part for _, part in parts], 1), [part.shape[1] for _, part in parts]


def test_columns(small_parts):
    theta_CSD = draws()
    theta_SD, widths = gathered(DrawBlocks(theta_CSD, INDEX))
    assert torch.equal(theta_SD, chosen(theta_CSD))
    assert widths == [10, 10, 10, 7]


def test_rows(small_parts):
    theta_CSD = draws()
    blocks = DrawBlocks(theta_CSD, INDEX)
    assert torch.equal(torch.cat(list(blocks.rows())), chosen(theta_CSD))
    assert [len(part) for part in blocks.rows()] == [2, 2, 2, 2, 2]
    assert torch.equal(torch.cat(list(blocks.rows(step=3))), chosen(theta_CSD)[::3])


def test_rows_by_number():
    theta_CSD = draws()
    row_N = torch.tensor([9, 0, 5, 4, 9])
    assert torch.equal(DrawBlocks(theta_CSD, INDEX)[row_N], chosen(theta_CSD)[row_N])


def test_size():
    blocks = DrawBlocks(draws(), INDEX)
    assert (len(blocks), blocks.shape, blocks.dtype) == (10, (2, 5, 37), torch.float64)
    assert DrawBlocks(draws()).shape == (2, 8, 37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_to_the_bit_those_of_all_draws_where_one_part_holds_them(dtype):
    theta_CSD = draws(dtype)
    mean_D, scale_D = DrawBlocks(theta_CSD, INDEX).moments()
    assert torch.equal(mean_D, chosen(theta_CSD).mean(0))
    assert torch.equal(scale_D, chosen(theta_CSD).std(0, correction=0))


def test_moments_in_parts(small_parts):
    theta_CSD = draws()
    mean_D, scale_D = DrawBlocks(theta_CSD, INDEX).moments()
    torch.testing.assert_close(mean_D, chosen(theta_CSD).mean(0))
    torch.testing.assert_close(scale_D, chosen(theta_CSD).std(0, correction=0))


def test_standardised_draws(small_parts):
    theta_CSD = draws()
    before = theta_CSD.clone()
    blocks = DrawBlocks(theta_CSD, INDEX)
    shift_D, divisor_D = blocks.moments()
    standard = blocks.standardised(shift_D, divisor_D)
    expected = (chosen(theta_CSD) - shift_D) / divisor_D
    assert torch.equal(gathered(standard)[0], expected)
    assert torch.equal(torch.cat(list(standard.rows())), expected)
    assert torch.equal(theta_CSD, before)


def test_map_sees_parts_and_gives_all(small_parts):
    seen = []

    def norm(rows_ND):
        seen.append(len(rows_ND))
        return rows_ND.norm(dim=1)

    theta_CSD = draws()
    torch.testing.assert_close(DrawBlocks(theta_CSD, INDEX).map(norm), chosen(theta_CSD).norm(dim=1))
    assert seen == [2] * 5


@pytest.mark.parametrize(
    ("item_bytes", "num_bytes", "length"),
    [(1, 0, 8 * 2**20), (2**20, 2**29, 16), (2**20, 2**40, 32), (2**40, 2**41, 1)],
    ids=["small", "a thirty-second", "bounded", "one at least"],
)
def test_length_of_a_part(item_bytes, num_bytes, length):
    assert items_per_block(item_bytes, num_bytes) == length


def test_thinned_draws_are_evenly_spaced_in_each_chain():
    theta_CSD = torch.arange(24.0).reshape(2, 12, 1)
    blocks = DrawBlocks(theta_CSD, torch.arange(1, 12))
    assert blocks.thinned(11) is blocks
    few = blocks.thinned(3)
    assert few.shape == (2, 3, 1)
    assert torch.cat(list(few.rows())).flatten().tolist() == [1, 6, 11, 13, 18, 23]


def test_pooled_draws_are_those_of_one_chain():
    theta_CSD = torch.arange(24.0).reshape(2, 12, 1)
    pooled = DrawBlocks(theta_CSD, torch.tensor([0, 5])).pooled()
    assert pooled.shape == (1, 4, 1)
    assert torch.cat(list(pooled.rows())).flatten().tolist() == [0, 5, 12, 17]
