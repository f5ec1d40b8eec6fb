# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The processes of one job, as ``torchrun`` starts them, and the collective operations among them.

Everything here uses :mod:`torch.distributed`. A process group that the user initialised is used as it is. Otherwise
the first call of :func:`join_process_group` makes one: gloo, and NCCL for tensors on a GPU.
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

# Attributes are looked up when they are used: a build of torch may lack them.
_dist = torch.distributed
# Seconds that processes wait for each other at the start.
_START_TIMEOUT = 600
# Words in torch's error messages when another process has ended.
_LOST_PROCESS_WORDS = ("gloo", "nccl", "connection", "peer", "timed out", "timeout")


class RankError(RuntimeError):
    """Another process of the job has ended, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes; by default one process alone.

    The collective methods have to be called by all processes, in the same order.

    :ivar int rank: number of this process.
    :ivar int size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def shard(self, count: int, rank: int | None = None) -> range:
        """The contiguous shard of ``count`` items that belongs to one process; shard sizes differ by at most one.

        :param int rank: the process; by default this one.
        """
        rank = self.rank if rank is None else rank
        quotient, remainder = divmod(count, self.size)
        start = rank * quotient + min(rank, remainder)
        return range(start, start + quotient + (rank < remainder))

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process, in the order of the ranks, on all processes (all-gather).

        :param value: any object that can be pickled.
        :raises RankError: if a process has ended.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.reporting_lost_processes():
            _dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The value of rank 0, on all processes.

        :param value: any object that can be pickled.
        :raises RankError: if a process has ended.
        """
        return self.gathered(value if self.rank == 0 else None)[0]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Checks that named values are equal on all processes.

        :raises ValueError: on all processes, naming the first value that differs.
        """
        by_rank = self.gathered(dict(values))
        for name, value in by_rank[0].items():
            for rank, others in enumerate(by_rank):
                if others[name] != value:
                    raise ValueError(
                        f"Processes disagree about {name}: rank 0 has {value!r}, rank {rank} {others[name]!r}. Pass "
                        "the same value on all of them; each chain gets its own random numbers by its number in the "
                        "run."
                    )

    def broadcast(self, values: Tensor, source: int = 0) -> None:
        """Replaces ``values`` on all processes by those of rank ``source``, in place.

        :param values: of the same shape and dtype on all processes.
        :raises RankError: if a process has ended.
        """
        if self.size == 1 or values.numel() == 0:
            return
        staged, as_bytes = self._staged(values)
        with self.reporting_lost_processes():
            _dist.broadcast(as_bytes, source)
        if self.rank != source:
            values.copy_(staged)

    def send_to_first(self, values: Tensor, source: int) -> None:
        """Replaces ``values`` on rank 0 by those of rank ``source``, in place.

        :param values: of the same shape and dtype on both processes; ignored on the others.
        :raises RankError: if a process has ended.
        """
        if self.size == 1 or source == 0 or self.rank not in (0, source) or values.numel() == 0:
            return
        staged, as_bytes = self._staged(values)
        with self.reporting_lost_processes():
            if self.rank == source:
                _dist.send(as_bytes, 0)
                return
            _dist.recv(as_bytes, source)
        values.copy_(staged)

    def all_reduce_sum(self, values: Tensor) -> None:
        """Replaces ``values`` by their sum over all processes, in place; the result is the same bit for bit on all.

        :raises RankError: if a process has ended.
        """
        if self.size > 1:
            with self.reporting_lost_processes():
                _dist.all_reduce(values)

    def barrier(self) -> None:
        """Waits until all processes have called it.

        :raises RankError: if a process has ended.
        """
        self.gathered(None)

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over all processes, with the parameters and buffers of rank 0 to begin
        with."""
        if self.size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        for value in module.state_dict().values():  # by ourselves, since not every backend takes every dtype
            self.broadcast(value, 0)
        with self.reporting_lost_processes():
            return nn.parallel.DistributedDataParallel(module, init_sync=False, forward_sync_buffers=False)

    def _staged(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """A contiguous copy on the device of the backend, and its bytes: every backend takes bytes, of any dtype."""
        is_gpu_only = _dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if is_gpu_only else torch.device("cpu")
        staged = values.contiguous().to(device)
        return staged, staged.view(-1).view(torch.uint8)

    @contextmanager
    def reporting_lost_processes(self) -> Iterator[None]:
        """Turns torch's error about another process that has ended into a RankError.

        :raises RankError: in place of such an error; other errors are raised unchanged.
        """
        try:
            yield
        except RuntimeError as error:  # the type and text that torch raises differ by backend
            if self.size == 1 or not any(word in str(error).lower() for word in _LOST_PROCESS_WORDS):
                raise
            raise RankError(
                f"Rank {self.rank} of {self.size}: another process of the job has ended, or had no answer within the "
                f"process group's timeout ({str(error).split('. ')[0]}). The process that ended first reports the "
                "cause. With checkpoint= the same call resumes from the last checkpoint, automatically under "
                "torchrun --max-restarts=1."
            ) from error


def join_process_group() -> Ranks:
    """The rank of this process and the number of processes of the job; a single process where there is no job.

    Unless there is a process group, one is made from the environment variables that ``torchrun`` sets. It is kept until
    the process ends: torch cannot make another from the same environment.

    :raises RankError: if another process has ended.
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
            store = _store_of_attempt(store, rank, size)
            _dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        else:
            _dist.init_process_group(backend)
        atexit.register(_leave)
        # Without torchrun's own store, rank 0 keeps it. If rank 0 ended by an error while others still connect, they
        # would report a lost connection in place of that error.
        Ranks(_dist.get_rank(), _dist.get_world_size()).barrier()
    return Ranks(_dist.get_rank(), _dist.get_world_size())


def _store_of_attempt(store: Any, rank: int, size: int) -> Any:
    """A prefix of ``torchrun``'s store that no earlier attempt at the job has written to.

    The store survives a restart, and with it the addresses of processes that have ended. Processes that start early
    would try to connect to those (seen with torch 2.13; see also pytorch issue 135712). So rank 0 draws a name for this
    attempt. A process accepts it after a handshake of random numbers, which proves that the other one is alive.

    :raises RankError: if a process does not start.
    """
    nonce = os.urandom(8).hex()
    deadline = time.monotonic() + _START_TIMEOUT
    missing = set(range(1, size)) if rank == 0 else {0}
    if rank == 0:
        store.set("pyro_apd/offer", nonce)
    while missing:
        for other in list(missing):
            if rank == 0:
                echo = _read(store, f"pyro_apd/echo{other}")
                if echo.startswith(nonce):
                    store.set(f"pyro_apd/go{other}", echo)
                    missing.discard(other)
                continue
            offer = _read(store, "pyro_apd/offer")
            store.set(f"pyro_apd/echo{rank}", f"{offer}/{nonce}")
            if _read(store, f"pyro_apd/go{rank}") == f"{offer}/{nonce}":
                return _dist.PrefixStore(offer, store)  # type: ignore[attr-defined]
        if time.monotonic() > deadline:
            raise RankError(f"Rank {rank} of {size} waited {_START_TIMEOUT} s for rank {min(missing)} to start.")
        time.sleep(0.02)
    return _dist.PrefixStore(nonce, store)  # type: ignore[attr-defined]


def _read(store: Any, name: str) -> str:
    return str(store.get(name).decode()) if store.check([name]) else ""


def _leave() -> None:
    if _dist.is_initialized():
        _dist.destroy_process_group()
