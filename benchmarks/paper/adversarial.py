# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Adversarial inputs: remaining accuracy, and whether uncertainty reveals the attack (the paper's section 4.5).

Inputs are in [-1, 1], and so are sizes: the paper's 0.3 is 15 % of the range, 0.15 for images in [0, 1].

Faithful: attacks on *one* network drawn from the posterior, FGSM of the smallest size that changes its prediction, and
PGD of 40 steps of 0.02 within 0.3 without a random start; made on the posterior itself and transferred from the SGD
network; on validation rows. Corrected: FGSM and PGD within 0.1 and 0.3, from a random start, through one network,
through the mean of several drawn once, and through those drawn again at each step (the adaptive attack), on test rows.
Both report successful attacks separately from all: a weak attack makes detection look good.

The budgets differ in the rows attacked (200 or 500 instead of 2,000, the paper's 6,000) and in the draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import markdown_table
from benchmarks.distillation_cases import Problem
from benchmarks.paper.common import Job, Options, Results, plus_minus
from benchmarks.paper.methods import fitted, methods
from benchmarks.paper.registry import Experiment
from benchmarks.paper.settings import Setting, image_setting
from pyro_apd import adversarial
from pyro_apd.adversarial import Attack

BOUNDS = (-1.0, 1.0)
SOURCE = "SGD"
OWN, TRANSFER = "own", f"from {SOURCE}"


def compared(options: Options) -> list[str]:
    """Whose predictions are attacked."""
    attacked = ("SGD", "MC-dropout", "SGLD", "APD, paper's generator", "APD", "APD, online")
    return [name for name in methods(options) if name in attacked]


def attacks(options: Options) -> dict[str, Attack]:
    """Attacks by name."""
    if options.is_faithful:
        sizes = options.by_budget(5, 100, 1000)
        steps = options.by_budget(3, 40, 40)
        return {
            "FGSM, least size": Attack("fgsm_minimal", epsilon=2.0, through="one", num_steps=sizes),
            "PGD 0.3": Attack("pgd", 0.3, "one", num_steps=steps, step_size=0.02, random_start=False),
        }
    draws, steps = options.by_budget(3, 20, 50), options.by_budget(3, 40, 100)
    return {
        f"{method.upper()} {epsilon:g}, {through}": Attack(method, epsilon, through, num_draws=draws, num_steps=steps)
        for epsilon in options.by_budget((0.3,), (0.1, 0.3), (0.05, 0.1, 0.2, 0.3))
        for method in ("fgsm", "pgd")
        for through in ("one", "mean", "expectation")
    }


def rows(options: Options, problem: Problem) -> tuple[Tensor, Tensor]:
    """Inputs that are attacked, evenly spaced so that files sorted by class give all classes; and their classes."""
    x, y = problem.validation if options.is_faithful and problem.validation is not None else problem.test
    chosen = torch.linspace(
        0, len(x) - 1, min(len(x), options.by_budget(40, 500, 6000 if options.is_faithful else 2000))
    )
    index = chosen.round().long().unique().to(x.device)
    return x[index], y[index]


def run(options: Options, results: Results) -> None:
    """One job for each seed, method, and origin of the attack."""
    setting = image_setting(options)
    found: list[Job] = []
    for seed in options.seeds_or([0], [0] if options.has_images else range(3), range(5)):
        for method in compared(options):
            found += [
                (f"{origin}/{method}/{seed}", partial(one, setting, method, origin, seed))
                for origin in (OWN, TRANSFER)
                if not (origin == TRANSFER and method == SOURCE)
            ]
    results.run(found)


def one(setting: Setting, method: str, origin: str, seed: int) -> Mapping[str, Any]:
    """All attacks on one posterior."""
    options = setting.options
    problem = setting.problem(seed)
    x, y = rows(options, problem)
    source = None if origin == OWN else fitted(SOURCE, setting, problem, seed).posterior
    found = adversarial.evaluate(
        problem.model,
        fitted(method, setting, problem, seed).posterior,
        x,
        y,
        attacks(options) if source is None else _through_one(attacks(options)),
        bounds=BOUNDS,
        source=source,
        num_draws=options.by_budget(10, 100, 1000 if options.is_faithful else 200),
        # From the method's name, so that no two methods share the networks that are drawn.
        seed=seed + 1000 * (zlib.crc32(method.encode()) % 1000),
        batch_size=250,
    )
    return {"clean_accuracy": found.clean_accuracy, "case": setting.case.name, **found.to_json()}


def _through_one(tried: Mapping[str, Attack]) -> dict[str, Attack]:
    """The source is one network: attacks through several networks are the same attack."""
    return {name: how for name, how in tried.items() if how.through == "one"}


def table(options: Options, results: Results) -> str:
    """Accuracy without and with attacks, and detection of all and of the successful ones."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, figures in results.figures.items():
        origin, method, _ = key.split("/")
        runs.setdefault((origin, method), []).append(figures)
    case = next((one["case"] for one in results.figures.values()), "nothing yet")
    lines = [f"### Adversarial inputs, {options.protocol} protocol, budget {options.budget} ({case})", ""]
    header = ["posterior", "attack", "clean", "robust", "distance", "entropy", "MI", "variance", "successes"]
    body = []
    for (origin, method), found in runs.items():
        for number, row in enumerate(found[0]["rows"]):
            named = [one["rows"][number] for one in found]
            name = row["name"] if origin == OWN else f"{row['name']}, {origin}"
            body.append([method, name, plus_minus([one["clean_accuracy"] for one in found], ".3f"), *_cells(named)])
    lines.append(markdown_table(header, body))
    count = found[0]["num_data"] if runs else 0
    lines += [
        "",
        f"{count} inputs in [-1, 1]; sizes are in these units, *distance* is the mean largest change of a pixel. "
        "Entropy, MI and variance: AUROC of attacked against clean inputs, all / those on which the attack succeeded. "
        "*Successes*: share of the inputs classified correctly that no longer are. Mean ± sd over seeds, where there "
        "are several.",
    ]
    return "\n".join(lines)


def _cells(named: list[dict[str, Any]]) -> list[str]:
    cells = [plus_minus([one[name] for one in named], ".3f") for name in ("robust_accuracy", "distance")]
    for score in adversarial.SCORES:
        parts = [
            plus_minus([one[which][score] for one in named if one[which][score] is not None], ".3f") or "-"
            for which in ("auroc", "auroc_successes")
        ]
        cells.append(" / ".join(parts))
    return [*cells, plus_minus([one["success_rate"] for one in named if one["success_rate"] is not None], ".3f")]


def figure(options: Options, results: Results) -> list[Path]:
    """Remaining accuracy under each attack, and how well entropy separates it from clean inputs, by posterior."""
    from matplotlib.figure import Figure

    own = results.under(OWN)
    names = list(dict.fromkeys(key.rsplit("/", 1)[0] for key in own))
    tried = [row["name"] for row in next(iter(own.values()))["rows"]]
    picture = Figure(figsize=(11, 7), layout="constrained")
    panels = {
        "accuracy left": lambda row: row["robust_accuracy"],
        "AUROC of attacked against clean inputs, by entropy": lambda row: row["auroc"]["predictive_entropy"],
    }
    for ax, (title, figure_of) in zip(picture.subplots(2, 1), panels.items(), strict=True):
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            runs = [figures for key, figures in own.items() if key.rsplit("/", 1)[0] == name]
            heights = [sum(figure_of(one["rows"][i]) for one in runs) / len(runs) for i in range(len(tried))]
            offset = (place - (len(names) - 1) / 2) * width
            ax.bar([i + offset for i in range(len(tried))], heights, width, label=name)
        ax.set(title=title, ylim=(0, 1))
        ax.axhline(0.5, color="0.6", linewidth=0.8)
        ax.set_xticks(range(len(tried)), [name.replace(", ", "\n", 1) for name in tried], fontsize=7)
    picture.axes[0].legend(fontsize=8, ncols=len(names))
    path = options.results / f"paper_adversarial_{options.label}.png"
    picture.savefig(path, dpi=110)
    return [path]


EXPERIMENT = Experiment(run, table, figure)
