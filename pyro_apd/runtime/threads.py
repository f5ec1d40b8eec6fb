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
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("pyro_apd")

# A thread that waits this long, in seconds, says so once: a run of chains in another thread may take hours.
_PATIENCE = 5.0


class ProcessLock:
    """A re-entrant lock for the whole process, which a child that is forked while another thread holds it finds free.

    The thread that forks goes on in the child; what it holds, it holds there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def acquire(self) -> None:
        """Waits until no other thread holds the lock; after a few seconds a log entry names the one that does."""
        if not self._lock.acquire(timeout=_PATIENCE):
            owner = self._owner
            _LOG.warning(
                "Waiting for thread '%s': models run in one thread at a time, since Pyro's handlers belong to the "
                "process. DistilledPosterior.get_samples and .ensemble do not wait; processes run side by side.",
                "unknown" if owner is None else owner.name,
            )
            self._lock.acquire()
        self._owner = threading.current_thread()
        self._depth += 1

    def release(self) -> None:
        """Undoes one :meth:`acquire` of this thread."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    def after_fork(self) -> None:
        """In the child: free, unless the thread that forked holds it."""
        if self._owner is not threading.current_thread():
            self.__init__()  # type: ignore[misc]


#: For whatever runs a model, or changes Pyro's global state.
PYRO = ProcessLock()
os.register_at_fork(after_in_child=PYRO.after_fork)


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which no other thread runs models. May be nested."""
    PYRO.acquire()
    try:
        yield
    finally:
        PYRO.release()
