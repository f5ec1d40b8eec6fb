# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions of chain and generator: scores by input, calibration, separation from other data, quality by size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_apd import metrics
from pyro_apd.diagnostics.formatting import counted
from pyro_apd.diagnostics.plots.style import (
    DASHES,
    MAX_POINTS,
    NAMES,
    colour,
    legend,
    new_axes,
    series_colours,
    to_numpy,
)
from pyro_apd.predictive.draws import evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_apd.diagnostics.comparison.fidelity_table import Fidelity


def score_scatter(
    chain_N: Tensor,
    generator_N: Tensor,
    ax: Axes | None = None,
    *,
    score: str = "mutual information (nats)",
    names: tuple[str, str] = NAMES,
) -> Axes:
    """A score of each input by the generator against the same by the chain; on the diagonal they agree.

    :param Tensor chain_N: score by the chain, ``(N,)``.
    :param Tensor generator_N: score by the generator, ``(N,)``.
    """
    ax = new_axes(ax)
    index = evenly_spaced(len(chain_N), MAX_POINTS)
    x, y = to_numpy(chain_N)[index], to_numpy(generator_N)[index]
    top = max(float(x.max()), float(y.max()), 1e-12) * 1.05
    ax.plot([0, top], [0, top], color=colour(ax, "quiet"), linewidth=1, linestyle="--", label="equal")
    ax.scatter(x, y, s=12, alpha=0.5, linewidths=0, color=colour(ax, "generator"), label="one input", clip_on=False)
    ax.set(xlim=(0, top), ylim=(0, top), xlabel=f"{score}, {names[0]}", ylabel=f"{score}, {names[1]}")
    ax.set_aspect("equal")
    legend(ax, loc="upper left")
    return ax


def score_histograms(
    inside_N: Tensor,
    outside: Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    score: str = "predictive entropy (nats)",
    bins: int = 30,
    upper: float | None = None,
    title: str = "",
) -> Axes:
    """How a score is distributed over in-distribution inputs and over sets from outside, each of unit area.

    :param Tensor inside_N: scores of in-distribution inputs, ``(N,)``.
    :param outside: scores by name of an out-of-distribution set.
    :param float upper: right end of the axis, to make two figures comparable; default the largest score.
    :param str title: whose scores they are.
    """
    ax = new_axes(ax)
    series = {name: to_numpy(values) for name, values in outside.items()}
    inside = to_numpy(inside_N)
    highest = max([float(values.max()) for values in (inside, *series.values())] + [1e-12])
    edges = np.linspace(0, upper if upper is not None else highest, bins + 1).tolist()
    # Scores beyond a given end are counted in the last bin rather than dropped.
    inside, series = inside.clip(0, edges[-1]), {name: v.clip(0, edges[-1]) for name, v in series.items()}
    ax.hist(inside, edges, density=True, color=colour(ax, "quiet"), alpha=0.45, label="in distribution")
    colours = series_colours(ax)
    for i, (name, values) in enumerate(series.items()):
        style: dict[str, Any] = {"color": colours[i % 6], "linestyle": DASHES[i % 6]}
        density, _ = np.histogram(values, edges, density=True)
        ax.plot(edges, [*density, density[-1]], drawstyle="steps-post", linewidth=1.8, label=name, **style)
    ax.set(xlabel=score, ylabel="density", xlim=(0, edges[-1]), title=title)
    legend(ax)
    return ax


