# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What each way to store a posterior loses, by bytes.

``python -m benchmarks.distillation [--data toy|digits|digits8|concrete|yacht|uci|mnist|mnist400|all] [--quick]``

Chains are sampled once and cached (see :mod:`benchmarks.distillation_cases`). Every method is fitted to the same draws
and compared with the same number of draws that were held out from all methods. Other draws of the chain are compared in
the same way; their difference is the resolution of the comparison. Results are stored one by one; stored results are
computed again only with ``--again``.

``--rows validation`` compares on rows that are neither for training nor for testing, and without the
out-of-distribution sets. Settings are to be chosen by these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.distillation_cases import CASES, Case, Problem, split
from benchmarks.distillation_methods import (
    Material,
    Method,
    aligned,
    as_int8,
    default,
    flow_matching,
    herded,
    low_rank,
    mean_field,
    ours,
    ours_int8,
    paper,
    thinned,
    timed,
)
from pyro_apd.diagnostics.comparison.evaluation import Evaluation, Inputs, evaluate, similarities
from pyro_apd.models.layout import Layout
from pyro_apd.predictive.predictive import outputs

NUM_DRAWS = 100
# Names for several cases.
SEVERAL = {"uci": ("concrete", "yacht"), "all": tuple(CASES)}
METHODS: dict[str, Method] = {
    "stored, thinned": thinned,
    "stored, herded": herded,
    "stored in int8, thinned": as_int8(thinned),
    "stored in int8, herded": as_int8(herded),
    "low rank + diagonal": low_rank,
    "flow matching": flow_matching,
    "ours": ours,
    "ours, int8": ours_int8,
}
# Methods of one size only.
FIXED: dict[str, Method] = {
    "default": default,
    "default, chains aligned": aligned,
    "mean field": mean_field,
    **{f"paper, {name}": paper(name, 300) for name in ("wgan-gp", "wgan", "lsgan", "non-saturating")},
}
# Goals: largest difference from 100 held-out draws by metric, in points or per cent.
POINTS = {"accuracy": 0.1, "one_draw_accuracy": 0.3, "auroc": 0.5}
PER_CENT = {"nll": 1.0, "mean_mi": 5.0}
SEVERAL_MODES = {"accuracy": 0.3, "one_draw_accuracy": 0.5, "auroc": 1.0, "nll": 2.0, "mean_mi": 8.0}


def predictions(problem: Problem, layout: Layout, theta_SD: Tensor, rows: str) -> Evaluation:
    """Predictions of draws on the rows to compare on, and out of distribution."""
    x, y = problem.test if rows == "test" else problem.validation or problem.train
    ood = problem.ood if rows == "test" else {}
    draws = layout.constrain(theta_SD)
    sets = {name: (value, None) for name, value in ood.items()}
    if y.is_floating_point():
        return evaluate(problem.model, draws, layout.names, Inputs((x, None), {}, (x, y), y, sets))
    values = {"": outputs(problem.model, draws, x).probs_SNK}
    values |= {name: outputs(problem.model, draws, value).probs_SNK for name, value in ood.items()}
    log_prob_SN = values[""].gather(-1, y.expand(len(theta_SD), -1).unsqueeze(-1)).squeeze(-1).log()
    return Evaluation(theta_SD, "classes", values, log_prob_SN, y)


def compared(reference: Evaluation, other: Evaluation) -> dict[str, float]:
    """All metrics of a set of draws, and those relative to the reference."""
    return {**other.metrics(), **similarities(reference, other)}


def novelty(train_ND: Tensor, held_ND: Tensor, theta_SD: Tensor) -> dict[str, float]:
    """Whether draws are new, in units of each weight's standard deviation.

    ``nearest``: distance of a draw to the nearest training draw, relative to held-out draws (medians); 0 is a
    copy. ``support``: estimated number of distinct draws, by the birthday paradox (Arora, Risteski & Zhang 2018): pairs
    divided by pairs closer than a third of the usual distance; the number of pairs if there are none of these.
    """
    mean_D, sd_D = train_ND.mean(0), train_ND.std(0).clamp_min(1e-12)
    train_ND, held_ND, theta_SD = ((value - mean_D) / sd_D for value in (train_ND, held_ND[:NUM_DRAWS], theta_SD))
    usual = torch.cdist(held_ND, train_ND).amin(1).median()
    apart_SS = torch.cdist(theta_SD, theta_SD)
    num_same = int((apart_SS.triu(1) + torch.ones_like(apart_SS).tril() * 1e9 < usual / 3).sum())
    num_pairs = len(theta_SD) * (len(theta_SD) - 1) // 2
    return {
        "nearest": float(torch.cdist(theta_SD, train_ND).amin(1).median() / usual),
        "support": num_pairs / max(1, num_same) if len(theta_SD) == NUM_DRAWS else float(len(theta_SD)),
    }


