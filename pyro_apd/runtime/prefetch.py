# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Batches that a thread prepares while the chain steps, and sends to its device.

One thread prepares them one by one, in the order of the requests, so that no batch depends on how far it reads ahead.
All random choices about a batch are made before it is requested.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Prefix of the threads' names.
THREAD_NAME = "pyro_apd-prefetch"


class Worker:
    """A thread that runs calls one after the other. It is started by the first call.

    It ends with :meth:`close`, or when the worker is garbage collected.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Requests ``call(*args)``."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, THREAD_NAME)
        return self._executor.submit(call, *args)

    def wait(self) -> None:
        """Waits until all requested calls are done. A caller that reads directly does so after this, without a race."""
        if self._executor is not None:
            self._executor.submit(int).result()

    def close(self) -> None:
        """Ends the thread after the present call; later requests are cancelled. New calls start another thread."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)


class PrefetchQueue(Generic[T]):
    """A queue of results that a worker was asked for.

    Each entry has a tag, such as the position of the source before it, so that the position of the entries already
    taken is known, whatever the thread has read since.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._requested: deque[tuple[Sequence[Any], Future[list[_Outcome]]]] = deque()
        self._done: deque[tuple[Any, _Outcome]] = deque()
        self._num_requested = 0

    def __len__(self) -> int:
        return self._num_requested + len(self._done)

    @property
    def next_tag(self) -> Any:
        """The tag of the entry that :meth:`pop` returns next."""
        return self._done[0][0] if self._done else self._requested[0][0][0]

    def submit(self, call: Callable[..., T], arguments: Sequence[tuple[Any, ...]], tags: Sequence[Any]) -> None:
        """Requests ``call`` on each of ``arguments``; the results are appended to the queue.

        They are handed to the thread together, at the cost of one.

        :param tags: one per entry.
        """
        self._requested.append((tags, self._worker.submit(_outcomes, call, arguments)))
        self._num_requested += len(tags)

    def pop(self) -> T:
        """The first result; waits for it.

        :raises: the error of its call, or of an earlier call of the same request.
        """
        if not self._done:
            tags, future = self._requested[0]
            outcomes = future.result()
            self._requested.popleft()
            self._num_requested -= len(tags)
            self._done.extend(zip(tags, outcomes, strict=True))
        _, (succeeded, value) = self._done.popleft()
        if not succeeded:
            raise value
        result: T = value
        return result

    def clear(self) -> None:
        """Removes all entries, and waits for the call that is running."""
        for _, future in self._requested:
            future.cancel()
        if self._requested:
            self._worker.wait()
        self._requested.clear()
        self._done.clear()
        self._num_requested = 0


#: Whether a call succeeded, and its result or error.
_Outcome = tuple[bool, Any]


def _outcomes(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[_Outcome]:
    """Runs the calls, in the thread. Calls after one that failed are not run, and count as failed with its error."""
    outcomes: list[_Outcome] = []
    for values in arguments:
        try:
            outcomes.append((True, call(*values)))
        except Exception as error:
            return outcomes + [(False, error)] * (len(arguments) - len(outcomes))
    return outcomes


@dataclass(frozen=True)
class Transfer:
    """Tensors that are being copied to a device.

    :ivar tensors: on the device.
    :ivar arrival: a CUDA event after the copies; None where there is nothing to wait for.
    """

    tensors: tuple[Tensor, ...]
    arrival: Any = None

    def result(self) -> tuple[Tensor, ...]:
        """The tensors, for kernels that the calling thread launches from here on. The host does not wait."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.arrival)
            for tensor in self.tensors:
                tensor.record_stream(stream)
        return self.tensors


class Sender:
    """Copies batches to a device, from pinned memory and on a separate stream, so that copies and steps overlap.

    :param device: None leaves tensors where they are.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self._stream: Any = None

    def send(self, tensors: Sequence[Tensor]) -> Transfer:
        """Starts the copies, and returns without waiting for them."""
        if self.device is None or all(tensor.device == self.device for tensor in tensors):
            return Transfer(tuple(tensors))
        if self.device.type != "cuda":
            return Transfer(tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors))
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            copies = tuple(_pinned(tensor).to(self.device, non_blocking=True) for tensor in tensors)
            return Transfer(copies, self._stream.record_event())


def _pinned(tensor: Tensor) -> Tensor:
    # torch's allocator of pinned memory reuses none of it before copies from it have ended.
    return tensor.pin_memory() if tensor.device.type == "cpu" and not tensor.is_pinned() else tensor
