# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One thread at a time where state belongs to the process: Pyro's handlers, its param store, its validation flags.

A model that runs in two threads at once answers wrong, or fails, since each run sees the handlers of the other. So
whatever runs a model takes the lock of this module. What needs no handlers takes none, and runs in parallel: draws of
a posterior, an ensemble of networks.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from pyro.poutine.runtime import am_i_wrapped

_LOG = logging.getLogger("pyro_apd")

# A thread that waits this long, in seconds, says so once.
_PATIENCE = 5.0


class ProcessLock:
    """A re-entrant lock that threads get in the order in which they ask for it.

    A child that is forked while another thread holds it finds it free. The thread that forks goes on in the child;
    what it holds, it holds there.

    :param str what: what it is for, for the log.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._owner: int | None = None
        self._owner_name = ""
        self.depth = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    @property
    def is_wanted(self) -> bool:
        """Whether a thread waits for it."""
        return len(self._waiting) > 0

    @property
    def other_owner(self) -> str | None:
        """Name of the thread that holds it; None where that is this thread, or none."""
        owner, name = self._owner, self._owner_name
        return None if owner in (None, threading.get_ident()) else name

    def acquire(self) -> None:
        """Waits until no other thread holds the lock; after a few seconds a log entry names the one that does."""
        thread = threading.get_ident()
        with self._changed:
            if self._owner != thread:
                self._waiting.append(thread)
                try:
                    if not self._changed.wait_for(self._is_next, _PATIENCE):
                        _LOG.warning("Waiting for thread '%s': %s.", self._owner_name, self._what)
                        self._changed.wait_for(self._is_next)
                    self._owner, self._owner_name = thread, threading.current_thread().name
                finally:
                    self._waiting.remove(thread)
                    self._changed.notify_all()
            self.depth += 1

    def release(self) -> None:
        """Undoes one :meth:`acquire` of this thread."""
        with self._changed:
            self.depth -= 1
            if not self.depth:
                self._owner = None
                self._changed.notify_all()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _is_next(self) -> bool:
        return self._owner is None and self._waiting[0] == threading.get_ident()

    def _after_fork(self) -> None:
        self._changed, self._waiting = threading.Condition(), deque()
        if self._owner != threading.get_ident():
            self._owner, self.depth = None, 0


#: Whoever runs a model holds it.
MODELS = ProcessLock(
    "models run in one thread at a time, since Pyro's handlers belong to the process. Draws of a DistilledPosterior "
    "and calls of its ensemble do not wait, and processes run side by side"
)
_RUNS = ProcessLock("one thread at a time runs chains; processes run side by side")
#: What the task of this thread holds, while it holds the lock for models.
_TASK: list[LongTask] = []


@contextmanager
def one_thread() -> Iterator[None]:
    """Context, or decorator, in which no other thread runs models; may be nested."""
    with MODELS:
        yield


class LongTask:
    """Context of a run of chains: alone among runs, and alone with Pyro except where it lets others have a turn.

    :param contexts: make what it enters while it is alone, such as handlers; left while others have their turn.
    """

    def __init__(self, *contexts: Callable[[], AbstractContextManager[object]]) -> None:
        self._contexts = contexts
        self._stack = ExitStack()
        self._process = os.getpid()
        self._is_outermost = False

    def __enter__(self) -> LongTask:
        _RUNS.acquire()
        try:
            self.resume()
        except BaseException:
            _RUNS.release()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._stack.__exit__(*error)
        finally:
            _RUNS.release()

    def resume(self) -> None:
        """Waits for its turn, and enters the contexts."""
        with ExitStack() as stack:
            stack.enter_context(MODELS)
            # Handlers around the task would stay on the stack, where other threads would meet them.
            self._is_outermost = MODELS.depth == 1 and not am_i_wrapped()
            _TASK.append(self)
            stack.callback(_TASK.remove, self)
            for make in self._contexts:
                stack.enter_context(make())
            self._stack = stack.pop_all()

    def pause(self) -> None:
        """Leaves the contexts, and lets others have their turn."""
        self._stack.close()

    @property
    def is_pausable(self) -> bool:
        """Whether nothing that belongs to the process would stay behind, and this is not a forked process."""
        return self._is_outermost and self._process == os.getpid()


def give_way() -> None:
    """Between steps of a :class:`LongTask`: other threads that wait to run a model do so now."""
    task = _TASK[-1] if MODELS.is_wanted and _TASK else None
    if task is not None and task.is_pausable:
        task.pause()
        task.resume()
