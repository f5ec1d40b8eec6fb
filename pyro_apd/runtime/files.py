# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Atomic writes: a file is written as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# Temporary files of other machines, whose processes cannot be seen from here, count as left over after a day.
_MAX_AGE = 24 * 3600.0

# Names of the temporary files that this process is writing.
_ACTIVE: set[str] = set()


@contextmanager
def atomic_write(path: str | os.PathLike[str], previous: Path | None = None) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to. At the end of the block the file there replaces ``path``.

    The file is durable on return: file and folder are synced. On any failure, Ctrl-C included, the temporary file is
    removed, and an existing file at ``path`` stays. A process that is killed leaves at most a temporary file, which the
    next write to ``path`` removes.

    :param path: the file to write.
    :param previous: where an existing file at ``path`` is kept; there is a file at ``path`` at every moment. By default
        it is replaced.
    :raises FileNotFoundError: if the folder does not exist.
    :raises OSError: if the file cannot be written; the message says which file is unchanged.

    Example::

        with atomic_write("table.json") as temporary:
            temporary.write_text(text)
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write '{path}': there is no folder '{path.parent}'. Make it, or give another path."
        )
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write '{path}': it is a folder. Give the path of a file.")
    if path.exists() and not path.is_file():
        raise OSError(f"Cannot write '{path}': it is a pipe or a device, which would be replaced. Give another path.")
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # the file is replaced, and the link stays
    remove_leftovers(path)
    temporary = _temporary(path)
    _ACTIVE.add(temporary.name)
    try:
        yield temporary
        _sync(temporary)
        if previous is not None and path.exists():
            duplicate(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        intact = [file for file in (path, previous) if file is not None and file.exists()]
        kept = f"'{intact[0]}' is as it was before." if intact else "Nothing was written."
        raise with_message(error, f"Cannot write '{path}': {error.strerror or error}. {kept}") from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()
        _ACTIVE.discard(temporary.name)
    _sync_folder(path.parent)


def duplicate(source: Path, target: Path) -> None:
    """Makes ``target`` a file with the contents of ``source``, and replaces one that is there, at one moment.

    :raises OSError: if that is not possible; ``target`` is as it was.
    """
    remove_leftovers(target)
    temporary = _temporary(target)
    _ACTIVE.add(temporary.name)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)
            _sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # still there where both are one file
        _ACTIVE.discard(temporary.name)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def with_message(error: OSError, message: str) -> OSError:
    """An error of the same type with another message."""
    # With an error number Python chooses the type, such as PermissionError.
    return type(error)(message) if error.errno is None else OSError(error.errno, message)


def check_regular(path: Path) -> os.stat_result:
    """The status of a file. Reading a pipe, a device or a folder would wait, or fail, in another way each.

    :raises FileNotFoundError: if there is none.
    :raises ValueError: if it is no regular file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{path} is {kind}, not a file.")
    return status


def remove_leftovers(path: Path) -> None:
    """Removes temporary files that killed processes left when they wrote ``path``.

    Those of processes that still run stay. Of processes on other machines, or in other containers, nothing is known;
    their files are removed when they are a day old.
    """
    of_path = re.compile(
        re.escape(f".{path.name}.") + r"(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}\.tmp"
    )
    with suppress(OSError):  # what cannot be listed or removed is in nobody's way
        for entry in os.scandir(path.parent):
            found = of_path.fullmatch(entry.name)
            if found is None or entry.name in _ACTIVE:
                continue
            process = int(found["process"])
            if found["machine"] != machine():
                is_left = time.time() - entry.stat().st_mtime > _MAX_AGE
            else:
                is_left = process == os.getpid() or not is_running(process)
            if is_left:
                Path(entry.path).unlink(missing_ok=True)


@cache
def machine() -> str:
    """Eight hexadecimal digits for this machine, or this container: within them process numbers are unique."""
    name = platform.node()
    with suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def is_running(process: int) -> bool:
    """Whether a process with this number runs on this machine; True where that cannot be found out."""
    if os.name != "posix":  # elsewhere os.kill ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(path: Path) -> None:
    """Makes the contents of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, on systems where folders can be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
