# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Ctrl-C at a moment when Python would lose it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Delays a SIGINT to the end of the block.

    A fork runs callbacks before and after it, among them one that releases the lock of :mod:`logging`. Python drops an
    exception in such a callback: an interrupt is then lost, and the lock is held for as long as the process lives.
    Outside the main thread, and where SIGINT has no handler in Python, this does nothing.

    :raises KeyboardInterrupt: at the end of the block, or whatever else the handler of SIGINT does.

    Example::

        with deferred_interrupt():
            process.start()
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])
