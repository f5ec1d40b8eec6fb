# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tables of :mod:`benchmarks.distillation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common import markdown_table
from benchmarks.distillation_cases import Case

# Rows of a table: the chain first, then ours, then what it is compared with; by size within a method.
METHOD_ORDER = (
    "held-out SGLD",
    "other draws",
    "default",
    "generator",
    "int4, error feedback",
    "int3, error feedback",
    "int2, error feedback",
    "int8, thinned",
    "int8, herded",
    "stored, thinned",
    "stored, herded",
    "SWAG",
    "flow matching",
    "low rank + diagonal",
    "mean field",
    "paper",
)


def ordered(by_seed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Labels of all results, in the order of a table."""

    def place(label: str) -> tuple[int, float]:
        known = [i for i, name in enumerate(METHOD_ORDER) if label == name or label.startswith(f"{name}, ")]
        size = label.rpartition(", ")[2]
        return known[0] if known else len(METHOD_ORDER), float(size) if size.replace(".", "").isdigit() else 0.0

    return sorted(dict.fromkeys(label for stored in by_seed.values() for label in stored), key=place)


def _with_seeds(label: str, by_seed: Mapping[str, Mapping[str, Any]]) -> str:
    """The label, with the seeds that have it where these are not all."""
    seeds = [seed for seed, stored in by_seed.items() if label in stored]
    if len(seeds) == len(by_seed):
        return label
    return f"{label} (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})"


def brief(figures: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """The differences for the goals."""
    return ", ".join(f"{name} {text}" for name, text, _ in differences(figures, stored["held-out SGLD"]))


def differences(figures: Mapping[str, Any], chain: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Name, text and size of each difference from the chain: points for shares, per cent for the rest."""
    found: list[tuple[str, str, float]] = []
    for name, value in figures.items():
        if isinstance(value, str):  # date and commit
            continue
        if name == "mi_correlation":
            found.append((name, f"{value:.3f}", value))
        elif name in chain and chain[name] and not name.startswith(("weight_sd", "agreement", "total_variation")):
            is_share = name.startswith(("accuracy", "one_draw", "auroc", "ece"))
            size = 100 * (value - chain[name]) if is_share else 100 * (value / chain[name] - 1)
            found.append((name, f"{size:+.2f}" if is_share else f"{size:+.1f} %", size))
    return found


def table(case: Case, by_seed: Mapping[str, Mapping[str, Any]]) -> str:
    """Means over seeds, one row per method."""
    labels = ordered(by_seed)
    chain_names = [name for name, _, _ in differences(*[next(iter(by_seed.values()))["held-out SGLD"]] * 2)]
    header = [
        "method",
        "networks",
        "CPU s",
        "MB",
        *(name.replace("mean_", "").replace("_", " ") for name in chain_names),
    ]
    header += ["agreement", "TV", "sd ratio 5 / 50 / 95 %", "nearest", "support"]
    rows = []
    for label in labels:
        runs = [(stored[label], stored["held-out SGLD"]) for stored in by_seed.values() if label in stored]
        cells = [_with_seeds(label, by_seed)]
        cells += [_mean(runs, "networks", "{:.2f}"), _mean(runs, "seconds", "{:.1f}")]
        cells.append(f"{sum(run[0].get('peak_bytes', 0) for run in runs) / len(runs) / 1e6:.0f}")
        for name in chain_names:
            sizes = [dict((n, s) for n, _, s in differences(*run)).get(name, float("nan")) for run in runs]
            mean = sum(sizes) / len(sizes)
            if label == "held-out SGLD":
                cells.append(f"{sum(run[0][name] for run in runs) / len(runs):.4f}")
            else:
                cells.append(f"{mean:.3f}" if name == "mi_correlation" else f"{mean:+.1f}")
        quantiles = [_mean(runs, f"weight_sd_ratio_{q}", "{:.2f}") for q in (5, 50, 95)]
        cells += [_mean(runs, "agreement", "{:.4f}"), _mean(runs, "total_variation", "{:.4f}"), " / ".join(quantiles)]
        cells += [_mean(runs, "nearest", "{:.2f}"), _mean(runs, "support", "{:.0f}")]
        rows.append(cells)
    seeds = ", ".join(by_seed)
    note = "Held-out SGLD: metrics; below: differences from it, shares in points, the rest in per cent."
    return f"\n### {case.name}, seeds {seeds}\n\n{note}\n\n{markdown_table(header, rows)}"


def summary(case: Case, by_seed: Mapping[str, Mapping[str, Any]]) -> str:
    """The same in few columns: for out-of-distribution sets, the smallest and the largest difference.

    A regression has its RMSE for accuracies, its standard deviation for entropy, the model's variance for information.
    """
    header = ["method", "networks", "CPU s", "accuracy", "one draw", "NLL", "MI", "MI, OOD", "AUROC by entropy, OOD"]
    header += ["AUROC by MI, OOD", "MI input by input", "TV", "nearest", "support"]
    rows = []
    for label in ordered(by_seed):
        runs = [(stored[label], stored["held-out SGLD"]) for stored in by_seed.values() if label in stored]
        if label == "held-out SGLD":
            continue
        sizes = [{name: size for name, _, size in differences(*run)} for run in runs]
        mean = {name: sum(size[name] for size in sizes) / len(sizes) for name in sizes[0]}
        cells = [_with_seeds(label, by_seed)]
        cells += [_mean(runs, "networks", "{:.2f}"), _mean(runs, "seconds", "{:.1f}")]
        total, model = ("entropy", "mi") if "mean_mi" in mean else ("sd", "epistemic")
        first = "rmse" if "rmse" in mean else "accuracy"
        names = (first, "one_draw_accuracy", "nll", f"mean_{model}")
        cells += [f"{mean[name]:+.1f}" if name in mean else "" for name in names]
        for start in (f"mean_{model}[", f"auroc_{total}[", f"auroc_{model}["):
            found = [value for name, value in mean.items() if name.startswith(start)]
            cells.append(f"{min(found):+.1f} to {max(found):+.1f}" if found else "")
        cells.append(_mean(runs, f"{model}_correlation", "{:.3f}"))
        cells += [_mean(runs, name, form) for name, form in
                  (("total_variation", "{:.4f}"), ("nearest", "{:.2f}"), ("support", "{:.0f}"))]  # fmt: skip
        rows.append(cells)
    return f"\n#### {case.name}, seeds {', '.join(by_seed)}\n\n{markdown_table(header, rows)}"


def _mean(runs: list[tuple[Mapping[str, float], Mapping[str, float]]], name: str, form: str) -> str:
    values = [run[0][name] for run in runs if name in run[0]]
    return form.format(sum(values) / len(values)) if values else ""
