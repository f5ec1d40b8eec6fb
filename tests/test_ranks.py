# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.distributed

from pyro_apd.ranks import Ranks, joined
from tests.processes import on_ranks


@pytest.mark.parametrize(("count", "size"), [(4, 1), (4, 2), (5, 2), (7, 3), (3, 3), (2, 3)])
def test_parts_cover_all_and_differ_by_one_at_most(count, size):
    parts = [Ranks(rank, size).part(count) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [Ranks(0, size).part(count, rank) for rank in range(size)] == parts


def test_alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = joined()
    assert (ranks, torch.distributed.is_initialized()) == (Ranks(), False)
    assert ranks.gathered("a") == ["a"]
    assert ranks.agreed("a") == "a"
    values = torch.ones(2)
    ranks.pass_on(values, 0, to_all=True)
    ranks.check_same({"a": 1})
    ranks.meet()


@pytest.mark.thorough
def test_values_of_any_type_come_over(tmp_path):
    values = [torch.arange(6.0).view(2, 3).to(dtype) for dtype in (torch.bfloat16, torch.float64)]
    values += [torch.ones(0, 3), torch.arange(6).view(2, 3).mT, torch.tensor(3.0)]

    def on_rank(rank):
        ranks = joined()
        assert (ranks.rank, ranks.size) == (rank, 2)
        rooms = []
        for value in values:
            for source in (0, 1):
                for to_all in (True, False):
                    room = value.clone() if rank == source else torch.zeros_like(value)
                    ranks.pass_on(room, source, to_all)
                    rooms.append(room)
        return rooms

    first, second = on_ranks(on_rank, 2, tmp_path)
    expected = [value for value in values for _ in range(4)]
    assert all(torch.equal(room, value) for room, value in zip(first, expected, strict=True))
    has_it = [True, False, True, True] * len(values)
    for room, value, has in zip(second, expected, has_it, strict=True):
        assert torch.equal(room, value if has else torch.zeros_like(value))


@pytest.mark.thorough
def test_a_group_of_the_users_is_used_and_kept(tmp_path):
    def on_rank(rank):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        ranks = joined()
        return [ranks, ranks.gathered(rank), torch.distributed.is_initialized()]

    found = on_ranks(on_rank, 2, tmp_path, is_grouped=False)
    assert found == [[Ranks(rank, 2), [0, 1], True] for rank in range(2)]
