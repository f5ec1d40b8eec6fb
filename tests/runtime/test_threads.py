# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import logging
import re
import threading
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped

import pyro_apd as apd
from pyro_apd.runtime import threads
from pyro_apd.runtime.global_state import new_params_removed, validation
from pyro_apd.runtime.threads import LongTask, ProcessLock, give_way, one_thread
from tests.support.processes import on_ranks
from tests.support.threads import held_elsewhere, wait_until

PACKAGE = Path(apd.__file__).parent


def in_thread(function):
    """What ``function`` returns in another thread, or the error that it raises there."""
    results = []

    def work():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join(30)
    return results[0]


def test_threads_get_it_in_the_order_in_which_they_ask():
    lock, order = ProcessLock("test"), []

    def work(number):
        with lock, lock:
            order.append(number)

    waiting = []
    with lock:
        for number in range(4):
            waiting.append(threading.Thread(target=work, args=(number,)))
            waiting[-1].start()
            wait_until(lambda n=number: len(lock._waiting) == n + 1)
        assert not order
    for thread in waiting:
        thread.join()
    assert order == [0, 1, 2, 3]
    assert not lock.is_wanted


def test_who_waits_long_says_for_whom(monkeypatch, caplog):
    monkeypatch.setattr(threads, "_PATIENCE", 0.01)
    lock = ProcessLock("the reason")
    with caplog.at_level(logging.WARNING, "pyro_apd"), held_elsewhere(lock):
        waiting = threading.Thread(target=lambda: lock.acquire() or lock.release())
        waiting.start()
        wait_until(lambda: caplog.messages)
    waiting.join()
    assert caplog.messages == ["Waiting for thread 'holder': the reason."]


def test_a_forked_process_finds_free_what_another_thread_held(tmp_path):
    lock = ProcessLock("test")

    def take(rank):
        with lock:
            return lock.depth

    with held_elsewhere(lock):
        assert on_ranks(take, 1, tmp_path) == [1]
    with lock:
        assert on_ranks(take, 1, tmp_path) == [2]  # the forking thread goes on in the child


def in_a_turn(function):
    """What ``function`` returns in another thread that has its turn while this one gives way."""
    results = []

    def work():
        with one_thread():
            results.append(function())

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: threads.MODELS.is_wanted)
    give_way()
    given = list(results)
    return thread, given


def state():
    return am_i_wrapped(), dist.is_validation_enabled()


def test_a_task_gives_way_and_leaves_nothing_behind():
    with LongTask(poutine.block, lambda: validation(False)), new_params_removed():
        pyro.param("made", torch.ones(1))
        _, given = in_a_turn(state)
        assert given == [(False, True)]
        assert state() == (True, False)
        assert list(pyro.get_param_store().keys()) == ["made"]
        give_way()  # nobody waits
        assert state() == (True, False)
    assert in_thread(state) == (False, True)
    assert not threads._TASK


@pytest.mark.parametrize("around", [poutine.block, one_thread])
def test_a_task_within_handlers_or_another_keeps_its_turn(around):
    with around(), LongTask():
        thread, given = in_a_turn(state)
        assert given == []
    thread.join(30)
    assert not thread.is_alive()


def test_a_task_that_fails_lets_go():
    with pytest.raises(ZeroDivisionError), LongTask(poutine.block), poutine.block():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), LongTask(poutine.block, lambda: 1 / 0):
        pass
    assert not am_i_wrapped()
    assert in_thread(lambda: LongTask().__enter__().__exit__(None, None, None)) is None


def test_a_second_task_waits_until_the_first_is_over():
    order = []

    def second():
        with LongTask():
            order.append("second")

    with LongTask():
        waiting = threading.Thread(target=second)
        waiting.start()
        wait_until(lambda: threads._RUNS.is_wanted)
        give_way()
        order.append("first")
    waiting.join(30)
    assert order == ["first", "second"]


def sources():
    return {path: path.read_text() for path in PACKAGE.rglob("*.py")}


def test_no_handler_is_entered_before_the_lock_is_held():
    early = re.compile(r"poutine\.block\(\).*(preserved_param_store|LongTask)|^\s*@poutine\.block", re.MULTILINE)
    assert [path for path, text in sources().items() if early.search(text)] == []


def test_nothing_else_seeds_the_global_generators():
    seeding = re.compile(r"fork_rng|torch\.manual_seed\(|set_rng_state|set_rng_seed")
    found = {path.relative_to(PACKAGE).as_posix() for path, text in sources().items() if seeding.search(text)}
    # A worker process has them to itself.
    assert found == {"runtime/random_stream.py", "chains/workers.py"}