def run_seed(case: Case, seed: int, options: argparse.Namespace, stored: dict[str, Any]) -> None:
    """Fits and compares what is missing for a case and seed; fills in ``stored``, and writes it after each."""
    problem = case.build(seed)
    store = case.sample(problem, seed, options.quick)
    train_CTD, held_CHD = split(store.theta_CSD)
    held_ND = held_CHD.transpose(0, 1).flatten(0, 1)
    reference = predictions(problem, store.layout, _spaced(held_ND, NUM_DRAWS), options.rows)
    material = Material(problem, store.layout, train_CTD.contiguous(), seed)
    stored["held-out SGLD"] = compared(reference, reference)
    stored["other draws"] = compared(
        reference, predictions(problem, store.layout, _spaced(material.interleaved(), NUM_DRAWS), options.rows)
    )
    wanted = [(f"{name}, {k:g}", method, k) for name, method in METHODS.items() for k in case.networks]
    # One chain cannot be aligned.
    wanted += [(name, method, 0.0) for name, method in FIXED.items() if len(train_CTD) > 1 or method is not aligned]
    for label, method, networks in wanted:
        if label in stored or (options.methods and not any(label.startswith(name) for name in options.methods)):
            continue
        before = _reset_peak()
        fitted, seconds = timed(method, material, networks)
        beyond = _memory("VmHWM") - before
        torch.manual_seed(1000 + seed)
        theta_SD = fitted.sample(NUM_DRAWS)
        figures = compared(reference, predictions(problem, store.layout, theta_SD, options.rows))
        figures |= novelty(material.interleaved(), held_ND, theta_SD)
        stored[label] = {
            "networks": fitted.num_bytes / (4 * material.size),
            "bytes": fitted.num_bytes,
            "seconds": seconds,
            "peak_bytes": beyond,
            **figures,
        }
        print(f"{case.name} seed {seed} {label}: {seconds:.0f} s, {brief(stored[label], stored)}", flush=True)
        options.save()


def _memory(name: str) -> int:
    """Resident bytes, now (``VmRSS``) or at most (``VmHWM``); 0 if the system does not report it."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _reset_peak() -> int:
    """Resets the peak; returns the resident bytes now."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")
    return _memory("VmRSS")


def _spaced(draws_ND: Tensor, count: int) -> Tensor:
    count = min(count, len(draws_ND))
    return draws_ND[torch.linspace(0, len(draws_ND) - 1, count).round().long()]


def brief(figures: Mapping[str, float], stored: Mapping[str, Any]) -> str:
    """The differences for the goals."""
    return ", ".join(f"{name} {text}" for name, text, _ in differences(figures, stored["held-out SGLD"]))


