# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One line that says what a task of several seconds is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def unseen(stage: str) -> None:
    """In place of :func:`stages` where nothing is shown."""


@contextmanager
def stages(title: str, is_shown: bool) -> Iterator[Callable[[str], None]]:
    """A function that replaces what the line says, followed by the time since the start; ``done`` in the end."""
    with tqdm(desc=f"{title}: start", bar_format="{desc} [{elapsed}]", disable=not is_shown) as line:
        yield lambda stage: line.set_description_str(f"{title}: {stage}")
        line.set_description_str(f"{title}: done")