def calibration_curve(
    probs: Mapping[str, Tensor], labels_N: Tensor, ax: Axes | None = None, *, num_bins: int = 15
) -> Axes:
    """Accuracy against confidence in equal-width bins; bins with fewer than five data are left out.

    :param probs: averaged class probabilities ``(N, K)`` by name, the chain first and the generator second.
    :param Tensor labels_N: classes, ``(N,)``.
    """
    ax = new_axes(ax)
    ax.plot([0, 1], [0, 1], color=colour(ax, "quiet"), linewidth=1, linestyle="--", label="calibrated")
    roles, markers = ("chain", "generator", "stored"), ("o", "^", "s")
    for i, (name, probs_NK) in enumerate(probs.items()):
        count, confidence, accuracy = (to_numpy(t) for t in metrics.calibration_bins(probs_NK, labels_N, num_bins))
        shown = count >= 5
        error = metrics.expected_calibration_error(probs_NK, labels_N, num_bins)
        ax.plot(
            *(confidence[shown], accuracy[shown]),
            marker=markers[i % 3],
            markersize=5,
            linestyle=DASHES[i % 3],
            color=colour(ax, roles[i % 3]),
            label=f"{name} (ECE {error:.3f})",
            clip_on=False,
        )
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_aspect("equal")
    legend(ax, loc="upper left")
    return ax


def quality_against_bytes(fidelity: Fidelity, name: str = "nll", ax: Axes | None = None) -> Axes:
    """A metric of generator, stored draws and whole chain against their size in bytes; the band is the resolution.

    :param Fidelity fidelity: of :func:`~pyro_apd.diagnostics.compare`.
    :param str name: the metric, as in ``fidelity[name]``.
    :raises KeyError: if there is no such metric.
    """
    ax, row, size = new_axes(ax), fidelity[name], fidelity.num_bytes
    ax.axhspan(row.chain - row.resolution, row.chain + row.resolution, color=colour(ax, "chain"), alpha=0.15, lw=0)
    ax.axhline(row.chain, color=colour(ax, "chain"), linewidth=1, linestyle="--")
    points = [("chain", "o", f"{fidelity.chain_name}, all draws", size["chain"], row.chain)]
    if fidelity.num_stored:
        points.append(("stored", "s", counted(fidelity.num_stored, "stored draw"), size["stored"], row.stored))
    points.append(("generator", "^", "generator", size["generator"], row.generator))
    for role, marker, label, num_bytes, value in points:
        # Stored draws take about the same bytes: an open square leaves the triangle to be seen.
        style: dict[str, Any] = {"color": colour(ax, role), "fillstyle": "none" if role == "stored" else "full"}
        ax.plot(num_bytes, value, marker, markersize=9, markeredgewidth=1.6, label=label, linestyle="none", **style)
    ax.set(xscale="log", xlabel="bytes", ylabel=row.label)
    ax.margins(0.25)
    legend(ax)
    return ax


def roc_curve(scores: Mapping[str, tuple[Tensor, Tensor]], ax: Axes | None = None, *, title: str = "") -> Axes:
    """How well a score separates data from outside from data inside: true against false positive rate.

    :param scores: by name, the chain first and the generator second: scores ``(N,)`` of in-distribution data and
        ``(M,)`` of data from outside; higher means more out-of-distribution.
    :param str title: which data are outside.
    :raises ValueError: if a set is empty or holds NaN.
    """
    ax = new_axes(ax)
    ax.plot([0, 1], [0, 1], color=colour(ax, "quiet"), linewidth=1, linestyle="--", label="guessing")
    roles = ("chain", "generator", "stored")
    for i, (name, (inside_N, outside_M)) in enumerate(scores.items()):
        area = metrics.auroc(inside_N, outside_M)
        inside, outside = np.sort(to_numpy(inside_N)), np.sort(to_numpy(outside_M))
        # Every score is a threshold; ties move along both axes at once.
        thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
        alarms = 1 - np.searchsorted(inside, thresholds) / len(inside)
        found = 1 - np.searchsorted(outside, thresholds) / len(outside)
        style: dict[str, Any] = {"color": colour(ax, roles[i % 3]), "linestyle": DASHES[i % 3]}
        ax.plot([0, *alarms], [0, *found], linewidth=1.8, label=f"{name} (AUROC {area:.3f})", clip_on=False, **style)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="false alarms", ylabel="found", title=title)
    ax.set_aspect("equal")
    legend(ax, loc="lower right")
    return ax
