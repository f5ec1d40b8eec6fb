# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions over the plane, for problems with two inputs: also where there are no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd import uncertainty
from pyro_apd.diagnostics.plots.style import new_figure, series_colours, to_numpy
from pyro_apd.predictive import predictive
from pyro_apd.runtime.global_state import preserved_param_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = ("o", "s", "^", "D", "v", "P")


def decision_surfaces(
    model: Callable[..., Any],
    draws: Mapping[str, Mapping[str, Tensor]],
    x_N2: Tensor,
    y_N: Tensor | None = None,
    axes: Sequence[Axes] | None = None,
    *,
    resolution: int = 60,
    margin: float = 0.6,
) -> list[Axes]:
    """The prediction and its uncertainty over the plane of two inputs, a row for each posterior.

    Left: classes (deeper where the averaged prediction is surer), or the mean. Right: mutual information of label and
    weights in nats, or the standard deviation of the mean over draws; one scale for all rows.

    :param callable model: a Pyro model that takes inputs ``(N, 2)``.
    :param draws: draws ``(S, ...)`` by site, by name such as ``SGLD`` and ``generator``.
    :param Tensor x_N2: data, ``(N, 2)``.
    :param Tensor y_N: their classes, ``(N,)``.
    :param axes: two for each posterior; default a new figure.
    :param int resolution: points along each side.
    :param float margin: how far beyond the data to look, as a share of their range.
    :raises ValueError: if the inputs are not two, the model predicts neither classes nor numbers, or there are too few
        axes.
    """
    if x_N2.dim() != 2 or x_N2.shape[1] != 2:
        raise ValueError(f"`x_N2` must be (data, 2), since the figure is a plane; got {tuple(x_N2.shape)}.")
    if axes is None:
        axes = list(new_figure((8.4, 3.5 * len(draws))).subplots(len(draws), 2, squeeze=False).flat)
    if len(axes) < 2 * len(draws):
        raise ValueError(f"`axes` must be {2 * len(draws)}, two a posterior; got {len(axes)}.")
    low, high = x_N2.amin(0), x_N2.amax(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    sides = [torch.linspace(float(a), float(b), resolution) for a, b in zip(low, high, strict=True)]
    grid = torch.stack(torch.meshgrid(*sides, indexing="xy"), -1).flatten(0, 1).to(x_N2)
    found = {name: _of_draws(model, values, grid) for name, values in draws.items()}
    top = max(1e-12, *(float(score.max()) for _, score, _ in found.values()))
    for i, (name, (surface, score, word)) in enumerate(found.items()):
        left, right = axes[2 * i], axes[2 * i + 1]
        _prediction(left, sides, surface)
        image = right.pcolormesh(
            *map(to_numpy, sides),
            to_numpy(score).reshape(resolution, resolution),
            cmap="cividis",
            vmin=0,
            vmax=top,
            shading="gouraud",
            rasterized=True,
        )
        right.figure.colorbar(image, ax=right, label=word)
        left.set_title(f"{name}: prediction")
        right.set_title(f"{name}: uncertainty of the model")
        for ax in (left, right):
            _points(ax, x_N2, y_N if surface.dim() == 2 else None)
            ax.set(xlim=(float(low[0]), float(high[0])), ylim=(float(low[1]), float(high[1])))
    return list(axes[: 2 * len(draws)])


def _of_draws(model: Callable[..., Any], draws: Mapping[str, Tensor], grid: Tensor) -> tuple[Tensor, Tensor, str]:
    """Averaged prediction ``(M, K)`` or ``(M,)``, the uncertainty of the model ``(M,)``, and what that is."""
    with preserved_param_store(), torch.no_grad():
        out = predictive.outputs(model, draws, grid)
    if out.probs_SNK is not None:
        return out.probs_SNK.mean(0), uncertainty.mutual_information(out.probs_SNK), "mutual information (nats)"
    if out.mean_SN is None:
        raise ValueError("`model` predicts neither classes nor numbers, so there is no surface to draw.")
    return out.mean_SN.mean(0), out.mean_SN.std(0), "sd of the mean over draws"


def _prediction(ax: Axes, sides: Sequence[Tensor], surface: Tensor) -> None:
    x, y = map(to_numpy, sides)
    if surface.dim() == 1:
        height = to_numpy(surface).reshape(len(y), len(x))
        image = ax.pcolormesh(x, y, height, cmap="viridis", shading="gouraud", rasterized=True)
        ax.figure.colorbar(image, ax=ax, label="mean")
        return
    from matplotlib.colors import to_rgb

    paper = np.asarray(to_rgb(ax.get_facecolor()))
    colours = np.asarray([to_rgb(series_colours(ax)[k % 6]) for k in range(surface.shape[1])])
    confidence, best = surface.max(-1)
    strength = to_numpy((confidence - 1 / surface.shape[1]) / (1 - 1 / surface.shape[1]))[:, None] * 0.7
    pixels = (1 - strength) * paper + strength * colours[best.cpu().numpy()]
    pixels = pixels.reshape(len(y), len(x), 3)
    extent = (x[0], x[-1], y[0], y[-1])
    ax.imshow(pixels, origin="lower", extent=extent, aspect="auto", interpolation="bilinear")


def _points(ax: Axes, x_N2: Tensor, y_N: Tensor | None) -> None:
    points = to_numpy(x_N2)
    classes = np.zeros(len(points), dtype=int) if y_N is None else y_N.detach().cpu().numpy().astype(int).reshape(-1)
    for k in np.unique(classes):
        x, y = points[classes == k].T
        face = series_colours(ax)[k % 6] if y_N is not None else "none"
        ax.scatter(x, y, s=18, marker=_MARKERS[k % 6], c=face, edgecolors="black", linewidths=0.6)
