# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Targets of :mod:`benchmarks.distillation`, and whether the generator meets them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import markdown_table
from benchmarks.distillation_cases import Case
from benchmarks.distillation_tables import differences

Runs = Mapping[str, Mapping[str, Any]]
_REFERENCE, _OTHERS = "held-out SGLD", "other draws"
_OURS, _FEEDBACK = ("generator,", "default"), ("int4,", "int3,", "int2,")
# What is compared with stored draws of the same bytes.
_OWN = ("networks", "seconds", "total_variation", "mean_shift", "mi_correlation", "epistemic_correlation")
_COMPARED = ("nll", "mean", "by_input", "prediction")


@dataclass(frozen=True)
class Target:
    """Largest differences from held-out draws of the chain, means over seeds; None where nothing is asked.

    :ivar float networks: bytes of the file, in networks of float32.
    :ivar float mean: per cent, of the mean mutual information, or of the variance of a regression's mean.
    :ivar float by_input: smallest correlation of these over inputs.
    :ivar float below_others: in place of ``by_input``: how far below that of other draws of the chain.
    :ivar float ood: per cent, of the means on each out-of-distribution set.
    :ivar float auroc: points, of each out-of-distribution set and score.
    :ivar float seconds: of the fit, CPU.
    """

    networks: float
    seconds: float
    nll: float | None = None
    rmse: float | None = None
    mean: float | None = None
    by_input: float | None = None
    below_others: float | None = None
    ood: float | None = None
    auroc: float | None = None


_REGRESSION = (Target(12.0, 3.0, rmse=2.0, mean=5.0),)
TARGETS: dict[str, tuple[Target, ...]] = {
    "mnist": (
        Target(1.5, 8.0, nll=1.0, mean=2.0, by_input=0.985, ood=3.0, auroc=0.2),
        Target(3.2, 10.0, nll=0.5, mean=2.0, by_input=0.991, ood=2.0, auroc=0.2),
    ),
    "mnist400": (Target(2.0, 40.0, nll=1.0, mean=3.0, below_others=0.008, ood=4.0, auroc=0.5),),
    "digits": (Target(5.0, 3.0, nll=1.0, mean=3.0, by_input=0.98, ood=4.0, auroc=0.2),),
    "digits8": (Target(11.0, 20.0, nll=2.0, mean=5.0, by_input=0.98, ood=5.0, auroc=0.3),),
    "conv": (Target(2.0, 120.0, nll=2.0, mean=5.0, by_input=0.97),),
    "resnet20": (Target(4.0, 120.0, nll=2.0, mean=5.0, by_input=0.97),),
    "mlp1m": (Target(2.0, 120.0, nll=2.0, mean=5.0),),
    "yacht": _REGRESSION,
    "concrete": _REGRESSION,
}


def measures(label: str, by_seed: Runs) -> dict[str, float]:
    """Of a run, means over seeds: differences of :class:`Target`; of several sets, the one farthest from zero."""
    runs = [(stored[label], stored[_REFERENCE]) for stored in by_seed.values() if label in stored]
    totals: dict[str, float] = {}
    for run, reference in runs:
        for name, _, size in differences(run, reference):
            totals[name] = totals.get(name, 0.0) + size / len(runs)
        for name in _OWN:
            if name in run:
                totals[f"={name}"] = totals.get(f"={name}", 0.0) + run[name] / len(runs)
    model = "mi" if "mean_mi" in totals else "epistemic"
    found = {name: totals[name] for name in ("nll", "rmse") if name in totals}
    found["mean"] = totals[f"mean_{model}"]
    found["by_input"] = totals[f"={model}_correlation"]
    for name, start in (("ood", f"mean_{model}["), ("auroc", "auroc_")):
        of_sets = [value for key, value in totals.items() if key.startswith(start)]
        if of_sets:
            found[name] = max(of_sets, key=abs)
    found["prediction"] = totals.get("=total_variation", totals.get("=mean_shift", math.nan))
    return found | {"networks": totals.get("=networks", 0.0), "seconds": totals.get("=seconds", 0.0)}


