# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Weights of chain and generator: standard deviation of each, and draws in a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.diagnostics.plots.style import (
    MAX_POINTS,
    NAMES,
    colour,
    legend,
    new_axes,
    to_numpy,
)
from pyro_apd.predictive.draws import evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def weight_sd(
    chain_SD: Tensor, generator_SD: Tensor, ax: Axes | None = None, *, names: tuple[str, str] = NAMES
) -> Axes:
    """Standard deviation of each weight over draws, generator against chain; logarithmic where the range is wide.

    :param Tensor chain_SD: draws of the chain, ``(S, D)``.
    :param Tensor generator_SD: draws of the generator, ``(S, D)``.
    """
    ax = new_axes(ax)
    index = evenly_spaced(chain_SD.shape[1], MAX_POINTS)
    x, y = to_numpy(chain_SD.std(0))[index], to_numpy(generator_SD.std(0))[index]
    moving = x[x > 0] if (x > 0).any() else np.ones(1)
    low, high = float(np.quantile(moving, 0.01)) / 2, float(max(x.max(), y.max(), moving.max())) * 1.1
    wide = high / low > 30
    if not wide:
        low = 0.0
    # A weight without spread has no place on a logarithmic axis: it is put at the lower end.
    lost = int((y <= 1e-3 * moving.min()).sum())
    ax.plot([low, high], [low, high], color=colour(ax, "quiet"), linewidth=1, linestyle="--", label="equal")
    label = "one weight" if not lost else f"one weight ({lost / len(y):.0%} have no spread)"
    clipped = x.clip(low), y.clip(low)
    ax.scatter(*clipped, s=10, alpha=0.4, linewidths=0, color=colour(ax, "generator"), label=label, clip_on=False)
    ax.set(xlim=(low, high), ylim=(low, high))
    if wide:
        ax.set(xscale="log", yscale="log")
    ax.set(xlabel=f"sd of a weight, {names[0]}", ylabel=f"sd of a weight, {names[1]}")
    ax.set_aspect("equal")
    legend(ax, loc="upper left")
    return ax


def principal_pair(
    chain_SD: Tensor,
    generator_SD: Tensor,
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = NAMES,
    marginals: bool = True,
) -> Axes:
    """Draws of both in the plane of the first two principal components of the two together, with histograms of each.

    Both take part in choosing the plane, in equal number: in components of the chain's own few draws a perfect
    generator would look shrunk.

    :param Tensor chain_SD: draws of the chain, ``(S, D)``.
    :param Tensor generator_SD: draws of the generator, ``(S', D)``.
    :param bool marginals: whether to draw the histograms.
    """
    ax = new_axes(ax)
    size = min(len(chain_SD), len(generator_SD))
    parts = [theta[evenly_spaced(len(theta), size)].double() for theta in (chain_SD, generator_SD)]
    pooled_SD = torch.cat(parts) - torch.cat(parts).mean(0)
    # Through the S x S Gram matrix, since D may be millions.
    values, vectors = torch.linalg.eigh(pooled_SD @ pooled_SD.T)
    values = values.clamp_min(0).flip(0)
    share = values / values.sum().clamp_min(1e-300)
    coordinates = to_numpy(vectors.flip(1)[:, :2] * values[:2].sqrt())
    for name, role, marker, points in zip(
        names, ("chain", "generator"), ("o", "^"), np.split(coordinates, 2), strict=True
    ):
        face: dict[str, Any] = {"facecolors": colour(ax, role) if role == "chain" else "none"}
        x, y = points.T
        ax.scatter(
            x, y, s=20, marker=marker, alpha=0.7, linewidths=0.9, edgecolors=colour(ax, role), label=name, **face
        )
    ax.set(xlabel=f"component 1 ({float(share[0]):.0%} of the variance)", ylabel=f"component 2 ({float(share[1]):.0%})")
    ax.margins(0.08)
    legend(ax)
    if marginals:
        _marginals(ax, np.split(coordinates, 2))
    return ax


def _marginals(ax: Axes, sides: Sequence[np.ndarray]) -> None:
    """Histograms above and to the right of a scatter, as outlines in the colours of its points."""
    for axis, place in ((0, (0.0, 1.01, 1.0, 0.16)), (1, (1.01, 0.0, 0.16, 1.0))):
        small = ax.inset_axes(place, sharex=ax if axis == 0 else None, sharey=ax if axis == 1 else None)
        edges = np.linspace(*(ax.get_xlim() if axis == 0 else ax.get_ylim()), 25)
        for role, dashes, points in zip(("chain", "generator"), ("-", "--"), sides, strict=True):
            style: dict[str, Any] = {"color": colour(ax, role), "linestyle": dashes, "linewidth": 1.4}
            orientation: Any = "vertical" if axis == 0 else "horizontal"
            small.hist(points[:, axis], edges.tolist(), histtype="step", orientation=orientation, **style)
        small.set_axis_off()
