# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One writer at a time: a lock beside a file or a folder, which ends with the process that holds it."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_apd.runtime.files import is_running, machine

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Locks of this process by path: the system's locks are of processes, and would let its threads pass.
_held: set[str] = set()
_guard = threading.Lock()


@contextmanager
def locked(path: Path, refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Context in which no other process, and no other thread, is in this context for ``path``.

    The lock is the system's on a file ``.NAME.pyro_apd.lock`` beside ``path``, which is removed at the end. It ends
    when its process ends, however that is; processes that are forked from it do not hold it. Where the system or the
    file system has no locks, the number of the process in the file takes their place. In a folder in which no file can
    be made there is no lock, and nothing to be protected.

    :param path: a file or a folder, which need not exist; its parent folder must.
    :param refusal: makes the error from a description of the holder, such as ``"process 71 on host"``.
    :raises Exception: what ``refusal`` made, if the lock is held.
    """
    file_path = path.with_name(f".{path.name}.pyro_apd.lock")
    key = os.path.realpath(file_path)
    with _guard:
        if key in _held:
            raise refusal(f"this process, {os.getpid()}, in another thread or call")
        _held.add(key)
    try:
        file = _taken(file_path, refusal)
        try:
            yield
        finally:
            if file is not None:
                # Before the lock ends, so that no other process's file is removed.
                with suppress(OSError):
                    os.unlink(file_path)
                os.close(file)
    finally:
        with _guard:
            _held.discard(key)


def _taken(path: Path, refusal: Callable[[str], Exception]) -> int | None:
    """The open file whose lock is held; None where no file can be made."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            if not _is_free(file):
                raise refusal(_holder(_contents(file)))
            # The holder before may have removed the file since it was opened here.
            if _is_at(file, path):
                note = {"process": os.getpid(), "machine": machine(), "host": platform.node()}
                with suppress(OSError):  # on a full disk the lock holds without a note
                    os.ftruncate(file, 0)
                    os.write(file, json.dumps(note).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_free(file: int) -> bool:
    """Whether the lock was not held; it is held by this process from now on."""
    if fcntl is not None:
        try:
            # Of the process, so that the workers that it forks, and that may outlive it, do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
    note = _contents(file)
    process = note.get("process")
    if note.get("machine") != machine() or not isinstance(process, int):
        return True
    return process == os.getpid() or not is_running(process)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _contents(file: int) -> dict[str, Any]:
    """The note of the holder; empty where there is none."""
    try:
        note = json.loads(os.pread(file, 1000, 0))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _holder(note: dict[str, Any]) -> str:
    """A description of the holder."""
    if "process" not in note:
        return "another process"
    return f"process {note['process']} on '{note.get('host')}'"