def targets(case: Case, by_seed: Runs) -> str:
    """For each target of the case, the largest of our runs within its bytes, and whether it meets it."""
    header = ["bytes, networks", "run", "networks", "NLL %", "RMSE %", "MI or variance %", "by input"]
    header += ["OOD %", "AUROC", "fit, CPU s", "verdict"]
    rows = []
    for target in TARGETS.get(case.name, ()):
        found = {label: measures(label, by_seed) for label in _labels(by_seed, _OURS)}
        within = {label: run for label, run in found.items() if run["networks"] <= target.networks}
        if not within:
            rows.append([f"<= {target.networks:g}", "none", *[""] * 8, "missed"])
            continue
        label = max(within, key=lambda label: within[label]["networks"])
        run, others = within[label], measures(_OTHERS, by_seed)
        cells = [_cell(run, name, getattr(target, name)) for name in ("nll", "rmse", "mean")]
        smallest = target.by_input
        if target.below_others is not None:
            smallest = others["by_input"] - target.below_others
        by_input = f"{run['by_input']:.4f}"
        if smallest is not None:
            by_input += f" (>= {smallest:.4f}) {'met' if run['by_input'] >= smallest else 'missed'}"
        cells += [by_input, *(_cell(run, name, getattr(target, name)) for name in ("ood", "auroc", "seconds"))]
        missed = sum(cell.endswith("missed") for cell in cells)
        verdict = f"missed {missed}" if missed else "met"
        rows.append([f"<= {target.networks:g}", label, f"{run['networks']:.2f}", *cells, verdict])
    return f"\n#### {case.name}: targets\n\n{markdown_table(header, rows)}" if rows else ""


def at_equal_bytes(case: Case, by_seed: Runs) -> str:
    """At each size, the generator and the best of stored draws with error feedback, metric by metric.

    Prediction: total variation of the averaged prediction; of a regression, its shift in standard deviations.
    """
    header = ["networks", "NLL %", "MI or variance %", "by input", "prediction", "generator is nearer in"]
    rows = []
    for networks in case.networks:
        label = f"generator, {networks:g}"
        stored = [name for name in _labels(by_seed, _FEEDBACK) if name.endswith(f", {networks:g}")]
        if label not in _labels(by_seed, _OURS) or not stored:
            continue
        own, others = measures(label, by_seed), {name: measures(name, by_seed) for name in stored}
        cells, nearer = [], 0
        for name in _COMPARED:
            best = min(others, key=lambda other: _error(others[other], name))
            nearer += _error(own, name) < _error(others[best], name)
            form = ".4f" if name in ("by_input", "prediction") else "+.1f"
            cells.append(f"{own[name]:{form}}; {others[best][name]:{form}} ({best.partition(',')[0]})")
        rows.append([f"{networks:g}", *cells, f"{nearer} of {len(_COMPARED)}"])
    if not rows:
        return ""
    title = f"\n#### {case.name}: generator; best of stored draws with error feedback, of the same bytes"
    return f"{title}\n\n{markdown_table(header, rows)}"


def _labels(by_seed: Runs, starts: tuple[str, ...]) -> Sequence[str]:
    return [label for label in dict.fromkeys(key for stored in by_seed.values() for key in stored)
            if label.startswith(starts)]  # fmt: skip


def _cell(run: Mapping[str, float], name: str, limit: float | None) -> str:
    if name not in run:
        return ""
    value = f"{run[name]:.1f}" if name == "seconds" else f"{run[name]:+.2f}"
    return value if limit is None else f"{value} ({limit:g}) {'met' if abs(run[name]) <= limit else 'missed'}"


def _error(run: Mapping[str, float], name: str) -> float:
    return 1 - run[name] if name == "by_input" else abs(run[name])
