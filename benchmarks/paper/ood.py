# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The paper's anomaly detection: five sets beside MNIST, detected by the uncertainty of 100 draws.

Both protocols present the sets in two ways. *As published*: each set in the range of the authors' code, which is not
MNIST's [-1, 1] (notMNIST [-0.5, 0.5], Omniglot 0 and 1, uniform [0, 1], Gaussian unbounded), times 1, 5, 10 or 20.
*Matched*: all in [-1, 1], so that a set must be detected by its content. Protocols differ in the chain and the methods,
as for the classification.

2,000 images of each set, and the first 2,000 of the test set inside. Out-of-distribution images are the positives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import markdown_table
from benchmarks.distillation_cases import Problem
from benchmarks.paper.common import Options, Results, plus_minus
from benchmarks.paper.methods import METHODS, fitted, methods
from benchmarks.paper.registry import Experiment
from benchmarks.paper.settings import Setting, image_setting
from pyro_apd import ood

NUM_DRAWS, NUM_INSIDE = 100, 2000
SCALES = (1, 5, 10, 20)
SCORES = ("max_probability", "predictive_entropy", "mutual_information", "model_variance")
MATCHED = "matched"


def run(options: Options, results: Results) -> None:
    """Every method on every set."""
    setting = image_setting(options)
    for seed in options.seeds_or((0,), (0,), (0, 1, 2)):
        problem = setting.problem(seed)
        sets = presented(problem, options)
        results.run(
            (f"{seed}/{method}", partial(detected, method, setting, problem, seed, sets))
            for method in methods(options)
            if method not in ("deep ensemble", "SWAG") or not options.is_smoke
        )


def presented(problem: Problem, options: Options) -> dict[str, Tensor]:
    """Inputs by ``set, presentation``."""
    sets = {}
    for name, x in published(problem).items():
        for scale in options.by_budget((1, 20), SCALES, SCALES):
            sets[f"{name}, x {scale}"] = scale * x
    for name, x in problem.ood.items():
        sets[f"{name}, {MATCHED}"] = x
    return sets


def published(problem: Problem) -> dict[str, Tensor]:
    """The sets in the ranges of the authors' code; on the digits, noise replaces missing sets."""
    x = problem.test[0][:NUM_INSIDE]
    generator = torch.Generator().manual_seed(1)
    noise = {
        "Gaussian": torch.randn(x.shape, generator=generator).to(x),
        "uniform": torch.rand(x.shape, generator=generator).to(x),
    }
    if "Omniglot" not in problem.ood:
        return {"inverted": problem.ood["inverted"], **noise}
    return {
        "notMNIST": problem.ood["notMNIST"] / 2,
        # Binary, as the authors' integers are: a pixel is ink if a third of its area is.
        "Omniglot": (problem.ood["Omniglot"] > -1 / 3).to(x),
        "CIFAR grey": problem.ood["CIFAR grey"],
        **noise,
    }


def detected(method: str, setting: Setting, problem: Problem, seed: int, sets: dict[str, Tensor]) -> dict[str, Any]:
    """Values by set, score and metric, with their intervals."""
    options = setting.options
    fit = fitted(method, setting, problem, seed)
    draws = fit.draws(NUM_DRAWS, seed=1000)
    inside = problem.test[0][:NUM_INSIDE]
    num_bootstrap = options.by_budget(20, 100, 1000)
    found = ood.evaluate(problem.model, draws, inside, sets, SCORES, num_bootstrap=num_bootstrap, seed=seed)
    figures: dict[str, Any] = {}
    for detection in found.detections:
        by_metric = {
            name: [round(value, 5) for value in (figure.value, figure.low, figure.high)]
            for name, figure in detection.metrics.items()
        }
        figures.setdefault(detection.out, {})[detection.score] = by_metric
    return {"bytes": fit.num_bytes, "sets": figures}


def table(options: Options, results: Results) -> str:
    """AUROC by set and presentation; the paper's table at scale 5; and the difference of each from SGLD."""
    data = "MNIST, 784-100-10" if options.has_images else "digits, 64-50-10"
    seeds = sorted({key.split("/")[0] for key in results.figures})
    intro = (
        f"{data}, {NUM_DRAWS} draws, seeds {', '.join(seeds)}. AUROC x 100 by entropy / by mutual information; a "
        "single draw, and draws that agree, have no mutual information and hence 50."
    )
    known = [name for name in METHODS if any(f"{seed}/{name}" in results.figures for seed in seeds)]
    sets = list(next(iter(results.figures.values()))["sets"])
    rows = []
    for name in sets:
        cells = [
            " / ".join(_mean(results, seeds, method, name, score, "auroc") for score in SCORES[1:3]) for method in known
        ]
        rows.append([name, *cells])
    parts = [
        f"### Out of distribution, {options.protocol} protocol, {options.budget} budget",
        intro,
        markdown_table(["set", *known], rows),
    ]
    wanted = [name for name in sets if name.endswith(", x 5")] or [name for name in sets if name.endswith(", x 20")]
    parts += [
        "In the paper's form, ROC PR(+) PR(-) x 100 by largest probability:",
        _published(results, seeds, known, wanted),
    ]
    return "\n\n".join([*parts, *differences(results, seeds, known, sets)])


