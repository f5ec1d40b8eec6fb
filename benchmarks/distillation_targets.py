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
_NAMES = {"nll": "NLL", "mean": "MI or variance", "by_input": "input by input", "prediction": "prediction"}


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
    "mlp10m": (Target(2.0, 900.0, nll=2.0, mean=5.0),),
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
    """Of each target, the largest of our runs within its bytes, and whether it meets it: table and list."""
    names = ("NLL %", "RMSE %", "MI or variance %", "by input", "OOD %", "AUROC", "fit, CPU s")
    rows, verdicts = [], []
    for target in TARGETS.get(case.name, ()):
        size = f"<= {target.networks:g}"
        found = {label: measures(label, by_seed) for label in _labels(by_seed, _OURS)}
        within = {label: run for label, run in found.items() if run["networks"] <= target.networks}
        if not within:
            rows.append([size, "none", "", *("" for _ in names), "missed"])
            verdicts.append(f"* {case.name}, {size} networks: missed, no run")
            continue
        label = max(within, key=lambda label: within[label]["networks"])
        cells = _judged(target, within[label], by_seed)
        missed = [f"{name} {cell}" for name, cell in zip(names, cells, strict=True) if cell.endswith("missed")]
        verdict = f"missed {len(missed)}" if missed else "met"
        rows.append([size, label, f"{within[label]['networks']:.2f}", *cells, verdict])
        verdicts.append(f"* {case.name}, {size} networks: {'; '.join(missed) or 'met'}")
    if not rows:
        return ""
    table = markdown_table(["bytes, networks", "run", "networks", *names, "verdict"], rows)
    return f"\n#### {case.name}: targets\n\n{table}\n\n" + "\n".join(verdicts)


def _judged(target: Target, run: Mapping[str, float], by_seed: Runs) -> list[str]:
    """Each metric of a run with its limit, and whether it is met."""
    smallest = target.by_input
    if target.below_others is not None:
        smallest = measures(_OTHERS, by_seed)["by_input"] - target.below_others
    by_input = f"{run['by_input']:.4f}"
    if smallest is not None:
        by_input += f" (>= {smallest:.4f}) {'met' if run['by_input'] >= smallest else 'missed'}"
    before = [_cell(run, name, getattr(target, name)) for name in ("nll", "rmse", "mean")]
    return [*before, by_input, *(_cell(run, name, getattr(target, name)) for name in ("ood", "auroc", "seconds"))]


def at_equal_bytes(case: Case, by_seed: Runs) -> str:
    """At each size, the generator and the best of stored draws with error feedback, metric by metric; where they draw
    level.

    Prediction: total variation of the averaged prediction; of a regression, its shift in standard deviations.
    """
    pairs = _pairs(case, by_seed)
    header = ["networks", "NLL %", "MI or variance %", "by input", "prediction", "generator is nearer in", "seeds"]
    rows = []
    for networks, pair in pairs.items():
        cells = []
        for name, (own, (bits, other)) in pair.metrics.items():
            form = ".4f" if name in ("by_input", "prediction") else "+.1f"
            cells.append(f"{own:{form}}; {other:{form}} ({bits})")
        nearer = sum(_distance(own, name) < _distance(other, name) for name, (own, (_, other)) in pair.metrics.items())
        rows.append([f"{networks:g}", *cells, f"{nearer} of {len(_COMPARED)}", ", ".join(pair.seeds)])
    if not rows:
        return ""
    title = f"\n#### {case.name}: generator; best of stored draws with error feedback, of the same bytes"
    return f"{title}\n\n{markdown_table(header, rows)}\n\n{level(case, by_seed)}"


def level(case: Case, by_seed: Runs) -> str:
    """From which size on stored draws with error feedback are as near to the chain as the generator, by metric.

    As near: at this size and all larger ones, the best of them differs from the held-out draws no more than the
    generator of the same bytes does, or than other draws of the chain do.
    """
    pairs, found = _pairs(case, by_seed), []
    for name in _COMPARED:
        first = None
        for networks, pair in sorted(pairs.items(), reverse=True):
            own, (_, other) = pair.metrics[name]
            if _distance(other, name) > max(_distance(own, name), _distance(pair.others[name], name)):
                break
            first = networks
        if not pairs:
            continue
        found.append(f"{_NAMES[name]} {f'{first:g}' if first else f'not up to {max(pairs):g}'}")
    return f"Error-feedback draws are level from this many networks on: {', '.join(found)}." if found else ""


@dataclass(frozen=True)
class _Pair:
    """Of one size: metric by metric, the generator and the best stored draws; other draws; over which seeds."""

    metrics: Mapping[str, tuple[float, tuple[str, float]]]
    others: Mapping[str, float]
    seeds: Sequence[str]


def _pairs(case: Case, by_seed: Runs) -> dict[float, _Pair]:
    """By size; of seeds that have both."""
    found = {}
    for networks in case.networks:
        label, size = f"generator, {networks:g}", f", {networks:g}"
        shared = {
            seed: stored
            for seed, stored in by_seed.items()
            if label in stored and any(key.startswith(_FEEDBACK) and key.endswith(size) for key in stored)
        }
        if not shared:
            continue
        own, others = measures(label, shared), measures(_OTHERS, shared) if _has(_OTHERS, shared) else {}
        # Of bits that all these seeds have.
        stored_runs = {
            name: measures(name, shared)
            for name in _labels(shared, _FEEDBACK)
            if name.endswith(size) and _has(name, shared)
        }
        if not stored_runs:
            continue
        metrics = {}
        for name in _COMPARED:
            best = min(stored_runs, key=lambda other, name=name: _error(stored_runs[other], name))
            metrics[name] = (own[name], (best.partition(",")[0], stored_runs[best][name]))
        found[networks] = _Pair(metrics, {name: others.get(name, math.nan) for name in _COMPARED}, tuple(shared))
    return found


def _has(label: str, by_seed: Runs) -> bool:
    return all(label in stored for stored in by_seed.values())


def _labels(by_seed: Runs, starts: tuple[str, ...]) -> Sequence[str]:
    return [label for label in dict.fromkeys(key for stored in by_seed.values() for key in stored)
            if label.startswith(starts)]  # fmt: skip


def _cell(run: Mapping[str, float], name: str, limit: float | None) -> str:
    if name not in run:
        return ""
    value = f"{run[name]:.1f}" if name == "seconds" else f"{run[name]:+.2f}"
    return value if limit is None else f"{value} ({limit:g}) {'met' if abs(run[name]) <= limit else 'missed'}"


def _error(run: Mapping[str, float], name: str) -> float:
    return _distance(run[name], name)


def _distance(value: float, name: str) -> float:
    """From a perfect copy of the chain; zero where there is no value."""
    if math.isnan(value):
        return 0.0
    return 1 - value if name == "by_input" else abs(value)
