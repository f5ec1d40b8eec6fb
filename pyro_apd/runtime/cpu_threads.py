# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Small computations on one thread of the CPU.

Threads wait for each other at every operation. Where other programs use the cores, each wait may last until the system
gives the last thread its turn, some milliseconds, and a step of 0.1 ms with many operations takes 20 to 50 times as
long. ``python -m benchmarks.threads_of_steps`` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Seconds of a step, on one thread, up to which further threads cost more than they can give.
SMALL_SECONDS = 3e-3
#: The same where torch has two threads: they save half at most, and on busy cores steps of 7 ms took 20 times as long.
SMALL_SECONDS_OF_TWO = 30e-3


def threads_for(seconds: float, device: torch.device) -> int | None:
    """Threads for steps that take so long on one: 1, or None for as many as torch is set to.

    :param seconds: an estimate. It should not be a measured time: results with other threads differ by rounding, and a
        seed would not give the same again.
    :param device: where the tensors are; other devices than a CPU are left alone.
    """
    limit = SMALL_SECONDS if torch.get_num_threads() > 2 else SMALL_SECONDS_OF_TWO
    return 1 if device.type == "cpu" and seconds <= limit else None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Context, or decorator, in which torch computes with ``count`` threads in this thread; None changes nothing.

    Restored afterwards, also after an error or Ctrl-C. May be nested.

    Example::

        with cpu_threads(1):
            small @ small
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
