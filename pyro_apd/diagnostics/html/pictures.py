# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The figures of a report: plots drawn for light and for dark pages, as text that an HTML file can hold."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_apd.diagnostics import plots
from pyro_apd.runtime.optional_packages import require

if TYPE_CHECKING:
    from pyro_apd.diagnostics.comparison.fidelity_table import Fidelity

_INK, _PAPER = "#e4e4e4", "#1d2025"
_LIGHT = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#ffffff")
_DARK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), _PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
}
_STYLE = {"font.size": 10.0, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
_DPI = 144

_SQUARE, _FLAT, _WIDE, _SMALL = (4.4, 4.2), (4.4, 3.4), (6.6, 3.2), (4.4, 2.4)
_MAX_SETS = 4
_WORDS = {
    "mi": "mutual information (nats)",
    "entropy": "predictive entropy (nats)",
    "sd": "predictive sd",
    "epistemic": "epistemic variance",
}


@dataclass(frozen=True)
class Picture:
    """One figure, drawn twice.

    :ivar str light: data URI for light pages and print.
    :ivar str dark: data URI for dark pages.
    :ivar str caption: what it shows.
    :ivar int width: in CSS pixels.
    """

    light: str
    dark: str
    caption: str
    width: int


def picture(draw: Callable[[Any], object], size: tuple[float, float], caption: str) -> Picture:
    """What ``draw`` puts on an empty figure, once in each theme.

    :param draw: takes a :class:`matplotlib.figure.Figure`.
    :param size: width and height in inches of 100 CSS pixels.
    :param str caption: what it shows.
    """
    require("matplotlib", purpose="A report")
    from matplotlib import style
    from matplotlib.figure import Figure

    encoded = []
    for theme in (_LIGHT, _DARK):
        # From matplotlib's defaults, so that the reader's page does not depend on the writer's settings.
        with style.context(["default", {**_STYLE, **theme}]):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=_DPI)
        encoded.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
    return Picture(encoded[0], encoded[1], caption, round(size[0] * 100))


def of_predictions(fidelity: Fidelity) -> list[Picture]:
    """Uncertainty by input, calibration, histograms of scores, quality against bytes."""
    if not fidelity.per_input:
        return []
    chain, generator = fidelity.per_input["chain"], fidelity.per_input["generator"]
    names = (fidelity.chain_name, "generator")
    total, model = ("entropy", "mi") if "mi" in chain else ("sd", "epistemic")
    captions = {
        model: "Uncertainty of the model about each input, generator against chain. Points on the diagonal agree; a "
        "collapsed generator gives points at the bottom.",
        total: "Total uncertainty about each input, including that of the data.",
    }
    pictures = [
        picture(_on(plots.score_scatter, chain[s], generator[s], score=_WORDS[s], names=names), _SQUARE, caption)
        for s, caption in captions.items()
    ]
    targets = fidelity.per_input.get("targets", {}).get("y")
    if "mi" in chain and targets is not None:
        probs = {names[0]: chain["mean"], names[1]: generator["mean"]}
        caption = "Calibration: accuracy against confidence; on the diagonal they are equal."
        pictures.append(picture(_on(plots.calibration_curve, probs, targets), _SQUARE, caption))
    for score in (total, model):
        pictures += _histograms(fidelity, score, names)
    caption = (
        "Quality against size in bytes. Dashed line: the chain; band: the resolution. Differences within it are not "
        "significant."
    )
    pictures += _separation(fidelity, model, names)
    for metric in ("nll", "rmse", f"mean_{model}"):
        if any(row.name == metric for row in fidelity.rows):
            pictures.append(picture(_on(plots.quality_against_bytes, fidelity, metric), _FLAT, caption))
    return pictures


