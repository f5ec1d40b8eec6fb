# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What :func:`torch.vmap` cannot do is done one by one, and an error of the user's code is not taken for that."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from pyro_apd.errors import ModelError

_LOG = logging.getLogger("pyro_apd")

_Result = TypeVar("_Result")
#: Type of an error, and where it was raised: code and line.
_Failure = tuple[type[Exception], Hashable, int]

# Failures of each model that came again when the same was tried again, with what it was tried on.
_KNOWN: WeakKeyDictionary[Any, set[tuple[str, _Failure | None]]] = WeakKeyDictionary()


def vectorised(function: Callable[[], _Result], model: object, items: str = "draws") -> _Result | None:
    """What a function gives that runs a model under :func:`torch.vmap`; None where vmap fails on that model.

    Some errors of vmap have texts and types of their own, but many have those of any operation on tensors: a captured
    tensor that is too small for all draws, or parts whose shapes depend on values. What all of them share is that they
    come again. So the function is called again after an error that is new for this model. One that is not raised
    at the same place each time is of the model itself, and is not hidden. The others are in the log, once for each
    model; whatever is wrong with the model in each of its runs is also wrong one by one, and raised there without vmap
    around it.

    :param callable function: without arguments.
    :param model: whose failures are remembered, for as long as it lives.
    :param str items: what is then evaluated one by one, for the log.
    :raises Exception: an error of the model, as it was raised; and any :class:`~pyro_apd.errors.ModelError`.

    Example::

        mean = vectorised(lambda: torch.vmap(model)(draws).mean(0), model)
        if mean is None:
            mean = torch.stack([model(draw) for draw in draws]).mean(0)
    """
    try:
        return function()
    except ModelError:
        raise
    except Exception as error:
        known, failure = _known(model), (items, _failure(error))
        if failure not in known:
            _raise_unless_again(function, error)
            known.add(failure)
            log_one_by_one(error, items)
        traceback.clear_frames(error.__traceback__)  # what they hold takes as much memory as all draws together
        return None


def log_one_by_one(reason: object, items: str = "draws") -> None:
    """Says that ``items`` are evaluated one by one, and why."""
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    _LOG.warning("Evaluating %s one by one, which is slower: %s", items, lines[0])


def _raise_unless_again(function: Callable[[], object], error: Exception) -> None:
    """Calls the function again, and raises the error that is not raised in each call."""
    second = _error_of(function)
    if _failure(second) != _failure(error):
        is_second = second is not None and _failure(_error_of(function)) == _failure(error)
        raise second if second is not None and is_second else error


def _error_of(function: Callable[[], object]) -> Exception | None:
    try:
        function()
    except ModelError:
        raise
    except Exception as error:
        return error
    return None


def _failure(error: Exception | None) -> _Failure | None:
    """Without the text, which may hold values and addresses."""
    if error is None:
        return None
    places = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    # Frames of modes that see each operation, such as those that count random numbers, say nothing of the place.
    return type(error), *next(place for place in reversed(places) if place[0].co_name != "__torch_function__")


def _known(model: Any) -> set[tuple[str, _Failure | None]]:
    """The set in which failures of a model are remembered; a new one for what has no weak references or no hash."""
    owner = inspect.unwrap(getattr(model, "__self__", model))
    try:
        return _KNOWN.setdefault(owner, set())
    except TypeError:
        return set()
