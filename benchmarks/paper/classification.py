# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The paper's classification table: accuracy and calibration on MNIST, of the average over 100 draws.

50,000 rows for training, 10,000 for validation, 10,000 for testing; 784-100-10 and, with the full budget,
784-400-400-10. Each method is fitted once per seed and drawn from several times. The paper's ± is over draws from one
chain and one generator; here the spread over re-draws and the spread over chains (seeds) are separate. Neither is a
standard error of the test set, which for 98 % of 10,000 rows is 0.14 points.

Faithful: the methods of the paper. Corrected: a chain with sufficient burn-in, and the baselines that were missing. See
:mod:`benchmarks.paper.settings` for the chains, and :mod:`benchmarks.paper.methods` for the fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.common import markdown_table
from benchmarks.distillation_cases import Problem
from benchmarks.paper.common import Options, Results, mean_and_sd, plus_minus
from benchmarks.paper.methods import METHODS, Fitted, fitted, methods
from benchmarks.paper.registry import Experiment
from benchmarks.paper.settings import Setting, image_setting
from pyro_apd import metrics, reduce_outputs

NUM_DRAWS = 100
FIGURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": metrics.accuracy,
    "nll": metrics.negative_log_likelihood,
    "ece": metrics.expected_calibration_error,
    "brier": metrics.brier_score,
}
#: Test errors in per cent on 784-400-400-10 by Balan et al. (2015), to check against.
DARK_KNOWLEDGE = "SGD 1.54 %, SGLD 1.27 %, distilled 1.31 %"


def run(options: Options, results: Results) -> None:
    """Fits every method and draws from it several times."""
    for hidden in networks(options):
        setting = image_setting(options, hidden)
        for seed in options.seeds_or((0,), (0,), (0, 1, 2)):
            problem = setting.problem(seed)
            results.run(
                (f"{name_of(hidden)}/{seed}/{method}", _job(method, setting, problem, seed))
                for method in methods(options)
            )


def networks(options: Options) -> tuple[tuple[int, ...], ...]:
    """Hidden layers of the networks: those requested, else the larger one if there is time."""
    if options.networks is not None and options.has_images:
        return options.networks
    return ((100,), (400, 400)) if options.budget == "full" and options.has_images else ((100,),)


def name_of(hidden: tuple[int, ...]) -> str:
    """Names such as ``100`` and ``400-400``."""
    return "-".join(map(str, hidden))


def _job(method: str, setting: Setting, problem: Problem, seed: int) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        fit = fitted(method, setting, problem, seed)
        return evaluated(fit, problem, setting.options)

    return work


def evaluated(fit: Fitted, problem: Problem, options: Options) -> dict[str, Any]:
    """Each metric, once per re-draw; size, time and warnings of the fit."""
    x, y = problem.test
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    first: dict[str, Tensor] = {}
    for i in range(options.by_budget(2, 3, 10)):
        draws = fit.draws(NUM_DRAWS, seed=1000 + i)
        if first and all(draws[name].equal(value) for name, value in first.items()):
            break  # all stored draws are used: there are no other draws
        first = first or draws
        probs_NK = reduce_outputs(problem.model, draws, x, names="mean_probability")["mean_probability"]
        for name, figure in FIGURES.items():
            found[name].append(figure(probs_NK, y))
    size = sum(value[0].numel() for value in first.values())
    facts = {"fit_seconds": round(fit.seconds, 1), "bytes": fit.num_bytes, "networks": fit.num_bytes / (4 * size)}
    return {**facts, "notes": fit.notes, **found}


def table(options: Options, results: Results) -> str:
    """A table per network."""
    parts = [f"### Classification, {options.protocol} protocol, {options.budget} budget"]
    for network in dict.fromkeys(key.split("/")[0] for key in results.figures):
        by_seed: dict[str, dict[str, dict[str, Any]]] = {}
        for key, found in results.under(network).items():
            seed, _, method = key.partition("/")
            by_seed.setdefault(method, {})[seed] = found
        known = [method for method in METHODS if method in by_seed]
        rows = [_row(method, list(by_seed[method].values())) for method in known]
        data = f"MNIST, 784-{network}-10" if options.has_images else "digits, 64-50-10"
        head = ["method", "accuracy, %", "NLL", "ECE", "Brier", "networks kept", "seconds to fit"]
        parts += [f"{data}, {NUM_DRAWS} draws. {_note(by_seed)}", markdown_table(head, rows)]
        if network == "400-400":
            parts.append(f"Test error of Balan et al. (2015) on this network: {DARK_KNOWLEDGE}.")
    return "\n\n".join(parts)


def _row(method: str, found: list[dict[str, Any]]) -> list[str]:
    cells = [method]
    for name in FIGURES:
        scale, form = (100, ".2f") if name == "accuracy" else (1, ".4f")
        within = [mean_and_sd([scale * value for value in one[name]]) for one in found]
        mean, over_chains = mean_and_sd([mean for mean, _ in within])
        over_draws = sum(sd for _, sd in within) / len(within)
        spread = f" ± {over_draws:{form}}" if over_draws == over_draws else ""
        spread += f" ± {over_chains:{form}}" if over_chains == over_chains else ""
        cells.append(f"{mean:{form}}{spread}")
    return [*cells, f"{found[0]['networks']:.1f}", plus_minus([one["fit_seconds"] for one in found], ".0f")]


def _note(by_seed: dict[str, dict[str, dict[str, Any]]]) -> str:
    seeds = sorted({seed for found in by_seed.values() for seed in found})
    spread = "± sd over re-draws" + (", then ± sd over chains" if len(seeds) > 1 else "")
    return f"Seeds {', '.join(seeds)}; {spread}; a single value: all stored draws are used."


EXPERIMENT = Experiment(run, table)
