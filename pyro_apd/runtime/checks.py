# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of settings, each with one clear error. Integers and floats of NumPy count; booleans are neither."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of Python or NumPy, and not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_))


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number of Python or NumPy, and not a boolean; infinity and nan are numbers here."""
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def integer(name: str, value: Any, *, at_least: int = 1, at_most: int | None = None, hint: str = "") -> int:
    """``value`` as Python's ``int``.

    :param str name: of the setting, for the error.
    :param int at_least: smallest value accepted, and ``at_most`` the largest.
    :param str hint: another sentence for the error, such as how to choose the value.
    :raises ValueError: if it is no integer, or out of range.

    Example::

        batch_size = integer("batch_size", batch_size, hint="It is the number of rows per mini-batch.")
    """
    if is_integer(value) and at_least <= value and (at_most is None or value <= at_most):
        return int(value)
    if at_most is not None:
        accepted = f"an integer from {at_least} to {at_most}"
    else:
        accepted = "a positive integer" if at_least == 1 else f"an integer >= {at_least}"
    raise ValueError(_message(name, value, accepted, hint))


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    hint: str = "",
) -> float:
    """``value`` as Python's ``float``, finite.

    :param str name: of the setting, for the error.
    :param float above: bound that is not accepted itself, as ``below`` is; ``at_least`` and ``at_most`` are.
    :param str hint: another sentence for the error.
    :raises ValueError: if it is no finite number, or out of range.
    """
    if (
        is_number(value)
        and math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    ):
        return float(value)
    bounds = [("> ", above), (">= ", at_least), ("< ", below), ("<= ", at_most)]
    known = [f"{sign}{bound:g}" for sign, bound in bounds if bound is not None]
    accepted = "a positive finite number" if known == ["> 0"] else " ".join(["a finite number", " and ".join(known)])
    raise ValueError(_message(name, value, accepted.rstrip(), hint))


def flag(name: str, value: Any, hint: str = "") -> bool:
    """``value`` as Python's ``bool``.

    :param str hint: another sentence for the error.
    :raises ValueError: if it is neither True nor False.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ValueError(_message(name, value, "True or False", hint))


def choice(name: str, value: Any, accepted: Collection[str], hint: str = "") -> str:
    """``value``, one of the ``accepted`` words.

    :raises ValueError: if it is none of them.
    """
    if isinstance(value, str) and value in accepted:
        return value
    raise ValueError(_message(name, value, f"one of {', '.join(map(repr, accepted))}", hint))


def _message(name: str, value: Any, accepted: str, hint: str) -> str:
    return f"{name}={value!r} must be {accepted}." + (f" {hint}" if hint else "")
