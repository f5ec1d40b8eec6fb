# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Leaves Pyro's and torch's global state as it was found, also after an error."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch


@contextmanager
def preserved_param_store() -> Iterator[None]:
    """Removes the entries that a model run inside adds to Pyro's param store.

    Merely calling a :class:`~pyro.nn.PyroModule` with an :class:`~torch.nn.Parameter` adds one.
    """
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        for name in set(store.keys()) - before:
            del store[name]


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Global torch generators seeded inside and restored after; untouched where ``seed`` is None."""
    if seed is None:
        yield
        return
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def other_random_states() -> tuple[Any, ...]:
    """The states of Python's and numpy's global generators, to be compared."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - only looked at
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest)
