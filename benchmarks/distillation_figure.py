# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The frontier of :mod:`benchmarks.distillation`: fidelity against bytes, one panel per network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.distillation_cases import CASES
from benchmarks.distillation_targets import measures

# Colour and style of each method. Stored draws share a colour by precision; thinned ones are dashed.
STYLES = {
    "generator": ("black", "o-"),
    "default": ("black", "*"),
    "int2, error feedback": ("tab:red", "v-"),
    "int3, error feedback": ("tab:orange", "^-"),
    "int4, error feedback": ("tab:olive", "<-"),
    "int8, thinned": ("tab:blue", "s--"),
    "int8, herded": ("tab:blue", "s-"),
    "stored, thinned": ("tab:cyan", "D--"),
    "stored, herded": ("tab:cyan", "D-"),
    "SWAG": ("tab:purple", "X-"),
    "flow matching": ("tab:pink", "h-"),
    "low rank + diagonal": ("tab:green", "P-"),
    "mean field": ("tab:gray", "p"),
    "paper": ("tab:brown", "d"),
}
LEGEND = {
    "generator": "generator, at most so many bytes",
    "default": "generator, default",
    "stored, thinned": "float32, thinned",
    "stored, herded": "float32, herded",
    "paper": "the paper's generator, 300 steps",
}
TITLES = {
    "toy": "the paper's toy, 2-10-10-2",
    "digits": "digits, 64-50-10",
    "digits8": "digits, eight chains",
    "digits_mixed": "digits, four chains that mix",
    "concrete_mixed": "concrete, four chains that mix",
    "concrete": "concrete, 8-50-1",
    "yacht": "yacht, 6-50-1",
    "mnist": "MNIST, 784-100-10",
    "mnist400": "MNIST, 784-400-400-10",
    "mlp1m": "MNIST, a million weights",
    "mlp10m": "MNIST, ten million weights",
    "conv": "MNIST, convolutional",
    "resnet20": "MNIST, ResNet-20",
}
_OTHERS = "other draws of the chain"
_COLUMNS = 3
# A correlation of zero is as bad as none.
_WORST, _BEST = 1.0, 1e-4
# Every panel shows these sizes, in networks, and a range of errors as wide as this.
_BYTES, _DECADE = (0.5, 17.0), 10.0


def frontier(folder: Path) -> None:
    """Draws ``distillation_frontier.png`` of all results ``distillation_CASE.json`` in a folder."""
    from matplotlib.figure import Figure

    results = {}
    for name in CASES:
        path = folder / f"distillation_{name}.json"
        if path.exists() and any(len(stored) > 2 for stored in json.loads(path.read_text()).values()):
            results[name] = json.loads(path.read_text())
    if not results:
        return
    num_columns = min(_COLUMNS, len(results))
    num_rows = -(-len(results) // num_columns)
    page = Figure(figsize=(4.6 * num_columns, 3.7 * num_rows), layout="constrained")
    page.suptitle("What is lost by each way to keep a posterior, by its bytes (lower is better)", fontsize=14)
    axes = page.subplots(num_rows, num_columns, squeeze=False).flatten()
    for ax, (name, by_seed) in zip(axes, results.items(), strict=False):
        _panel(ax, name, by_seed)
    known: dict[str, Any] = {}
    for ax in axes[: len(results)]:
        known |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = [name for name in (*STYLES, _OTHERS) if name in known]
    entries: Any = [known[name] for name in names], [LEGEND.get(name, name) for name in names]
    free = axes[len(results) :]
    for ax in free:
        ax.axis("off")
    if len(free):
        free[0].legend(*entries, loc="center left", fontsize=10, frameon=False)
    else:
        page.legend(*entries, loc="outside lower center", ncols=1 + num_columns, fontsize=10, frameon=False)
    page.savefig(folder / "distillation_frontier.png", dpi=110)


def _panel(ax: Any, name: str, by_seed: Mapping[str, Mapping[str, Any]]) -> None:
    labels = list(dict.fromkeys(label for stored in by_seed.values() for label in stored))
    for method, (colour, style) in STYLES.items():
        points = sorted(
            (run["networks"], min(_WORST, max(_BEST, 1 - run["by_input"])))
            for label in labels
            if label == method or label.startswith(f"{method}, ")
            if not math.isnan((run := measures(label, by_seed))["by_input"])
        )
        if points:
            is_ours = method in ("generator", "default")
            size, width = (13 if style == "*" else 7 if is_ours else 6), (2.4 if is_ours else 1.1)
            look: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6, "zorder": 3 if is_ours else 2}
            ax.plot(*zip(*points, strict=True), style, color=colour, label=method, ms=size, lw=width, **look)
    if "other draws" in labels:
        others = 1 - measures("other draws", by_seed)["by_input"]
        ax.axhline(others, color="black", lw=1, ls=":", label=_OTHERS)
    ax.set(xscale="log", yscale="log", xlabel="bytes, in networks of float32")
    ax.set_title(TITLES.get(name, name), fontsize=11)
    ax.set_ylabel("1 - correlation of " + ("MI over inputs" if _classifies(by_seed) else "variance over inputs"))
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    ax.set(xlim=(min(left, _BYTES[0]), max(right, _BYTES[1])), ylim=(low, max(high, _DECADE * low)))
    _ticks(ax.xaxis, (0.5, 1, 2, 4, 8, 16, 32, 64), *ax.get_xlim())
    _ticks(ax.yaxis, [m * 10.0**k for k in range(-4, 1) for m in (1, 2, 5)], *ax.get_ylim())
    ax.grid(alpha=0.3)


def _ticks(axis: Any, values: Sequence[float], low: float, high: float) -> None:
    """Labels within the limits of an axis, as plain numbers, for less than a decade too."""
    shown = [value for value in values if low <= value <= high]
    axis.set_ticks(shown, [f"{value:g}" for value in shown])
    axis.set_ticks([], minor=True)


def _classifies(by_seed: Mapping[str, Mapping[str, Any]]) -> bool:
    return "mean_mi" in next(iter(by_seed.values()))["held-out SGLD"]
