# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import datetime
import threading
import time

import pytest
import torch
import torch.distributed

from pyro_apd.runtime import ranks as ranks_module
from pyro_apd.runtime.ranks import RankError, Ranks, join_process_group
from tests.support.processes import on_ranks


@pytest.mark.parametrize(("count", "size"), [(4, 1), (4, 2), (5, 2), (7, 3), (3, 3), (2, 3)])
def test_parts_cover_all_and_differ_by_one_at_most(count, size):
    parts = [Ranks(rank, size).shard(count) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [Ranks(0, size).shard(count, rank) for rank in range(size)] == parts


def test_alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = join_process_group()
    assert (ranks, torch.distributed.is_initialized()) == (Ranks(), False)
    assert ranks.gathered("a") == ["a"]
    assert ranks.broadcast_object("a") == "a"
    values = torch.ones(2)
    ranks.broadcast(values)
    ranks.send_to_first(values, 0)
    ranks.check_same({"a": 1})
    ranks.barrier()


@pytest.mark.slow
def test_values_of_any_type_come_over(tmp_path):
    values = [torch.arange(6.0).view(2, 3).to(dtype) for dtype in (torch.bfloat16, torch.float64)]
    values += [torch.ones(0, 3), torch.arange(6).view(2, 3).mT, torch.tensor(3.0)]

    def on_rank(rank):
        ranks = join_process_group()
        assert (ranks.rank, ranks.size) == (rank, 2)
        rooms = []
        for value in values:
            for source in (0, 1):
                for to_all in (True, False):
                    room = value.clone() if rank == source else torch.zeros_like(value)
                    (ranks.broadcast if to_all else ranks.send_to_first)(room, source)
                    rooms.append(room)
        return rooms

    first, second = on_ranks(on_rank, 2, tmp_path)
    expected = [value for value in values for _ in range(4)]
    assert all(torch.equal(room, value) for room, value in zip(first, expected, strict=True))
    has_it = [True, False, True, True] * len(values)
    for room, value, has in zip(second, expected, has_it, strict=True):
        assert torch.equal(room, value if has else torch.zeros_like(value))


@pytest.mark.slow
def test_a_group_of_the_users_is_used_and_kept(tmp_path):
    def on_rank(rank):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        ranks = join_process_group()
        return [ranks, ranks.gathered(rank), torch.distributed.is_initialized()]

    found = on_ranks(on_rank, 2, tmp_path, is_grouped=False)
    assert found == [[Ranks(rank, 2), [0, 1], True] for rank in range(2)]


@pytest.mark.slow
def test_nobody_goes_on_before_all_have_joined(tmp_path):
    """Who ends early would take the store with it in which others still look for each other."""

    def on_rank(rank):
        whole = torch.distributed.init_process_group

        def slow(*args, **kwargs):
            whole(*args, **kwargs)
            time.sleep(rank)

        torch.distributed.init_process_group = slow
        began = time.monotonic()
        join_process_group()
        return time.monotonic() - began

    assert min(on_ranks(on_rank, 2, tmp_path)) > 0.9


@pytest.mark.slow
def test_who_does_not_answer_in_time_counts_as_gone(tmp_path):
    """Alive, but elsewhere; and an error that is none of the others' stays what it is."""

    def on_rank(rank):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        limit = datetime.timedelta(seconds=1)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        ranks = join_process_group()
        with pytest.raises(RuntimeError, match="out of memory"), ranks.reporting_lost_processes():
            raise RuntimeError("out of memory")
        if rank == 1:
            time.sleep(3)
            return "late"
        return ranks.gathered(rank)

    error, late = on_ranks(on_rank, 2, tmp_path, is_grouped=False)
    assert isinstance(error, RankError)
    assert "had no answer within the process group's timeout" in str(error)
    assert "resumes from the last checkpoint" in str(error)
    assert late == "late"


@pytest.mark.parametrize("is_first_late", [True, False])
def test_what_an_earlier_attempt_left_in_the_store_is_not_taken_for_new(is_first_late):
    """As after a restart by torchrun, whose store stays."""
    store, found = torch.distributed.HashStore(), {}

    def attempt(number):
        def join(rank):
            time.sleep(0.2 * ((rank == 0) == is_first_late))
            part = ranks_module._store_of_attempt(store, rank, 3)
            part.set(f"at{rank}", f"{number}")
            found[rank] = [part.get(f"at{other}").decode() for other in range(3)]

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for number in range(3):
        found.clear()
        attempt(number)
        assert found == {rank: [f"{number}"] * 3 for rank in range(3)}


def test_who_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(ranks_module, "_START_TIMEOUT", 0.1)
    with pytest.raises(RankError, match=r"Rank 0 of 2 waited 0.1 s for rank 1 to start"):
        ranks_module._store_of_attempt(torch.distributed.HashStore(), 0, 2)
    with pytest.raises(RankError, match=r"Rank 1 of 2 waited 0.1 s for rank 0 to start"):
        ranks_module._store_of_attempt(torch.distributed.HashStore(), 1, 2)
