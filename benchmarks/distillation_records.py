# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Stored results of :mod:`benchmarks.distillation`: one file per case, results by seed and method.

What a run has computed is merged into what the file holds at that moment: a run of some methods or seeds leaves all
others as they are, also those that another process stores meanwhile. Each result has its date and commit.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyro_apd.runtime.files import atomic_write

# Results that a chain alone determines.
OF_CHAIN = ("held-out SGLD", "other draws")
# Metrics of one chain on machines that round differently.
_SAME = 1e-3


class Records:
    """Results by seed and method, and the file that they are merged into.

    :param path: the file; None where nothing is to be stored.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.by_seed: dict[str, dict[str, Any]] = _read(path)
        self._when = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": _commit()}

    def of(self, seed: int) -> dict[str, Any]:
        """All results of a seed."""
        return self.by_seed.setdefault(str(seed), {})

    def add(self, seed: int, label: str, result: Mapping[str, Any]) -> None:
        """Adds a result or replaces the one of this seed and method, here and in the file.

        :raises ValueError: if the file has results of another chain: they can not be in one table.
        """
        if label in OF_CHAIN and label in self.of(seed):
            self._check_chain(seed, label, result)
            return
        entry = {**result, **self._when}
        self.of(seed)[label] = entry
        if self.path is None:
            return
        with _locked(self.path.parent):
            stored = _read(self.path)
            stored.setdefault(str(seed), {})[label] = entry
            with atomic_write(self.path) as part:
                part.write_text(json.dumps(stored, indent=1) + "\n")

    def _check_chain(self, seed: int, label: str, result: Mapping[str, Any]) -> None:
        stored = self.of(seed)[label]
        for name in ("nll", *(name for name in result if name.startswith("mean_"))):
            value = result[name]
            if name in stored and not math.isclose(value, stored[name], rel_tol=_SAME):
                raise ValueError(
                    f"the stored results of seed {seed} in {self.path} are of another chain: {name} of {label!r} is "
                    f"{stored[name]:.6g} there and {value:.6g} of the chain that is cached. Use the chain of the "
                    "stored results, or move the file away and run all methods on the new chain."
                )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    return found


def _commit() -> str:
    """The commit of the working tree, with a plus if files differ from it; empty outside of a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "../pyro_apd", "*.py"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.strip() + ("+" if changes.strip() else "")
