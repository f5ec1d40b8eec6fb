# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Restores the global state of Pyro and torch, also after an error."""

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
    """Context that removes, at its end, the entries that a model has added to Pyro's param store inside.

    Calling a :class:`~pyro.nn.PyroModule` that has an :class:`~torch.nn.Parameter` adds one.
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
    """Context in which torch's global generators are seeded; restored at its end. No effect where ``seed`` is None.

    :param device: whose generator is seeded beside that of the CPU.
    """
    if seed is None:
        yield
        return
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def other_random_states() -> tuple[Any, ...]:
    """The states of the global generators of Python and NumPy, for comparison."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - only read
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest)