def of_functions(chain_CSF: Tensor, generator_SF: Tensor, labels: list[str], names: tuple[str, str]) -> list[Picture]:
    """Intervals of a few function values, and where generator draws fall among chain draws."""
    forest = _on(plots.forest, chain_CSF, generator_SF, labels, names=names)
    caption = (
        "Predictions of single draws on a few inputs: median, and the intervals that hold 50 and 90 % of the draws. "
        "R-hat is of the chain alone."
    )
    apart_F = (chain_CSF.flatten(0, 1).median(0).values - generator_SF.median(0).values).abs()
    worst = int(apart_F.argmax())
    ranks = _on(
        plots.rank_bars, chain_CSF[:, :, worst], generator_SF[:, worst], bins=10, label=labels[worst], names=names
    )
    fall = (
        "Where generator draws fall among chain draws, for the prediction that differs most. Flat bars mean the same "
        "distribution."
    )
    return [picture(forest, _WIDE, caption), picture(ranks, _FLAT, fall)]


def of_weights(chain_SD: Tensor, generator_SD: Tensor, names: tuple[str, str]) -> list[Picture]:
    """Spread of each weight, and draws in the plane of principal components."""
    spread = _on(plots.weight_sd, chain_SD, generator_SD, names=names)
    plane = _on(plots.principal_pair, chain_SD, generator_SD, names=names)
    return [
        picture(spread, _SQUARE, "Standard deviation of each weight over draws."),
        picture(plane, _SQUARE, "Draws in the plane of the first two principal components of both sets together."),
    ]


def of_chain(stats: Mapping[str, Any], name: str) -> list[Picture]:
    """The trace of the potential, where the kernel kept it."""
    if "potential" not in stats or not math.isfinite(float(stats["potential"].sum())):
        return []
    caption = "The potential of every draw. Traces of mixed chains overlap; a trend means too short a warm-up."
    return [picture(_on(plots.trace, torch.as_tensor(stats["potential"]), name=name), _WIDE, caption)]


def of_training(log: Mapping[str, Any]) -> list[Picture]:
    """One figure for each series of the training log."""
    series = {n: v for n, v in log.items() if n not in plots.STEPS and len(v) and plots.are_numbers(v)}
    steps = {n: log[n] for n in plots.STEPS if n in log}
    return [
        picture(_curve({**steps, name: values}), _SMALL, f"Training: {name.replace('_', ' ')}.")
        for name, values in series.items()
    ]


def _on(plot: Callable[..., Any], *args: Any, **options: Any) -> Callable[[Any], object]:
    """One plot as a whole figure."""
    return lambda figure: plot(*args, ax=figure.subplots(), **options)


def _curve(log: Mapping[str, Any]) -> Callable[[Any], object]:
    return lambda figure: plots.training_curves(log, [figure.subplots()])


def _separation(fidelity: Fidelity, score: str, names: tuple[str, str]) -> list[Picture]:
    """A ROC curve for each of the first out-of-distribution sets."""
    sides = [fidelity.per_input[side] for side in ("chain", "generator")]
    keys = [key for key in sides[0] if key.startswith(f"{score}[")][:_MAX_SETS]
    return [
        picture(
            _on(
                plots.roc_curve,
                {name: (side[score], side[key]) for name, side in zip(names, sides, strict=True)},
                title=key[len(score) + 1 : -1],
            ),
            _SQUARE,
            f"ROC curve: {key[len(score) + 1 : -1]} against the inputs, by {_WORDS[score].partition(' (')[0]}.",
        )
        for key in keys
    ]


def _histograms(fidelity: Fidelity, score: str, names: tuple[str, str]) -> list[Picture]:
    sides = [fidelity.per_input[side] for side in ("chain", "generator")]
    sets = [key[len(score) + 1 : -1] for key in sides[0] if key.startswith(f"{score}[")]
    keys = [score, *(f"{score}[{name}]" for name in sets)]
    upper = max(1e-12, *(float(side[key].max()) for side in sides for key in keys))
    found = []
    for side, name in zip(sides, names, strict=True):
        outside = {which: side[f"{score}[{which}]"] for which in sets}
        draw = _on(plots.score_histograms, side[score], outside, score=_WORDS[score], upper=upper, title=name)
        found.append(picture(draw, _FLAT, f"Distribution of the {_WORDS[score]} over inputs, by {name}."))
    return found
