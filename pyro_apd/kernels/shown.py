# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A kernel in a line or three, for ``print``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from pyro_apd.kernels.engine.schedules import Constant

if TYPE_CHECKING:
    from pyro_apd.kernels.base import StochasticGradientKernel

# Shown with the step size, or not worth a line.
_LEFT_OUT = {"self", "model", "step_size", "settings"}
_WIDTH = 60


def shown(kernel: StochasticGradientKernel) -> str:
    """Step size, the settings that are not defaults, what was chosen during warm-up, and why the kernel was
    recommended where it was."""
    parts = [_step_size(kernel), *_settings(kernel)]
    lines = [f"{type(kernel).__name__}({', '.join(parts)})"]
    if "step_size" in kernel.tuning:
        lines.append(f"  step size  {kernel.tuning['step_size']:.3g}, chosen during warm-up")
    if kernel.reason:
        lines.append(f"  reason     {kernel.reason}")
    return "\n".join(lines)


def _nothing() -> None:
    """In place of a constructor where a class has none of its own."""


def _step_size(kernel: StochasticGradientKernel) -> str:
    return f"step_size={_short('auto' if kernel.schedule is None else kernel.schedule)}"


def _short(value: object) -> str:
    if isinstance(value, Constant):
        return f"{value.step_size:.4g}"
    value = getattr(value, "func", value)  # of a partial
    text = getattr(value, "__name__", None) or " ".join(repr(value).split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _is_default(value: object, default: object) -> bool:
    if default is inspect.Parameter.empty:
        return True  # an argument that is always given
    try:
        return bool(value == default)
    except (RuntimeError, ValueError):  # tensors or arrays of several numbers
        return value is default


def _settings(kernel: StochasticGradientKernel) -> list[str]:
    """Of the class and of those that it is derived from, by the names of arguments that became attributes."""
    found: dict[str, str] = {}
    for kind in type(kernel).__mro__:
        for name, parameter in inspect.signature(vars(kind).get("__init__", _nothing)).parameters.items():
            if name in _LEFT_OUT or name in found or not hasattr(kernel, name):
                continue
            value = getattr(kernel, name)
            if _is_default(value, parameter.default) or (name == "warm_start" and not value):
                continue
            found[name] = f"{name}={_short(value)}"
    return list(found.values())
