# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Leaves the global state of Pyro and torch as it was, also after an error and beside other threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pyro
import torch

from pyro_apd.runtime.random_stream import RandomStream
from pyro_apd.runtime.threads import one_thread


@contextmanager
def preserved_param_store() -> Iterator[None]:
    """Context for running a model: no other thread runs one, and at its end, entries of Pyro's param store that the
    model has added inside are removed.

    Calling a :class:`~pyro.nn.PyroModule` that has an :class:`~torch.nn.Parameter` adds one. The stack of handlers
    belongs to the process, too: enter this context before any handler.
    """
    with one_thread(), new_params_removed():
        yield


@contextmanager
def new_params_removed() -> Iterator[None]:
    """The part of :func:`preserved_param_store` that concerns the param store; for use in a
    :class:`~pyro_apd.runtime.threads.LongTask`, which holds the lock."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        for name in set(store.keys()) - before:
            del store[name]


@contextmanager
def validation(is_enabled: bool) -> Iterator[None]:
    """Context with Pyro's validation of distributions and values on or off, for all threads."""
    with pyro.validation_enabled(is_enabled):
        yield


def seeded(seed: int | None, device: torch.device | str = "cpu") -> AbstractContextManager[object]:
    """Context in which this thread draws from torch generators of its own; no effect where ``seed`` is None.

    The numbers are those that torch's global generators give after :func:`torch.manual_seed`. These generators, and
    what other threads draw from them, are left alone.

    :param device: whose generator is seeded beside that of the CPU.
    """
    return nullcontext() if seed is None else RandomStream(seed, device)


@contextmanager
def gradients(what: str) -> Iterator[None]:
    """Context in which gradients are computed, and in the dtypes that tensors have, whatever the caller's context is.

    ``torch.no_grad()`` and ``torch.autocast()`` around make no difference.

    :param str what: what needs the gradients, for the error.
    :raises ValueError: in ``torch.inference_mode()``, whose tensors can have no gradients.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what} computes gradients, which torch.inference_mode() rules out; call it outside, or under "
            "torch.no_grad() instead."
        )
    with torch.enable_grad(), without_autocast():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context in which operations compute in the dtypes that tensors have, also within ``torch.autocast()``."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def other_random_states() -> tuple[Any, ...]:
    """The states of the global generators of Python and NumPy, for comparison."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - only read
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest)
