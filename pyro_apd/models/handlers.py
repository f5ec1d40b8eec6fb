# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Refuses what two threads would get wrong together in Pyro's handlers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyro.poutine.runtime import am_i_wrapped

from pyro_apd.errors import ModelError
from pyro_apd.runtime.threads import MODELS, one_thread


@contextmanager
def part_of_model() -> Iterator[None]:
    """As :func:`~pyro_apd.runtime.threads.one_thread`, for code of a model, around which there may be handlers already.

    :raises ModelError: if so, and another thread runs a model: handlers of both would see both models.
    """
    other = MODELS.other_owner
    if other is not None and am_i_wrapped():
        raise ModelError(
            f"Thread '{threading.current_thread().name}' runs a model while thread '{other}' does. Pyro's handlers "
            "belong to the process, so that each would see the other's sites. pyro_apd.Predictive waits for its turn, "
            "and DistilledPosterior.ensemble needs no handlers; around code of Pyro, hold a threading.Lock of your own."
        )
    with one_thread():
        yield
