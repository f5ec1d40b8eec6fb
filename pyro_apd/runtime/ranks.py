# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The processes of one job, as ``torchrun`` starts them: who is who, and how what they have comes together.

All of it is :mod:`torch.distributed`. A group that the user initialised is used as it is; else one is made by the first
call that needs it: gloo, and NCCL for what lies on a GPU.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

# Looked up when they are used: a build of torch may lack them.
_dist = torch.distributed
# Seconds that processes wait for each other to start.
_PATIENCE = 600
# What is in torch's messages when a process is gone.
_LOST = ("gloo", "nccl", "connection", "peer", "timed out", "timeout")


class RankError(RuntimeError):
    """Another process of the job is gone, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """A place among processes; by default alone.

    Methods that pass something on have to be called by all, in the same order.

    :ivar int rank: number of this one.
    :ivar int size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def part(self, count: int, rank: int | None = None) -> range:
        """Which of ``count`` things in a row are one process's, by default this one's: as many as any other's, or one
        more."""
        rank = self.rank if rank is None else rank
        each, more = divmod(count, self.size)
        start = rank * each + min(rank, more)
        return range(start, start + each + (rank < more))

    def gathered(self, value: Any) -> list[Any]:
        """What each process has: anything that pickles. Everybody gets all.

        :raises RankError: if one is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.listening():
            _dist.all_gather_object(values, value)
        return values

    def agreed(self, value: Any) -> Any:
        """What the first process has.

        :raises RankError: if one is gone.
        """
        return self.gathered(value if self.rank == 0 else None)[0]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Compares what has to be the same everywhere, by name.

        :raises ValueError: naming the first that is not; everywhere.
        """
        everywhere = self.gathered(dict(values))
        for name, value in everywhere[0].items():
            for rank, others in enumerate(everywhere):
                if others[name] != value:
                    raise ValueError(
                        f"Processes disagree about {name}: rank 0 has {value!r}, rank {rank} {others[name]!r}. Give "
                        "all of them the same; chains have random numbers of their own by their number in the run."
                    )

    def pass_on(self, values: Tensor, source: int, to_all: bool) -> None:
        """Fills ``values`` with those of rank ``source``, everywhere or on rank 0 only.

        :param values: what is passed on, or room for it of the same shape and dtype; elsewhere ignored.
        :raises RankError: if a process is gone.
        """
        is_taking = self.rank == 0 or to_all
        is_for_nobody = self.size == 1 or (source == 0 and not to_all) or values.numel() == 0
        if is_for_nobody or not (is_taking or self.rank == source):
            return
        staged = values.contiguous().to(self._device())
        as_bytes = staged.view(-1).view(torch.uint8)  # any dtype, by any backend
        with self.listening():
            if to_all:
                _dist.broadcast(as_bytes, source)
            elif self.rank == source:
                _dist.send(as_bytes, 0)
            else:
                _dist.recv(as_bytes, source)
        if self.rank != source:
            values.copy_(staged)

    def add_up(self, values: Tensor) -> None:
        """Puts the sum over all processes in place of ``values``, the same in each to the last bit.

        :raises RankError: if one is gone.
        """
        if self.size > 1:
            with self.listening():
                _dist.all_reduce(values)

    def meet(self) -> None:
        """Waits until all are here.

        :raises RankError: if one is gone.
        """
        self.gathered(None)

    def averaging(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over all processes, which begin with the first one's parameters."""
        if self.size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        with self.listening():
            return nn.parallel.DistributedDataParallel(module)

    def _device(self) -> torch.device:
        """Where a tensor has to be to be passed on."""
        is_gpu_only = _dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_gpu_only else torch.device("cpu")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Says what it means where torch has lost another process.

        :raises RankError: if that is so; other errors pass.
        """
        try:
            yield
        except RuntimeError as error:  # what torch raises differs by backend
            if self.size == 1 or not any(word in str(error).lower() for word in _LOST):
                raise
            raise RankError(
                f"Rank {self.rank} of {self.size} found another process of the job gone, or had no answer within the "
                f"process group's timeout ({str(error).split('. ')[0]}). What went wrong is said by the process that "
                "ended first. With checkpoint= the same call resumes from the last one, also by itself under "
                "torchrun --max-restarts=1."
            ) from error


def joined() -> Ranks:
    """This process's place in the job; alone where there is no job.

    A process group is made from what ``torchrun`` set in the environment, unless there is one. It stays to the end of
    the process: torch cannot make another from the same environment.

    :raises RankError: if another process is gone.
    """
    if not _dist.is_available():
        return Ranks()
    if not _dist.is_initialized():
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Ranks()
        is_on_gpu = torch.cuda.is_available() and _dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, rank, size = next(_dist.rendezvous("env://"))  # type: ignore[attr-defined]
            _dist.init_process_group(backend, store=_fresh(store, rank, size), rank=rank, world_size=size)
        else:
            _dist.init_process_group(backend)
        atexit.register(_leave)
        # Without torchrun's own, the first process keeps the store: were it to leave by an error while others are
        # still finding each other, they would report a lost connection in place of that error.
        Ranks(_dist.get_rank(), _dist.get_world_size()).meet()
    return Ranks(_dist.get_rank(), _dist.get_world_size())


def _fresh(store: Any, rank: int, size: int) -> Any:
    """A part of ``torchrun``'s store in which no earlier attempt at the job wrote.

    The store outlives a restart, and with it the addresses of processes that are gone, where those that come early
    would look for the others (seen with torch 2.13; see also pytorch issue 135712). So the first process makes a name
    for this attempt, which counts for another once either has seen the other answer with a number that is new.

    :raises RankError: if a process does not come.
    """
    mine, deadline = os.urandom(8).hex(), time.monotonic() + _PATIENCE
    waited_for = set(range(1, size)) if rank == 0 else {0}
    if rank == 0:
        store.set("pyro_apd/offer", mine)
    while waited_for:
        for other in list(waited_for):
            if rank == 0:
                echo = _read(store, f"pyro_apd/echo{other}")
                if echo.startswith(mine):
                    store.set(f"pyro_apd/go{other}", echo)
                    waited_for.discard(other)
                continue
            offer = _read(store, "pyro_apd/offer")
            store.set(f"pyro_apd/echo{rank}", f"{offer}/{mine}")
            if _read(store, f"pyro_apd/go{rank}") == f"{offer}/{mine}":
                return _dist.PrefixStore(offer, store)  # type: ignore[attr-defined]
        if time.monotonic() > deadline:
            raise RankError(f"Rank {rank} of {size} waited {_PATIENCE} s for rank {min(waited_for)} to start.")
        time.sleep(0.02)
    return _dist.PrefixStore(mine, store)  # type: ignore[attr-defined]


def _read(store: Any, name: str) -> str:
    return str(store.get(name).decode()) if store.check([name]) else ""


def _leave() -> None:
    if _dist.is_initialized():
        _dist.destroy_process_group()