def differences(figures: Mapping[str, float], chain: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Name, text and size of each difference from the chain: points for shares, per cent for the rest."""
    found = []
    for name, value in figures.items():
        if name == "mi_correlation":
            found.append((name, f"{value:.3f}", value))
        elif name in chain and chain[name] and not name.startswith(("weight_sd", "agreement", "total_variation")):
            is_share = name.startswith(("accuracy", "one_draw", "auroc", "ece"))
            size = 100 * (value - chain[name]) if is_share else 100 * (value / chain[name] - 1)
            found.append((name, f"{size:+.2f}" if is_share else f"{size:+.1f} %", size))
    return found


def table(case: Case, by_seed: Mapping[str, Mapping[str, Any]]) -> str:
    """Means over seeds, one row per method."""
    labels = list(dict.fromkeys(label for stored in by_seed.values() for label in stored))
    chain_names = [name for name, _, _ in differences(*[next(iter(by_seed.values()))["held-out SGLD"]] * 2)]
    header = ["method", "networks", "s", "MB", *(name.replace("mean_", "").replace("_", " ") for name in chain_names)]
    header += ["agreement", "TV", "sd ratio 5 / 50 / 95 %", "nearest", "support"]
    rows = []
    for label in labels:
        runs = [(stored[label], stored["held-out SGLD"]) for stored in by_seed.values() if label in stored]
        cells = [label, _mean(runs, "networks", "{:.1f}"), _mean(runs, "seconds", "{:.0f}")]
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
    return f"\n### {case.name}, seeds {seeds}\n\n{note}\n\n{markdown_table(header, rows)}\n\n{goals(case, by_seed)}"


def summary(case: Case, by_seed: Mapping[str, Mapping[str, Any]]) -> str:
    """The same in few columns: for out-of-distribution sets, the smallest and the largest difference.

    A regression has its RMSE for accuracies, its standard deviation for entropy, the model's variance for information.
    """
    header = ["method", "networks", "s", "accuracy", "one draw", "NLL", "MI", "MI, OOD", "AUROC by entropy, OOD"]
    header += ["AUROC by MI, OOD", "MI input by input", "TV", "nearest", "support"]
    rows = []
    for label in dict.fromkeys(label for stored in by_seed.values() for label in stored):
        runs = [(stored[label], stored["held-out SGLD"]) for stored in by_seed.values() if label in stored]
        if label == "held-out SGLD":
            continue
        sizes = [{name: size for name, _, size in differences(*run)} for run in runs]
        mean = {name: sum(size[name] for size in sizes) / len(sizes) for name in sizes[0]}
        cells = [label, _mean(runs, "networks", "{:.1f}"), _mean(runs, "seconds", "{:.0f}")]
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


def goals(case: Case, by_seed: Mapping[str, Mapping[str, Any]]) -> str:
    """Which goals our default generator meets, on means over seeds."""
    limits = {**POINTS, **PER_CENT} if case.chains.num_chains == 1 else SEVERAL_MODES
    lines = []
    labels = sorted({label for stored in by_seed.values() for label in stored if label.startswith(("ours", "default"))})
    for label in labels:
        totals: dict[str, list[float]] = {}
        for stored in by_seed.values():
            if label in stored:
                for name, _, size in differences(stored[label], stored["held-out SGLD"]):
                    totals.setdefault(name, []).append(size)
        missed = []
        for name, sizes in totals.items():
            mean = sum(sizes) / len(sizes)
            limit = next((value for key, value in limits.items() if name.startswith(key)), None)
            if limit is not None and abs(mean) > limit:
                missed.append(f"{name} {mean:+.2f} (limit {limit:g})")
        lines.append(f"* {label}: " + ("every goal met" if not missed else "missed " + ", ".join(missed)))
    return "\n".join(lines)


def figure(case: Case, by_seed: Mapping[str, Mapping[str, Any]]) -> None:
    """Quality against bytes, one curve per method: ``results/distillation_CASE.png``."""
    from matplotlib.figure import Figure

    names = [name for name in ("nll", "mean_mi") if name in next(iter(by_seed.values()))["held-out SGLD"]]
    names += [name for name in next(iter(by_seed.values()))["held-out SGLD"] if name.startswith("mean_mi[")][:2]
    page = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
    axes = page.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        curves = {method: [f"{method}, {k:g}" for k in case.networks] for method in METHODS}
        for (method, labels), marker in zip({**curves, "default": ["default"]}.items(), "os^vD*PXh", strict=False):
            points = []
            for label in labels:
                runs = [(s[label], s["held-out SGLD"]) for s in by_seed.values() if label in s]
                sizes = [100 * (found[name] / held_out[name] - 1) for found, held_out in runs]
                if runs:
                    points.append((runs[0][0]["networks"], sum(sizes) / len(sizes)))
            ax.plot(*zip(*points, strict=True), marker=marker, label=method) if points else None
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", xlabel="networks of float32", ylabel="% from held-out SGLD", title=name)
        ax.set_yscale("symlog", linthresh=10)
    axes[0].legend(fontsize=7)
    page.savefig(RESULTS / f"distillation_{case.name}.png", dpi=110)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=[*CASES, *SEVERAL], default=["digits"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="only methods whose names begin with this")
    parser.add_argument("--rows", choices=["test", "validation"], default="test")
    parser.add_argument("--again", action="store_true", help="also run what is already stored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="short chains, one seed, nothing stored: checks that it runs"
    )
    return parser.parse_args()


def main() -> None:
    """Prints a table per case."""
    options = parse()
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys(name for choice in options.data for name in SEVERAL.get(choice, (choice,))))
    for name in names:
        case, path = CASES[name], RESULTS / f"distillation_{name}.json"
        is_stored = options.rows == "test" and not options.quick
        known = json.loads(path.read_text()) if is_stored and path.exists() and not options.again else {}

        def save(known: dict[str, Any] = known, name: str = name, is_stored: bool = is_stored) -> None:
            if is_stored:
                write_json(f"distillation_{name}", known)

        options.save = save
        for seed in options.seeds[:1] if options.quick else options.seeds:
            run_seed(case, seed, options, known.setdefault(str(seed), {}))
        print(table(case, known), flush=True)
        print(summary(case, known), flush=True)
        if is_stored:
            figure(case, known)


if __name__ == "__main__":
    main()
