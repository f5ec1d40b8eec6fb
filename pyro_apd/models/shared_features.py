# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Features in place of inputs where many draws share them: the fixed part of a network is run once per datum."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from pyro.poutine.messenger import unwrap
from torch import Tensor

from pyro_apd.errors import ModelError
from pyro_apd.models.bnn import BNN
from pyro_apd.models.frozen import fixed_tensors, state_of
from pyro_apd.models.network_inputs import NetworkInputs

logger = logging.getLogger("pyro_apd")

# Rows that the network is run on together, and bytes of features beyond which they are computed batch by batch.
_BATCH, _MAX_BYTES = 256, 2 * 2**30

_SIGNATURE = inspect.signature(BNN.forward)


class _Known:
    """Features of the inputs that a network was last given, as long as these are kept by somebody."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], tuple[Any, Tensor | None]] = {}

    def get(self, bnn: BNN, inputs: NetworkInputs) -> Tensor | None:
        """Features; None where the network has none. They are computed where they are not known."""
        tensors = inputs.tensors()
        key = tuple(id(tensor) for tensor in tensors)
        state = [inputs.form, *(state_of(tensor) for tensor in (*tensors, *fixed_tensors(bnn).values()))]
        found = self._entries.get(key)
        if found is None or found[0] != state:
            found = self._entries[key] = (state, _features(bnn, inputs))
            for tensor in tensors:
                weakref.finalize(tensor, self._entries.pop, key, None).atexit = False
        return found[1]


_KNOWN: weakref.WeakKeyDictionary[BNN, _Known] = weakref.WeakKeyDictionary()


def with_features(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model, with features of a :class:`~pyro_apd.BNN` in place of its inputs where it has them.

    Other models, and inputs that are not tensors in memory, keep their arguments.
    """
    bnn = unwrap(model)
    if not isinstance(bnn, BNN) or not _has_fixed_part(bnn):
        return args, dict(kwargs)
    try:
        given = _SIGNATURE.bind(bnn, *args, **kwargs).arguments
        inputs = NetworkInputs.of(given.get("x"), given.get("inputs", {}))
    except Exception:  # the model says what is wrong with them
        return args, dict(kwargs)
    if given.get("features") is not None or not inputs.is_by_row:
        return args, dict(kwargs)
    features = _KNOWN.setdefault(bnn, _Known()).get(bnn, inputs)
    if features is None:
        return args, dict(kwargs)
    rest = {name: given[name] for name in ("y", "weights") if given.get(name) is not None}
    return (), {"features": features, **rest}


def _has_fixed_part(bnn: BNN) -> bool:
    """Whether all latents are within one layer, and something that is fixed lies outside of it."""
    head = bnn.part.module()
    return bool(head) and any(not name.startswith(f"net.{head}.") for name in fixed_tensors(bnn))


def _features(bnn: BNN, inputs: NetworkInputs) -> Tensor | None:
    first = inputs.map_rows(lambda tensor: tensor[:_BATCH])
    try:
        few = bnn.features(first.args, batch_size=_BATCH, **first.kwargs)
    except ModelError as error:
        logger.info("The network is run in full at every step: %s", error)
        return None
    size = few[:1].numel() * few.element_size() * inputs.num_rows
    if size > _MAX_BYTES:
        logger.info("The network is run in full at every step: features of all inputs would take %.1f GB.", size / 1e9)
        return None
    return few if inputs.num_rows <= _BATCH else bnn.features(inputs.args, batch_size=_BATCH, **inputs.kwargs)
