# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Regressions: mean and intervals along one input, and how many targets the intervals hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_apd.diagnostics.plots.style import DASHES, colour, legend, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Standard errors that the band around the diagonal is wide to either side: 95 %.
_NUM_ERRORS = 1.96


def regression_band(
    x_N: Any,
    mean_N: Any,
    intervals: Mapping[float, Any],
    ax: Axes | None = None,
    *,
    data: tuple[Any, Any] | None = None,
    name: str = "mean",
    xlabel: str = "x",
    ylabel: str = "y",
) -> Axes:
    """Predictive mean and intervals along one input, wider ones paler; with the data, where given.

    :param x_N: the input, ``(N,)``, in any order; a tensor or an array, as all that follow.
    :param mean_N: predictive means, ``(N,)``.
    :param intervals: lower and upper ends ``(N, 2)`` by probability, such as ``{0.5: ..., 0.9: ...}``.
    :param data: inputs ``(M,)`` and targets ``(M,)`` to show as points.
    :raises ValueError: if shapes disagree, or a probability is not between 0 and 1.

    Example::

        mean, interval = regressor.predict(X, return_interval=0.9)
        regression_band(X["age"], mean, {0.9: interval})
    """
    ax, x, mean = new_axes(ax), _array(x_N), _array(mean_N)
    order = np.argsort(x, kind="stable")
    if x.ndim != 1 or mean.shape != x.shape:
        raise ValueError(f"x_N and mean_N must have the same shape (N,); got {x.shape} and {mean.shape}.")
    for probability in sorted(intervals, reverse=True):
        ends = _ends(probability, intervals[probability], len(x))
        label = f"{100 * probability:g} % interval"
        alpha = 0.16 + 0.3 * (1 - probability)
        ax.fill_between(
            x[order], ends[order, 0], ends[order, 1], color=colour(ax, "chain"), alpha=alpha, lw=0, label=label
        )
    if data is not None:
        x_M, y_M = (_array(values) for values in data)
        ax.scatter(x_M, y_M, s=9, alpha=0.6, linewidths=0, color=colour(ax, "quiet"), label="data", zorder=1.5)
    ax.plot(x[order], mean[order], color=colour(ax, "chain"), linewidth=1.8, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0)
    legend(ax)
    return ax


def calibration_of_intervals(
    intervals: Mapping[str, Mapping[float, Any]], targets_N: Any, ax: Axes | None = None
) -> Axes:
    """Share of targets in intervals against the intervals' probability; on the diagonal they are calibrated.

    The band is where the share of independent targets is in 95 of 100 cases if intervals are calibrated. Below it they
    are too narrow, above it too wide.

    :param intervals: by name, lower and upper ends ``(N, 2)`` by probability.
    :param targets_N: targets, ``(N,)``.
    :raises ValueError: if shapes disagree, or a probability is not between 0 and 1.
    """
    ax, targets = new_axes(ax), _array(targets_N)
    quiet, grid = colour(ax, "quiet"), np.linspace(0, 1, 101)
    error = _NUM_ERRORS * np.sqrt(grid * (1 - grid) / max(len(targets), 1))
    ax.fill_between(grid, (grid - error).clip(0), (grid + error).clip(max=1), color=quiet, alpha=0.2, lw=0)
    ax.plot([0, 1], [0, 1], color=quiet, linewidth=1, linestyle="--", label="calibrated")
    roles, markers = ("chain", "generator", "stored"), ("o", "^", "s")
    for i, (name, of_name) in enumerate(intervals.items()):
        levels = sorted(of_name)
        ends = [_ends(level, of_name[level], len(targets)) for level in levels]
        shares = [float(((low <= targets) & (targets <= high)).mean()) for low, high in (pair.T for pair in ends)]
        style: dict[str, Any] = {"color": colour(ax, roles[i % 3]), "linestyle": DASHES[i % 3]}
        ax.plot(levels, shares, marker=markers[i % 3], markersize=5, label=name, clip_on=False, **style)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the interval", ylabel="share of targets in it")
    ax.set_aspect("equal")
    legend(ax, loc="upper left")
    return ax


def _array(values: Any) -> np.ndarray:
    """A tensor, an array, or a column of a frame."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _ends(probability: float, ends: Any, num_data: int) -> np.ndarray:
    found = _array(ends)
    if not 0 < probability < 1 or found.shape != (num_data, 2):
        raise ValueError(
            f"intervals[{probability!r}] has shape {found.shape}; intervals are lower and upper ends of shape "
            f"({num_data}, 2) by a probability between 0 and 1."
        )
    return found
