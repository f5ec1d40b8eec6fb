# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import gc
import threading

import pytest
import torch

from pyro_apd.runtime.prefetch import THREAD_NAME, PrefetchQueue, Sender, Worker


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()
    assert not threads()


def test_things_are_done_one_by_one_in_order_and_in_one_thread(worker):
    done, who = [], set()

    def do(i):
        who.add(threading.current_thread())
        done.append(i)
        return i * i

    queue = PrefetchQueue(worker)
    for i in range(0, 20, 4):
        queue.submit(do, [(j,) for j in range(i, i + 4)], range(i, i + 4))
    assert len(queue) == 20
    assert queue.next_tag == 0
    for i in range(20):
        assert queue.next_tag == i
        assert queue.pop() == i * i
        assert len(queue) == 19 - i
    assert done == list(range(20))
    assert len(who) == 1
    assert threading.current_thread() not in who


def test_no_thread_before_it_is_asked(worker):
    PrefetchQueue(worker).clear()
    worker.wait()
    assert not threads()


def test_errors_come_where_their_result_would(worker):
    queue = PrefetchQueue(worker)
    queue.submit(int, [("1",), ("one",), ("3",)], "abc")
    queue.submit(int, [("4",)], "d")
    assert queue.pop() == 1
    for _ in range(2):  # what was asked for together fails together
        with pytest.raises(ValueError, match=r"invalid literal for int.*'one'"):
            queue.pop()
    assert queue.pop() == 4


def test_what_is_dropped_is_not_done(worker):
    gate, begun, done = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        gate.wait()
        done.append("first")

    queue, other = PrefetchQueue(worker), PrefetchQueue(worker)
    queue.submit(first, [()], [None])
    queue.submit(done.append, [("second",)], [None])
    other.submit(done.append, [("of another",)], [None])
    begun.wait()
    threading.Timer(0.05, gate.set).start()
    queue.clear()
    assert len(queue) == 0
    assert done == ["first", "of another"]


def test_close_ends_the_thread_with_what_it_is_at():
    worker = Worker()
    begun, gate, done = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        gate.wait()
        done.append("slow")

    worker.submit(slow)
    worker.submit(done.append, "never")
    begun.wait()
    threading.Timer(0.05, gate.set).start()
    worker.close()
    worker.close()
    assert done == ["slow"]
    assert not threads()
    assert worker.submit(int).result() == 0
    worker.close()


def test_a_worker_that_is_forgotten_ends():
    worker = Worker()
    worker.submit(int).result()
    (thread,) = threads()
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_sending_to_where_tensors_are_is_nothing():
    x = torch.ones(3)
    for device in (None, torch.device("cpu")):
        sent = Sender(device).send([x])
        assert sent.arrival is None
        assert sent.result()[0] is x


def test_sending_to_another_device():
    (there,) = Sender(torch.device("meta")).send([torch.ones(3)]).result()
    assert there.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sending_to_a_gpu(worker):
    device = torch.device("cuda", torch.cuda.current_device())
    sender, queue = Sender(device), PrefetchQueue(worker)
    batches = [torch.full((1000, 1000), float(i)) for i in range(20)]
    for batch in batches:
        queue.submit(sender.send, [([batch],)], [None])
    for batch in batches:
        sent = queue.pop()
        assert sent.arrival is not None
        assert torch.equal((2 * sent.result()[0]).cpu(), 2 * batch)
