# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Formats numbers for tables and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def format_number(value: float) -> str:
    """Four decimals; a dash for what is not defined."""
    return "-" if value != value else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def counted(count: int, noun: str) -> str:
    """``"1 draw"``, ``"2 draws"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_bytes(value: int) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"


def finite_only(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite_only(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_only(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
