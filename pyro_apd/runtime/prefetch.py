# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Batches made ready in a thread while the chain steps, and sent to its device.

One thread makes them one by one, in the order in which they were asked for, so that nothing about them depends on how
far ahead it is. What is random about a batch is settled before it is asked for.
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

#: Names of the threads begin with it.
THREAD_NAME = "pyro_apd-prefetch"


class Worker:
    """A thread that does what it is asked for, one thing after the other; there is none before it is asked.

    It ends with :meth:`close`, and when nobody holds the worker any longer.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Asks for ``call(*args)``."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, THREAD_NAME)
        return self._executor.submit(call, *args)

    def settle(self) -> None:
        """Waits until all that was asked for is done. Whoever reads by himself does so after this, to be alone."""
        if self._executor is not None:
            self._executor.submit(int).result()

    def close(self) -> None:
        """Ends the thread: what it is at is finished, what else was asked for is not. It may be asked again."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)


class Ahead(Generic[T]):
    """A short queue of what a worker was asked for.

    Each entry has a note, such as where the source stood before it: what is taken is known, not what is under way.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._asked: deque[tuple[Sequence[Any], Future[list[_Outcome]]]] = deque()
        self._done: deque[tuple[Any, _Outcome]] = deque()
        self._num_asked = 0

    def __len__(self) -> int:
        return self._num_asked + len(self._done)

    @property
    def note(self) -> Any:
        """The note of the entry that :meth:`take` would take."""
        return self._done[0][0] if self._done else self._asked[0][0][0]

    def ask(self, call: Callable[..., T], arguments: Sequence[tuple[Any, ...]], notes: Sequence[Any]) -> None:
        """Asks for ``call`` on each of ``arguments``, as the last entries.

        They are handed over together, which costs as much as handing over one.

        :param notes: one for each.
        """
        self._asked.append((notes, self._worker.submit(_outcomes, call, arguments)))
        self._num_asked += len(notes)

    def take(self) -> T:
        """The first entry, once it is there.

        :raises: what the call raised, or one before it that was asked for together with it.
        """
        if not self._done:
            notes, future = self._asked[0]
            outcomes = future.result()
            self._asked.popleft()
            self._num_asked -= len(notes)
            self._done.extend(zip(notes, outcomes, strict=True))
        _, (is_good, value) = self._done.popleft()
        if not is_good:
            raise value
        result: T = value
        return result

    def drop(self) -> None:
        """Forgets all entries, and waits for those under way."""
        for _, future in self._asked:
            future.cancel()
        if self._asked:
            self._worker.settle()
        self._asked.clear()
        self._done.clear()
        self._num_asked = 0


#: Whether a call succeeded, and its result or error.
_Outcome = tuple[bool, Any]


def _outcomes(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[_Outcome]:
    """In the thread. What comes after a call that failed is not tried."""
    outcomes: list[_Outcome] = []
    for values in arguments:
        try:
            outcomes.append((True, call(*values)))
        except Exception as error:
            return outcomes + [(False, error)] * (len(arguments) - len(outcomes))
    return outcomes


@dataclass(frozen=True)
class Sent:
    """Tensors on their way to a device.

    :ivar tensors: as the device will have them.
    :ivar arrival: a CUDA event after the copies; None where there is nothing to wait for.
    """

    tensors: tuple[Tensor, ...]
    arrival: Any = None

    def received(self) -> tuple[Tensor, ...]:
        """The tensors, for work that the calling thread gives the device from here on; the host does not wait."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.arrival)
            for tensor in self.tensors:
                tensor.record_stream(stream)
        return self.tensors


class Sender:
    """Sends batches to a device: from pinned memory, on a stream of its own, so that copies and steps overlap.

    :param device: None leaves tensors where they are.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self._stream: Any = None

    def send(self, tensors: Sequence[Tensor]) -> Sent:
        """Starts the copies, and returns without waiting for them."""
        if self.device is None or all(tensor.device == self.device for tensor in tensors):
            return Sent(tuple(tensors))
        if self.device.type != "cuda":
            return Sent(tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors))
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            copies = tuple(_pinned(tensor).to(self.device, non_blocking=True) for tensor in tensors)
            return Sent(copies, self._stream.record_event())


def _pinned(tensor: Tensor) -> Tensor:
    # torch's allocator of pinned memory gives none of it away before copies from it have ended.
    return tensor.pin_memory() if tensor.device.type == "cpu" and not tensor.is_pinned() else tensor
