# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Curves of a training log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyro_apd.diagnostics.plots.style import (
    colour,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: Series of a training log that count steps rather than measure something.
STEPS = ("step", "steps")


def training_curves(log: Mapping[str, Sequence[float]], axes: Sequence[Axes] | None = None) -> list[Axes]:
    """One small figure for each series of a training log.

    :param log: numbers by name, as in ``posterior.training_log``; a series called ``step`` or ``steps`` is the abscissa
        of those of its length.
    :param axes: one for each series that is not the abscissa; default a new figure, two in a row.
    :raises ValueError: if there is nothing to draw, or fewer axes than series.
    """
    steps = next((log[name] for name in STEPS if name in log), None)
    series = {n: v for n, v in log.items() if n not in STEPS and len(v) > 0 and are_numbers(v)}
    if not series:
        raise ValueError("`log` holds no series of numbers.")
    if axes is None:
        rows = (len(series) + 1) // 2
        axes = list(new_figure((8.0, 2.3 * rows)).subplots(rows, 2, squeeze=False).flat)
        for spare in axes[len(series) :]:
            spare.set_axis_off()
    if len(axes) < len(series):
        raise ValueError(f"`axes` must be {len(series)}, one a series; got {len(axes)}.")
    for ax, (name, values) in zip(axes, series.items(), strict=False):
        x = steps if steps is not None and len(steps) == len(values) else range(len(values))
        marker = "o" if len(values) < 30 else None
        ax.plot(list(x), list(values), color=colour(ax, "generator"), linewidth=1.2, marker=marker, markersize=3)
        ax.set_title(name.replace("_", " "), fontsize="medium")
        ax.set_xlabel("step" if x is steps else "record")
        ax.margins(x=0.02)
    return list(axes[: len(series)])


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether a series of a training log can be drawn."""
    return all(isinstance(value, (int, float)) for value in values)
