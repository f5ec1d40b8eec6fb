# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One holder at a time, among processes, threads and calls; and none for longer than its process lives."""

import errno
import json
import os
import signal
import threading

import pytest
import torch.multiprocessing

from pyro_apd.runtime import file_lock
from pyro_apd.runtime.file_lock import locked
from pyro_apd.runtime.files import machine


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.ckpt"


def holding(path):
    return locked(path, lambda holder: RuntimeError(f"held by {holder}"))


def refused(path):
    """What the refusal says; None where the lock was free."""
    try:
        with holding(path):
            return None
    except RuntimeError as error:
        return str(error)


def held_elsewhere(path, then):
    """A child that holds the lock, and calls ``then`` while it does."""
    context = torch.multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child():
        with holding(path):
            theirs.send("held")
            then(theirs)

    process = context.Process(target=child)
    process.start()
    assert ours.recv() == "held"
    return process, ours


def test_it_is_held_once_and_free_again(path):
    for _ in range(2):
        with holding(path):
            assert refused(path) == f"held by this process, {os.getpid()}, in another thread or call"
            assert refused(path.with_name("other")) is None
        assert os.listdir(path.parent) == []


def test_it_is_free_after_an_error(path):
    with pytest.raises(ZeroDivisionError), holding(path):
        raise ZeroDivisionError
    assert refused(path) is None


def test_links_lead_to_the_same_lock(path):
    path.with_name("folder").symlink_to(path.parent)
    with holding(path):
        assert refused(path.parent / "folder" / path.name).startswith("held by this process")


def test_another_thread(path):
    found = []
    with holding(path):
        thread = threading.Thread(target=lambda: found.append(refused(path)))
        thread.start()
        thread.join()
    assert found[0].startswith("held by this process")


def test_another_process_that_ends_or_is_killed(path):
    process, pipe = held_elsewhere(path, lambda pipe: pipe.recv())
    assert refused(path).startswith(f"held by process {process.pid} on ")
    pipe.send("end")
    process.join()
    assert refused(path) is None
    process, _ = held_elsewhere(path, lambda pipe: pipe.recv())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert os.listdir(path.parent) == [".run.ckpt.pyro_apd.lock"]
    assert refused(path) is None
    assert os.listdir(path.parent) == []


def test_a_forked_process_does_not_hold_it(path):
    context = torch.multiprocessing.get_context("fork")
    with holding(path):
        child = context.Process(target=signal.pause)
        child.start()
    assert refused(path) is None
    child.kill()
    child.join()


def test_a_file_that_its_holder_removed_meanwhile_is_not_the_lock(path, monkeypatch):
    real, removed = file_lock._is_free, []

    def racing(file):
        is_free = real(file)
        if not removed:
            removed.append(path.with_name(".run.ckpt.pyro_apd.lock").unlink())
        return is_free

    monkeypatch.setattr(file_lock, "_is_free", racing)
    with holding(path):
        assert os.listdir(path.parent) == [".run.ckpt.pyro_apd.lock"]


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_locks_of_the_system_the_number_of_the_process_counts(path, monkeypatch, missing):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "no locks")

    if missing == "module":
        monkeypatch.setattr(file_lock, "fcntl", None)
    else:
        monkeypatch.setattr(file_lock.fcntl, "lockf", lockf)
    file = path.with_name(".run.ckpt.pyro_apd.lock")
    for note, expected in (
        ({"process": os.getppid(), "machine": machine(), "host": "here"}, "held by process"),
        ({"process": 999_999_999, "machine": machine()}, None),
        ({"process": os.getpid(), "machine": machine()}, None),
        ({"process": os.getppid(), "machine": "another"}, None),
        ({"process": "x", "machine": machine()}, None),
        ([], None),
    ):
        file.write_text(json.dumps(note))
        found = refused(path)
        assert found is None if expected is None else found.startswith(expected)
    assert refused(path) is None


def test_a_note_that_cannot_be_read(path, monkeypatch):
    monkeypatch.setattr(file_lock, "_is_free", lambda file: False)
    path.with_name(".run.ckpt.pyro_apd.lock").write_text("{")
    assert refused(path) == "held by another process"


def test_where_no_file_can_be_made_nothing_is_locked(tmp_path):
    assert refused(tmp_path / "no folder" / "run.ckpt") is None
