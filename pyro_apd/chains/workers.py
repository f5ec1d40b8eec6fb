# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains in one process each, which write their draws directly into the files of one store.

Each worker reports through its own pipe, so that the death of a worker, whatever the cause, shows as the end of its
pipe and does not block the others. A worker stops when its parent has ended.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
import torch.multiprocessing

from pyro_apd.chains.checkpoint import Progress
from pyro_apd.chains.group import GroupRun, Plan, begin
from pyro_apd.chains.stores.disk import open_store
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.runtime.interrupts import deferred_interrupt
from pyro_apd.runtime.threads import give_way

if TYPE_CHECKING:
    from pyro_apd.kernels.base import StochasticGradientKernel

# Seconds between a worker's reports for the progress bar, and between checks that workers are alive.
_REPORT_EVERY, _LOOK_EVERY = 0.2, 1.0
# Seconds that a worker has to end after it was told to.
_GRACE = 5.0


class WorkerError(RuntimeError):
    """A worker process ended before its chain did.

    :ivar int chain: the chain's number.
    :ivar exitcode: the process's exit code; negative for the signal that killed it.
    """

    def __init__(self, message: str, chain: int, exitcode: int | None) -> None:
        super().__init__(message)
        self.chain, self.exitcode = chain, exitcode


@dataclass(frozen=True)
class Job:
    """What a worker is started with.

    :ivar kernel: a kernel of this package.
    :ivar Plan plan: what the run was asked for.
    :ivar int chain: the worker's chain.
    :ivar Path store_path: the folder of a :class:`~pyro_apd.chains.stores.disk.DiskStore`.
    :ivar Progress progress: how far the chain had come.
    :ivar int seed: of the worker's global generator, for hooks and models that use it.
    :ivar bool is_reporting: whether to report draws for the progress bar.
    :ivar bool validates: whether Pyro validates distributions.
    :ivar dtype: torch's default dtype.
    :ivar int parent: process that started the worker, which ends when the parent has ended.
    """

    kernel: StochasticGradientKernel
    plan: Plan
    chain: int
    store_path: Path
    progress: Progress
    seed: int
    is_reporting: bool
    validates: bool
    dtype: torch.dtype
    parent: int


class _Messenger:
    """A worker's side of the pipe: a :class:`~pyro_apd.chains.group.Listener`."""

    def __init__(self, job: Job, pipe: Connection) -> None:
        self._job, self._pipe, self._reported_at = job, pipe, 0.0

    def send(self, kind: str, content: Any) -> None:
        # Plain pickles: torch's own would pass tensors as file handles that die with this process.
        message = pickle.dumps((kind, content))
        try:
            self._pipe.send_bytes(message)
        except BrokenPipeError:  # the parent has ended, and nothing reads this process's results
            os._exit(1)

    def drew(self, chains: ChainSet, num_done: int, num_diverged: int) -> None:
        if os.getppid() != self._job.parent:
            os._exit(1)
        now = time.monotonic()
        if self._job.is_reporting and (now - self._reported_at > _REPORT_EVERY or num_done == self._job.plan.total):
            self._reported_at = now
            self.send("drew", (num_done, num_diverged, dict(self._job.kernel.logging())))

    def is_due(self, chains: ChainSet, num_done: int) -> bool:
        every = self._job.plan.checkpoint_every
        return every is not None and num_done % every == 0

    def checkpoint(self, chains: ChainSet, progress: Progress) -> None:
        self.send("checkpoint", progress)


def run_workers(
    jobs: list[Job],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: Any,
    on_draw: Callable[[int, int, int, Mapping[str, str]], None],
    on_checkpoint: Callable[[dict[int, Progress]], None],
    finished: dict[int, Progress],
) -> None:
    """Runs every job in a process of its own, to the end.

    :param args: the model's arguments.
    :param context: of :mod:`torch.multiprocessing`, which determines how processes start.
    :param on_draw: called with a chain, its draws so far, its divergences, and what the kernel logs.
    :param on_checkpoint: called with the progress of chains that reached a checkpoint.
    :param finished: receives the progress of each chain at its end, by chain.
    :raises WorkerError: if a process dies, or cannot be started. The others are stopped; draws are in the store.
    """
    workers: dict[int, tuple[Any, Connection]] = {}
    try:
        for job in jobs:
            with deferred_interrupt():  # so that every process that runs is known here
                workers[job.chain] = _start(job, args, kwargs, context, [pipe for _, pipe in workers.values()])
        active = dict(workers)
        while active:
            wait([pipe for _, pipe in active.values()], timeout=_LOOK_EVERY)
            give_way()
            checkpoints: dict[int, Progress] = {}
            try:
                for chain, (process, pipe) in list(active.items()):
                    for kind, content in _messages(chain, process, pipe):
                        if kind == "drew":
                            on_draw(chain, *content)
                        elif kind == "checkpoint":
                            checkpoints[chain] = content
                        elif kind == "error":
                            raise content
                        else:
                            finished[chain] = content
                            del active[chain]
                            break
            finally:  # what was reached before an error is kept
                if checkpoints:
                    on_checkpoint(checkpoints)
        for process, _ in workers.values():
            process.join()
    finally:
        _stop(workers)


