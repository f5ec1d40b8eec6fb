# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a chain and the generator that was fitted to it.

Every function draws on the axes it is given, or on those of a new figure, and returns them; none shows or saves
anything or touches pyplot. Colours are those of Okabe and Ito (2008), lighter on a dark background; shapes and dashes
tell series apart without colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd import metrics
from pyro_apd.diagnostics.draws import evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_apd.diagnostics.fidelity import Fidelity

NAMES = ("SGLD", "APD")

_ON_LIGHT = {"chain": "#0072B2", "generator": "#D55E00", "stored": "#009E73", "quiet": "#767676"}
_ON_DARK = {"chain": "#56B4E9", "generator": "#E69F00", "stored": "#3CC9A0", "quiet": "#9A9A9A"}
_SERIES_LIGHT = ("#CC79A7", "#009E73", "#D55E00", "#0072B2", "#8C6D00", "#000000")
_SERIES_DARK = ("#E79BC4", "#3CC9A0", "#E69F00", "#56B4E9", "#F0E442", "#FFFFFF")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
_MAX_POINTS = 4000

#: Series of a training log that count steps rather than measure something.
STEPS = ("step", "steps")


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
    ax = _axes(ax)
    index = evenly_spaced(len(chain_N), _MAX_POINTS)
    x, y = _numpy(chain_N)[index], _numpy(generator_N)[index]
    top = max(float(x.max()), float(y.max()), 1e-12) * 1.05
    ax.plot([0, top], [0, top], color=_colour(ax, "quiet"), linewidth=1, linestyle="--", label="equal")
    ax.scatter(x, y, s=12, alpha=0.5, linewidths=0, color=_colour(ax, "generator"), label="one input", clip_on=False)
    ax.set(xlim=(0, top), ylim=(0, top), xlabel=f"{score}, {names[0]}", ylabel=f"{score}, {names[1]}")
    ax.set_aspect("equal")
    _legend(ax, loc="upper left")
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
    :param float upper: right end of the axis, to make two pictures comparable; default the largest score.
    :param str title: whose scores they are.
    """
    ax = _axes(ax)
    series = {name: _numpy(values) for name, values in outside.items()}
    inside = _numpy(inside_N)
    highest = max([float(values.max()) for values in (inside, *series.values())] + [1e-12])
    edges = np.linspace(0, upper if upper is not None else highest, bins + 1).tolist()
    # Scores beyond a given end are counted in the last bin rather than dropped.
    inside, series = inside.clip(0, edges[-1]), {name: v.clip(0, edges[-1]) for name, v in series.items()}
    ax.hist(inside, edges, density=True, color=_colour(ax, "quiet"), alpha=0.45, label="in distribution")
    colours = _SERIES_DARK if _is_dark(ax) else _SERIES_LIGHT
    for i, (name, values) in enumerate(series.items()):
        style: dict[str, Any] = {"color": colours[i % 6], "linestyle": _DASHES[i % 6]}
        density, _ = np.histogram(values, edges, density=True)
        ax.plot(edges, [*density, density[-1]], drawstyle="steps-post", linewidth=1.8, label=name, **style)
    ax.set(xlabel=score, ylabel="density", xlim=(0, edges[-1]), title=title)
    _legend(ax)
    return ax


def calibration_curve(
    probs: Mapping[str, Tensor], labels_N: Tensor, ax: Axes | None = None, *, num_bins: int = 15
) -> Axes:
    """Accuracy against confidence in equal-width bins; bins with fewer than five data are left out.

    :param probs: averaged class probabilities ``(N, K)`` by name, the chain first and the generator second.
    :param Tensor labels_N: classes, ``(N,)``.
    """
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color=_colour(ax, "quiet"), linewidth=1, linestyle="--", label="calibrated")
    roles, markers = ("chain", "generator", "stored"), ("o", "^", "s")
    for i, (name, probs_NK) in enumerate(probs.items()):
        count, confidence, accuracy = (_numpy(t) for t in metrics.calibration_bins(probs_NK, labels_N, num_bins))
        shown = count >= 5
        error = metrics.expected_calibration_error(probs_NK, labels_N, num_bins)
        ax.plot(
            *(confidence[shown], accuracy[shown]),
            marker=markers[i % 3],
            markersize=5,
            linestyle=_DASHES[i % 3],
            color=_colour(ax, roles[i % 3]),
            label=f"{name} (ECE {error:.3f})",
            clip_on=False,
        )
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_aspect("equal")
    _legend(ax, loc="upper left")
    return ax


def weight_sd(
    chain_SD: Tensor, generator_SD: Tensor, ax: Axes | None = None, *, names: tuple[str, str] = NAMES
) -> Axes:
    """Standard deviation of each weight over draws, generator against chain; logarithmic where the range is wide.

    :param Tensor chain_SD: draws of the chain, ``(S, D)``.
    :param Tensor generator_SD: draws of the generator, ``(S, D)``.
    """
    ax = _axes(ax)
    index = evenly_spaced(chain_SD.shape[1], _MAX_POINTS)
    x, y = _numpy(chain_SD.std(0))[index], _numpy(generator_SD.std(0))[index]
    moving = x[x > 0] if (x > 0).any() else np.ones(1)
    low, high = float(np.quantile(moving, 0.01)) / 2, float(max(x.max(), y.max(), moving.max())) * 1.1
    wide = high / low > 30
    if not wide:
        low = 0.0
    # A collapsed weight has no place on a logarithmic axis: it is put at its lower end.
    lost = int((y <= 1e-3 * moving.min()).sum())
    ax.plot([low, high], [low, high], color=_colour(ax, "quiet"), linewidth=1, linestyle="--", label="equal")
    label = "one weight" if not lost else f"one weight ({lost / len(y):.0%} have no spread)"
    clipped = x.clip(low), y.clip(low)
    ax.scatter(*clipped, s=10, alpha=0.4, linewidths=0, color=_colour(ax, "generator"), label=label, clip_on=False)
    ax.set(xlim=(low, high), ylim=(low, high))
    if wide:
        ax.set(xscale="log", yscale="log")
    ax.set(xlabel=f"sd of a weight, {names[0]}", ylabel=f"sd of a weight, {names[1]}")
    ax.set_aspect("equal")
    _legend(ax, loc="upper left")
    return ax


def principal_pair(
    chain_SD: Tensor, generator_SD: Tensor, ax: Axes | None = None, *, names: tuple[str, str] = NAMES
) -> Axes:
    """Draws of both in the plane of the first two principal components of the two together.

    Both take part in choosing the plane, in equal number: in components of the chain's own few draws a perfect
    generator would look shrunk.

    :param Tensor chain_SD: draws of the chain, ``(S, D)``.
    :param Tensor generator_SD: draws of the generator, ``(S', D)``.
    """
    ax = _axes(ax)
    size = min(len(chain_SD), len(generator_SD))
    parts = [theta[evenly_spaced(len(theta), size)].double() for theta in (chain_SD, generator_SD)]
    pooled_SD = torch.cat(parts) - torch.cat(parts).mean(0)
    # Through the S x S Gram matrix, since D may be millions.
    values, vectors = torch.linalg.eigh(pooled_SD @ pooled_SD.T)
    values = values.clamp_min(0).flip(0)
    share = values / values.sum().clamp_min(1e-300)
    coordinates = _numpy(vectors.flip(1)[:, :2] * values[:2].sqrt())
    for name, role, marker, points in zip(
        names, ("chain", "generator"), ("o", "^"), np.split(coordinates, 2), strict=True
    ):
        face: dict[str, Any] = {"facecolors": _colour(ax, role) if role == "chain" else "none"}
        x, y = points.T
        ax.scatter(
            x, y, s=20, marker=marker, alpha=0.7, linewidths=0.9, edgecolors=_colour(ax, role), label=name, **face
        )
    ax.set(xlabel=f"component 1 ({float(share[0]):.0%} of the variance)", ylabel=f"component 2 ({float(share[1]):.0%})")
    ax.margins(0.08)
    _legend(ax)
    return ax


def trace(values_CS: Tensor, ax: Axes | None = None, *, label: str = "potential U (nats)") -> Axes:
    """A figure of every draw in the order of drawing, a line for each chain.

    :param Tensor values_CS: ``(C, S)``, such as the potential.
    """
    ax = _axes(ax)
    values = _numpy(values_CS)
    colours = _SERIES_DARK if _is_dark(ax) else _SERIES_LIGHT
    for i, chain in enumerate(values):
        style: dict[str, Any] = {"color": colours[i % 6], "linestyle": _DASHES[(i // 6) % 6]}
        ax.plot(np.arange(len(chain)), chain, linewidth=0.9, alpha=0.85, label=f"chain {i}", **style)
    ax.set(xlabel="draw", ylabel=label, xlim=(0, max(values.shape[1] - 1, 1)))
    _legend(ax, ncols=min(4, max(1, len(values))))
    return ax


def training_curves(log: Mapping[str, Sequence[float]], axes: Sequence[Axes] | None = None) -> list[Axes]:
    """One small picture for each series of a training log.

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
        axes = list(_figure((8.0, 2.3 * rows)).subplots(rows, 2, squeeze=False).flat)
        for spare in axes[len(series) :]:
            spare.set_axis_off()
    if len(axes) < len(series):
        raise ValueError(f"`axes` must be {len(series)}, one a series; got {len(axes)}.")
    for ax, (name, values) in zip(axes, series.items(), strict=False):
        x = steps if steps is not None and len(steps) == len(values) else range(len(values))
        marker = "o" if len(values) < 30 else None
        ax.plot(list(x), list(values), color=_colour(ax, "generator"), linewidth=1.2, marker=marker, markersize=3)
        ax.set_title(name.replace("_", " "), fontsize="medium")
        ax.set_xlabel("step" if x is steps else "record")
        ax.margins(x=0.02)
    return list(axes[: len(series)])


def quality_against_bytes(fidelity: Fidelity, name: str = "nll", ax: Axes | None = None) -> Axes:
    """A figure of generator, stored draws and whole chain against the bytes each takes; the band is the resolution.

    :param Fidelity fidelity: of :func:`~pyro_apd.diagnostics.compare`.
    :param str name: the figure, as in ``fidelity[name]``.
    :raises KeyError: if there is no such figure.
    """
    ax, row, size = _axes(ax), fidelity[name], fidelity.num_bytes
    ax.axhspan(row.chain - row.resolution, row.chain + row.resolution, color=_colour(ax, "chain"), alpha=0.15, lw=0)
    ax.axhline(row.chain, color=_colour(ax, "chain"), linewidth=1, linestyle="--")
    points = [("chain", "o", f"{fidelity.chain_name}, all draws", size["chain"], row.chain)]
    if fidelity.num_stored:
        points.append(("stored", "s", f"{fidelity.num_stored} stored draws", size["stored"], row.stored))
    points.append(("generator", "^", "APD generator", size["generator"], row.generator))
    for role, marker, label, num_bytes, value in points:
        # Stored draws take about the same bytes: an open square leaves the triangle to be seen.
        style: dict[str, Any] = {"color": _colour(ax, role), "fillstyle": "none" if role == "stored" else "full"}
        ax.plot(num_bytes, value, marker, markersize=9, markeredgewidth=1.6, label=label, linestyle="none", **style)
    ax.set(xscale="log", xlabel="bytes", ylabel=row.label)
    ax.margins(0.25)
    _legend(ax)
    return ax


def _axes(ax: Axes | None) -> Axes:
    return ax if ax is not None else _figure((4.6, 3.6)).subplots()


def _figure(size: tuple[float, float]) -> Any:
    """A figure that pyplot knows nothing of, so that nothing has to be closed."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _is_dark(ax: Axes) -> bool:
    red, green, blue = _rgb(ax.get_facecolor())
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _rgb(colour: Any) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def _colour(ax: Axes, role: str) -> str:
    return (_ON_DARK if _is_dark(ax) else _ON_LIGHT)[role]


def _legend(ax: Axes, **options: Any) -> None:
    ax.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize="small", **options)


def _numpy(values: Tensor) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether a series of a training log can be drawn."""
    return all(isinstance(value, (int, float)) for value in values)
