# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The frontier of :mod:`benchmarks.distillation`: fidelity against bytes, one panel per network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.distillation_cases import CASES
from benchmarks.distillation_targets import measures

# Colour and marker of each method; stored draws share a colour by precision.
STYLES = {
    "generator": ("black", "o-"),
    "default": ("tab:red", "*"),
    "int2, error feedback": ("tab:red", "v-"),
    "int3, error feedback": ("tab:orange", "^-"),
    "int4, error feedback": ("tab:olive", "<-"),
    "int8, thinned": ("tab:blue", "s--"),
    "int8, herded": ("tab:blue", "s-"),
    "stored, thinned": ("tab:cyan", "D--"),
    "stored, herded": ("tab:cyan", "D-"),
    "low rank + diagonal": ("tab:green", "P-"),
    "SWAG": ("tab:purple", "X-"),
    "flow matching": ("tab:pink", "h-"),
    "mean field": ("tab:gray", "p"),
    "paper": ("tab:brown", "d"),
}
_COLUMNS = 3


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
    page = Figure(figsize=(4.4 * num_columns, 3.4 * num_rows + 1.2), layout="constrained")
    axes = page.subplots(num_rows, num_columns, squeeze=False).flatten()
    for ax, (name, by_seed) in zip(axes, results.items(), strict=False):
        _panel(ax, name, by_seed)
    for ax in axes[len(results) :]:
        ax.remove()
    known: dict[str, Any] = {}
    for ax in axes[: len(results)]:
        known |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = [name for name in (*STYLES, "other draws of the chain") if name in known]
    page.legend(
        [known[name] for name in ordered], ordered, loc="outside lower center", ncols=1 + num_columns, fontsize=8
    )
    page.savefig(folder / "distillation_frontier.png", dpi=110)


def _panel(ax: Any, name: str, by_seed: Mapping[str, Mapping[str, Any]]) -> None:
    labels = list(dict.fromkeys(label for stored in by_seed.values() for label in stored))
    for method, (colour, style) in STYLES.items():
        points = sorted(
            (run["networks"], max(1e-4, 1 - run["by_input"]))
            for label in labels
            if label == method or label.startswith(f"{method}, ")
            if not math.isnan((run := measures(label, by_seed))["by_input"])
        )
        if points:
            ax.plot(*zip(*points, strict=True), style, color=colour, label=method, ms=11 if style == "*" else 5, lw=1.2)
    if "other draws" in labels:
        others = 1 - measures("other draws", by_seed)["by_input"]
        ax.axhline(others, color="black", lw=0.8, ls=":", label="other draws of the chain")
    ax.set(xscale="log", yscale="log", title=name, xlabel="bytes, in networks of float32")
    ax.set_ylabel("1 - correlation of MI over inputs" if _classifies(by_seed) else "1 - correlation of variance")
    ticks = [0.7, 1, 2, 4, 8, 16, 32, 100]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def _classifies(by_seed: Mapping[str, Mapping[str, Any]]) -> bool:
    return "mean_mi" in next(iter(by_seed.values()))["held-out SGLD"]