def _start(
    job: Job, args: tuple[Any, ...], kwargs: Mapping[str, Any], context: Any, others: list[Connection]
) -> tuple[Any, Connection]:
    """The worker's process and the parent's end of its pipe; ``others`` are the parent's ends of the pipes before."""
    ours, theirs = context.Pipe(duplex=False)
    inherited = [*others, ours] if context.get_start_method() == "fork" else []
    process = context.Process(target=_work, args=(job, theirs, args, dict(kwargs), inherited), daemon=True)
    try:
        process.start()
    except Exception as error:  # pickling may raise anything
        raise WorkerError(
            f"The worker of chain {job.chain} could not be started ({type(error).__name__}: {error}). Where processes "
            "are spawned, kernel, model, data and hook_fn must pickle: define them at the top level of a module. Or "
            "use chain_method='vectorized', which needs no processes.",
            job.chain,
            None,
        ) from error
    # Before the next worker is forked: a copy of this end there would hide this worker's death.
    theirs.close()
    return process, ours


def _messages(chain: int, process: Any, pipe: Connection) -> Any:
    """What a worker has sent so far.

    :raises WorkerError: if its pipe ended before the worker reported its end.
    """
    try:
        while pipe.poll():
            yield pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError, pickle.UnpicklingError):
        process.join(_GRACE)
        code = process.exitcode
        how = f"was killed by signal {-code} ({_signal_name(-code)})" if code is not None and code < 0 else "ended"
        raise WorkerError(
            f"The worker of chain {chain} {how} with exit code {code} before its chain was complete. Signal 9 that "
            "nobody sent means that memory ran out; an early exit code 1 under spawn, that kernel or model do "
            "not unpickle. Draws made so far are in get_samples(). chain_method='vectorized' needs no processes.",
            chain,
            code,
        ) from None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _stop(workers: Mapping[int, tuple[Any, Connection]]) -> None:
    """Terminates running workers. Incomplete draws do not count, so this is safe at any time."""
    for process, _ in workers.values():
        if process.is_alive():
            process.terminate()
    for process, pipe in workers.values():
        process.join(_GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        pipe.close()


def _work(
    job: Job, pipe: Connection, args: tuple[Any, ...], kwargs: Mapping[str, Any], inherited: list[Connection]
) -> None:
    """Runs in a worker process."""
    # While any process has the parent's end of a pipe open, writing to a full pipe waits, even if the parent has ended.
    for end in inherited:
        end.close()
    # An interrupt reaches all processes of a terminal; the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.set_default_dtype(job.dtype)
    pyro.enable_validation(job.validates)
    pyro.set_rng_seed(job.seed % 2**32)
    messenger = _Messenger(job, pipe)
    try:
        with closing(open_store(job.store_path)) as store:
            chain = begin(job.kernel, job.plan, ChainSet(job.chain), args, kwargs)
            GroupRun(job.kernel, chain, job.plan, store, job.progress).run(messenger)
        messenger.send("finished", job.progress)
    except BaseException as error:
        messenger.send("error", _portable(error, job.chain))
    finally:
        pipe.close()


def _portable(error: BaseException, chain: int) -> BaseException:
    """The error, if it survives pickling, with the chain's number; else its text."""
    text = "".join(traceback.format_exception(error))
    try:
        again = pickle.loads(pickle.dumps(error))
        if hasattr(again, "add_note"):
            again.add_note(f"In the worker of chain {chain}:\n{text}")
        return again if isinstance(again, Exception) else WorkerError(f"Chain {chain} failed:\n{text}", chain, None)
    except Exception:  # pickling may raise anything
        return WorkerError(f"Chain {chain} failed:\n{text}", chain, None)
