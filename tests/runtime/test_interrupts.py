# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import os
import signal
import threading

import pytest

from pyro_apd.runtime.interrupts import deferred_interrupt


@pytest.fixture(autouse=True)
def _python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block():
    steps = []

    def interrupted():
        with deferred_interrupt():
            interrupt()
            steps.append("after")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == ["after"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_happens():
    with deferred_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_is_restored_after_an_error():
    with pytest.raises(OSError, match="no process"), deferred_interrupt():
        raise OSError("no process")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_user_is_called_once():
    numbers = []
    signal.signal(signal.SIGINT, lambda number, frame: numbers.append(number))
    with deferred_interrupt():
        interrupt()
        interrupt()
        assert numbers == []
    assert numbers == [signal.SIGINT]


def test_ignored_interrupts_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_interrupt():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_leave_handlers_alone():
    failures = []

    def work():
        try:
            with deferred_interrupt():
                pass
        except ValueError as error:  # signal.signal refuses other threads
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
