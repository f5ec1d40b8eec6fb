# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Locks that another thread holds."""

import threading
import time
from contextlib import contextmanager

from pyro_apd.runtime.threads import MODELS


@contextmanager
def held_elsewhere(lock=MODELS):
    """Context in which a thread named "holder" has the lock."""
    has, end = threading.Event(), threading.Event()

    def hold():
        with lock:
            has.set()
            end.wait(30)

    thread = threading.Thread(target=hold, name="holder")
    thread.start()
    has.wait(30)
    try:
        yield
    finally:
        end.set()
        thread.join()


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    assert condition()
