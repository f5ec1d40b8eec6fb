# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Atomic writes: a file is written as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str], previous: Path | None = None) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to. At the end of the block the file there replaces ``path``.

    The file is durable on return: file and folder are synced. On any failure, Ctrl-C included, the temporary file is
    removed, and an existing file at ``path`` stays. A process that is killed leaves at most a temporary file, see
    :func:`remove_leftovers`.

    :param path: the file to write.
    :param previous: where an existing file at ``path`` is moved to; by default it is replaced.
    :raises FileNotFoundError: if the folder does not exist.
    :raises OSError: if the file cannot be written; the message says which file is unchanged.

    Example::

        with atomic_write("table.json") as temporary:
            temporary.write_text(text)
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write '{path}': there is no folder '{path.parent}'.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        intact = [file for file in (path, previous) if file is not None and file.exists()]
        kept = f"'{intact[0]}' is as it was before." if intact else "Nothing was written."
        message = f"Cannot write '{path}': {error.strerror or error}. {kept}"
        # With an error number Python chooses the subclass, such as PermissionError.
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files that killed processes left when they wrote ``path``."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


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
