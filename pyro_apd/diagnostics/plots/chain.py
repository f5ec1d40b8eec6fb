# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A chain beside a generator, scalar by scalar: traces, mixing, and whether both have the same distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_apd.diagnostics.mixing.convergence import statistics
from pyro_apd.diagnostics.plots.style import (
    DASHES,
    MAX_POINTS,
    NAMES,
    colour,
    legend,
    new_axes,
    new_figure,
    series_colours,
    to_numpy,
)
from pyro_apd.predictive.draws import evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def trace(
    values_CS: Tensor, ax: Axes | None = None, *, label: str = "potential U (nats)", name: str = NAMES[0]
) -> Axes:
    """A scalar of every draw in the order of drawing, a line per chain.

    :param Tensor values_CS: ``(C, S)``, such as the potential.
    :param str label: what it is, with its unit.
    :param str name: the chain's name in the legend.
    """
    ax = new_axes(ax)
    values = to_numpy(values_CS)
    words = f"{name}, {len(values)} chains" if len(values) > 1 else name
    for i, chain in enumerate(values):
        style: dict[str, Any] = {"color": series_colours(ax)[i % 6], "linestyle": DASHES[(i // 6) % 6]}
        ax.plot(np.arange(len(chain)), chain, linewidth=0.9, alpha=0.85, label=words if i == 0 else None, **style)
    ax.set(xlabel="draw", ylabel=label, xlim=(0, max(values.shape[1] - 1, 1)))
    _legend_above(ax)
    return ax


def forest(
    chain_CSF: Tensor,
    generator_SF: Tensor,
    labels: Sequence[str],
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = NAMES,
    rhat: bool = True,
) -> Axes:
    """Medians and intervals of some scalars, chain above generator: 5 to 95 % thin, 25 to 75 % thick.

    :param Tensor chain_CSF: scalars of the chain, ``(C, S, F)``, such as weights or function values.
    :param Tensor generator_SF: the same of the generator, ``(S', F)``.
    :param labels: what each scalar is.
    :param bool rhat: whether to write the chain's R-hat beside each, where there are several chains.
    :raises ValueError: if the numbers of scalars differ.
    """
    _check(chain_CSF, generator_SF, labels)
    ax = ax if ax is not None else new_figure((6.4, 0.8 + 0.42 * len(labels))).subplots()
    sides = (to_numpy(chain_CSF.flatten(0, 1)), to_numpy(generator_SF))
    for name, role, marker, values, offset in zip(
        names, ("chain", "generator"), ("o", "^"), sides, (0.16, -0.16), strict=True
    ):
        low, lower, middle, upper, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
        rows = np.arange(len(labels))[::-1] + offset
        style: dict[str, Any] = {"color": colour(ax, role)}
        ax.hlines(rows, low, high, linewidth=1.2, **style)
        ax.hlines(rows, lower, upper, linewidth=3.4, **style)
        face: dict[str, Any] = {"markerfacecolor": ax.get_facecolor()}
        ax.plot(middle, rows, marker, markersize=6, markeredgewidth=1.5, label=name, linestyle="none", **style, **face)
    ax.set_yticks(range(len(labels)), list(labels)[::-1])
    ax.set_ylim(-0.6, len(labels) - 0.4)
    if rhat and chain_CSF.shape[0] > 1:
        for row, value in enumerate(statistics(chain_CSF)["rhat"].flip(0).tolist()):
            words = f"{value:.2f}" if value == value else "-"
            ax.annotate(words, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize="small")
        ax.annotate(
            "R-hat", (1.02, len(labels) - 0.4), xycoords=("axes fraction", "data"), va="bottom", fontsize="small"
        )
    ax.grid(axis="y", visible=False)
    _legend_above(ax)
    return ax


def density(
    chain_CSF: Tensor,
    generator_SF: Tensor,
    labels: Sequence[str],
    axes: Sequence[Axes] | None = None,
    *,
    names: tuple[str, str] = NAMES,
) -> list[Axes]:
    """Densities of some scalars, chain and generator on the same axes; one small figure for each.

    :param Tensor chain_CSF: scalars of the chain, ``(C, S, F)``.
    :param Tensor generator_SF: the same of the generator, ``(S', F)``.
    :param labels: what each scalar is.
    :param axes: one per scalar; default a new figure, three in a row.
    :raises ValueError: if the numbers of scalars differ, or there are fewer axes.
    """
    _check(chain_CSF, generator_SF, labels)
    if axes is None:
        rows = (len(labels) + 2) // 3
        axes = list(new_figure((8.4, 2.1 * rows)).subplots(rows, 3, squeeze=False).flat)
        for spare in axes[len(labels) :]:
            spare.set_axis_off()
    if len(axes) < len(labels):
        raise ValueError(f"`axes` must be {len(labels)}, one per scalar; got {len(axes)}.")
    sides = (to_numpy(chain_CSF.flatten(0, 1)), to_numpy(generator_SF))
    for i, (ax, label) in enumerate(zip(axes, labels, strict=False)):
        both = np.concatenate([side[:, i] for side in sides])
        grid = np.linspace(both.min(), both.max() + 1e-12, 200)
        tops = []
        for name, role, dashes, side in zip(names, ("chain", "generator"), ("-", "--"), sides, strict=True):
            height = _smooth(side[:, i], grid)
            tops.append(height.max())
            ax.plot(grid, height, dashes, color=colour(ax, role), linewidth=1.7, label=name)
            ax.fill_between(grid, height, color=colour(ax, role), alpha=0.12, linewidth=0)
        # The peak of a collapsed side is cut off, so that the other stays visible.
        ax.set_ylim(0, min(max(tops), 4 * min(tops)) * 1.05)
        ax.set_title(label, fontsize="small")
        ax.set_yticks([])
        ax.tick_params(labelsize="small")
    legend(axes[0])
    return list(axes[: len(labels)])


def rank_bars(
    chain_CS: Tensor,
    generator_S: Tensor,
    ax: Axes | None = None,
    *,
    bins: int = 12,
    label: str = "",
    names: tuple[str, str] = NAMES,
) -> Axes:
    """Where draws fall among the chain's: flat bars for the generator, and for each chain, mean the same distribution.

    Low at the ends: too narrow. A slope: shifted. Chains whose own bars are not flat have not mixed.

    :param Tensor chain_CS: one scalar of the chain, ``(C, S)``.
    :param Tensor generator_S: the same of the generator, ``(S',)``.
    :param str label: what the scalar is.
    """
    from matplotlib.colors import to_rgba

    ax = new_axes(ax)
    chains, generator = to_numpy(chain_CS), to_numpy(generator_S)
    # The generator counts as much as all chains together, however many draws there are of it.
    inner = np.quantile(chains, np.linspace(0, 1, bins + 1)[1:-1])
    edges = np.arange(bins + 1)
    shares = np.bincount(np.searchsorted(inner, generator), minlength=bins) * bins / len(generator)
    ax.bar(edges[:-1] + 0.5, shares, 0.86, color=colour(ax, "generator"), alpha=0.55, label=names[1])
    heights = np.stack([np.bincount(np.searchsorted(inner, chain), minlength=bins) for chain in chains])
    heights = heights * bins / chains.shape[1]
    low, high = ([*side, side[-1]] for side in (heights.min(0), heights.max(0)))
    words = f"{names[0]}, {len(chains)} chains" if len(chains) > 1 else names[0]
    face: dict[str, Any] = {"facecolor": to_rgba(colour(ax, "chain"), 0.22), "edgecolor": colour(ax, "chain")}
    ax.fill_between(edges, low, high, step="post", linewidth=1.2, label=words, **face)
    ax.axhline(1, color=colour(ax, "quiet"), linestyle="--", linewidth=1, label="uniform")
    ax.set(xlim=(0, bins), ylim=(0, max(2.0, ax.get_ylim()[1])), xlabel=f"rank among draws of {names[0]}")
    ax.set(ylabel="share (1: same distribution)")
    ax.set_title(label, pad=26)
    ax.set_xticks([0, bins / 2, bins], ["lowest", "median", "highest"])
    _legend_above(ax, ncols=3)
    return ax


def ess(chain_CSF: Tensor, labels: Sequence[str], ax: Axes | None = None, *, names: tuple[str, str] = NAMES) -> Axes:
    """Effective draws of the chain for the centre and the tails of some scalars, against the draws there are.

    Draws of a generator are independent, so all of them count.

    :param Tensor chain_CSF: scalars of the chain, ``(C, S, F)``.
    :param labels: what each scalar is.
    :raises ValueError: if the number of labels is not ``F``.
    """
    _check(chain_CSF, chain_CSF[0], labels)
    ax = ax if ax is not None else new_figure((6.4, 0.9 + 0.3 * len(labels))).subplots()
    found = statistics(chain_CSF)
    rows = np.arange(len(labels))[::-1]
    total = chain_CSF.shape[0] * chain_CSF.shape[1]
    for metric, words, marker, role in (("ess_bulk", "centre", "o", "chain"), ("ess_tail", "tails", "s", "stored")):
        values = to_numpy(found[metric])
        ax.plot(
            values, rows, marker, color=colour(ax, role), markersize=6, linestyle="none", label=f"{names[0]}, {words}"
        )
    ax.hlines(rows, 0, to_numpy(found["ess_bulk"]), color=colour(ax, "chain"), linewidth=1, alpha=0.5)
    ax.axvline(total, color=colour(ax, "quiet"), linestyle="--", linewidth=1, label="draws of the chain")
    ax.set_yticks(range(len(labels)), list(labels)[::-1])
    ax.set(xlabel="effective draws", ylim=(-0.6, len(labels) - 0.4), xlim=(0, max(ax.get_xlim()[1], total * 1.05)))
    ax.grid(axis="y", visible=False)
    _legend_above(ax, ncols=3)
    return ax


def _legend_above(ax: Axes, ncols: int = 2) -> None:
    legend(ax, loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, borderaxespad=0.2)


def _smooth(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Normal kernel density at Silverman's width; a spike where all are equal."""
    spread = min(values.std(), (np.quantile(values, 0.75) - np.quantile(values, 0.25)) / 1.34) or values.std()
    width = max(0.9 * spread * len(values) ** -0.2, (grid[-1] - grid[0]) / 100, 1e-12)
    kept = values[evenly_spaced(len(values), MAX_POINTS)]
    height = np.exp(-0.5 * ((grid[:, None] - kept) / width) ** 2).mean(1)
    density: np.ndarray = height / (width * np.sqrt(2 * np.pi))
    return density


def _check(chain_CSF: Tensor, generator_SF: Tensor, labels: Sequence[str]) -> None:
    if chain_CSF.dim() != 3 or generator_SF.dim() != 2 or {chain_CSF.shape[2], generator_SF.shape[1]} != {len(labels)}:
        raise ValueError(
            f"`chain_CSF` must be (chains, draws, scalars) and `generator_SF` (draws, scalars), with a label for each "
            f"scalar; got {tuple(chain_CSF.shape)}, {tuple(generator_SF.shape)} and {len(labels)} labels."
        )