def _published(results: Results, seeds: list[str], known: list[str], sets: list[str]) -> str:
    rows = []
    for name in sets:
        metrics = ("auroc", "aupr_out", "aupr_in")
        cells = [
            " ".join(_mean(results, seeds, method, name, "max_probability", metric) for metric in metrics)
            for method in known
        ]
        rows.append([name, *cells])
    return markdown_table(["set", *known], rows)


def differences(results: Results, seeds: list[str], known: list[str], sets: list[str]) -> list[str]:
    """One line per method: largest and mean difference of its AUROC from SGLD's, in points."""
    if "SGLD" not in known:
        return []
    lines = []
    for method in known:
        if method == "SGLD":
            continue
        cells = []
        for score in ("predictive_entropy", "mutual_information"):
            gaps = [
                100 * (_values(results, seed, method, n, score) - _values(results, seed, "SGLD", n, score))
                for seed in seeds
                if {f"{seed}/{method}", f"{seed}/SGLD"} <= set(results.figures)
                for n in sets
            ]
            if gaps:
                worst = max(gaps, key=abs)
                cells.append(f"{score.replace('_', ' ')} {sum(gaps) / len(gaps):+.2f}, at most {worst:+.2f}")
        lines.append(f"* {method}: {'; '.join(cells)}")
    if not lines:
        return []
    return ["AUROC less SGLD's, in points, mean over sets and the largest:", "\n".join(lines)]


def _values(results: Results, seed: str, method: str, name: str, score: str, metric: str = "auroc") -> float:
    value: float = results.figures[f"{seed}/{method}"]["sets"][name][score][metric][0]
    return value


def _mean(results: Results, seeds: list[str], method: str, name: str, score: str, metric: str) -> str:
    having = [seed for seed in seeds if f"{seed}/{method}" in results.figures]
    return plus_minus([100 * _values(results, seed, method, name, score, metric) for seed in having], ".1f")


def figure(options: Options, results: Results) -> list[Path]:
    """AUROC by entropy and by mutual information against the presentation, one panel per set.

    Means over seeds, and bars from minimum to maximum; for one seed its bootstrap interval.
    """
    from matplotlib.figure import Figure

    found: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(results.figures):
        found.setdefault(key.partition("/")[2], []).append(results.figures[key]["sets"])
    found = {method: found[method] for method in METHODS if method in found}
    by_set: dict[str, list[str]] = {}
    for name in next(iter(found.values()))[0]:
        by_set.setdefault(name.rpartition(", ")[0], []).append(name.rpartition(", ")[2])
    scores = ("predictive_entropy", "mutual_information")
    page = Figure(figsize=(2.5 * len(by_set) + 1.8, 4.6), layout="constrained")
    axes = page.subplots(2, len(by_set), squeeze=False, sharey=True)
    draw: Callable[..., Any] = partial(_panel, found)
    for row, score in zip(axes, scores, strict=True):
        for ax, (name, ways) in zip(row, by_set.items(), strict=True):
            draw(ax, name, [MATCHED] * (MATCHED in ways) + [way for way in ways if way != MATCHED], score)
        row[0].set_ylabel(f"AUROC, {score.replace('_', ' ')}", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside right upper", fontsize=8)
    path = options.results / f"paper_ood_{options.label}.png"
    page.savefig(path, dpi=110)
    return [path]


def _panel(found: dict[str, list[dict[str, Any]]], ax: Any, name: str, ways: list[str], score: str) -> None:
    for i, (method, by_seed) in enumerate(found.items()):
        bars = [_bar([sets[f"{name}, {way}"][score]["auroc"] for sets in by_seed]) for way in ways]
        at = [k + 0.06 * (i - len(found) / 2) for k in range(len(ways))]
        errors = [[max(0.0, bar[0] - bar[1]) for bar in bars], [max(0.0, bar[2] - bar[0]) for bar in bars]]
        ax.errorbar(at, [bar[0] for bar in bars], errors, fmt="os^vD*Px"[i % 8], ms=4, lw=1, label=method)
    ax.set_xticks(range(len(ways)), ways, fontsize=7)
    ax.set_xlim(-0.6, len(ways) - 0.4)
    ax.axhline(0.5, color="grey", lw=0.6)
    ax.set_title(name, fontsize=9)


def _bar(intervals: list[list[float]]) -> tuple[float, float, float]:
    """Value and ends, from those of each seed."""
    values = [value for value, *_ in intervals]
    if len(intervals) == 1:
        return intervals[0][0], intervals[0][1], intervals[0][2]
    return sum(values) / len(values), min(values), max(values)


EXPERIMENT = Experiment(run, table, figure)
