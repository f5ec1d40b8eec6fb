# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is about to take long is said before: in the log, and where a progress bar listens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("pyro_apd")
_LISTENERS: list[Callable[[str], None]] = []


def announce(text: str) -> None:
    """Logs a text without a full stop, and gives it to the listener that came last."""
    _LOG.info("%s.", text)
    if _LISTENERS:
        _LISTENERS[-1](text)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Context in which a function is given what is announced."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)
