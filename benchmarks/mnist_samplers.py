# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Samplers on the paper's networks for MNIST, at the same CPU seconds: ``python -m benchmarks.mnist_samplers``.

784-100-10 and 784-400-400-10, prior and batches of the paper: 50,000 rows to train on, 10,000 to choose settings on,
10,000 to test. The paper's SGLD comes first: step size 1e-6, from PyTorch's initialisation, 500 steps of burn-in. The
other methods get the CPU seconds that it took, compiling included and predictions not, and choose their step size by
themselves. Their warm-up is a quarter of the steps of SGLD. Where a run ends depends on the machine; what was drawn up
to there does not.

The paper's pixels are in [-1, 1]. "inputs in [0, 2]" moves them so that the background is 0. Nothing else changes: in
[-1, 1] it adds the sum of the weights of the background to the bias of each hidden unit, so that the prior of biases
is 28 times as wide as the one that is stated.

Results are stored after each run, and stored ones are not computed again. ``--quick`` samples 64-50-10 on the digits
for a few steps, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import pyro_apd as apd
from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.distillation_cases import CASES, Problem
from benchmarks.function_space_networks import cpu_seconds
from benchmarks.paper.common import warnings_noted
from pyro_apd import metrics, reduce_outputs
from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.runtime.global_state import seeded

STEP_SIZE, BATCH_SIZE, BURN_IN = 1e-6, 100, 500
#: Share of the steps of the paper's sampler that the others warm up for.
WARM_UP = 0.25
NAME = "mnist_samplers"
HEADER = ["method", "test error, %", "test NLL", "validation error, %", "validation NLL", "one draw errs, %", "draws"]
HEADER += ["steps", "CPU s", "step size", "said"]

Build = Callable[..., StochasticGradientKernel]


@dataclass(frozen=True)
class Size:
    """A network, and how long it is sampled.

    :ivar str case: in :data:`~benchmarks.distillation_cases.CASES`.
    :ivar int num_steps: of the paper's sampler.
    :ivar int thinning: steps from one draw to the next.
    """

    case: str
    num_steps: int
    thinning: int


SIZES = {
    "784-100-10": Size("mnist", 40_000, 400),
    "784-400-400-10": Size("mnist400", 30_000, 300),
    "64-50-10": Size("digits", 80, 4),
}


def paper(model: apd.BNN, rows: tuple[Tensor, ...], **settings: Any) -> StochasticGradientKernel:
    """As published."""
    return apd.SGLD(model, STEP_SIZE, batch_size=BATCH_SIZE, init_strategy=model.init_to_network, **settings)


def recommended(model: apd.BNN, rows: tuple[Tensor, ...], **settings: Any) -> StochasticGradientKernel:
    """With its defaults."""
    return apd.recommended_kernel(model, *rows, **settings)


def automatic(kernel: Callable[..., StochasticGradientKernel]) -> Build:
    """A kernel with an automatic step."""

    def build(model: apd.BNN, rows: tuple[Tensor, ...], **settings: Any) -> StochasticGradientKernel:
        return kernel(model, "auto", batch_size=BATCH_SIZE, **settings)

    return build


PAPER = "SGLD, paper"
RECOMMENDED = "recommended"
#: Added to a method's name: pixels from 0, the background, to 2, where the paper has -1 to 1.
SHIFTED = ", inputs in [0, 2]"
BUILDS: dict[str, Build] = {
    PAPER: paper,
    RECOMMENDED: recommended,
    "SGHMC": automatic(apd.SGHMC),
    "PSGLD": automatic(apd.PSGLD),
}
METHODS = [*BUILDS, *(name + SHIFTED for name in BUILDS)]


@dataclass
class Average:
    """Class probabilities averaged over draws, and how often single draws err.

    :ivar rows: inputs and labels by name.
    """

    model: apd.BNN
    rows: Mapping[str, tuple[Tensor, Tensor]]
    num_draws: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, draw: Mapping[str, Tensor]) -> None:
        """Adds a draw, by site."""
        one = {name: value[None] for name, value in draw.items()}
        self.num_draws += 1
        for name, (x, y) in self.rows.items():
            probs_NK = reduce_outputs(self.model, one, x, names="mean_probability")["mean_probability"]
            self.sums[name] = self.sums[name] + probs_NK if name in self.sums else probs_NK.clone()
            self.errors[name] = self.errors.get(name, 0.0) + 1 - metrics.accuracy(probs_NK, y)

    def measured(self) -> dict[str, dict[str, float]]:
        """Error and NLL of the average, and the mean error of single draws, by rows."""
        found = {}
        for name, (_, y) in self.rows.items():
            probs_NK = self.sums[name] / self.num_draws
            found[name] = {
                "error": 1 - metrics.accuracy(probs_NK, y),
                "nll": metrics.negative_log_likelihood(probs_NK, y),
                "error_of_one": self.errors[name] / self.num_draws,
            }
        return found


def run(
    kernel: StochasticGradientKernel,
    problem: Problem,
    num_warmup: int,
    *,
    num_steps: float = math.inf,
    budget: float = math.inf,
) -> dict[str, Any]:
    """Samples for so many steps, or for a ``budget`` of CPU seconds, and evaluates the average over draws.

    :param int num_warmup: draws of warm-up.
    """
    rows = {"test": problem.test}
    if problem.validation is not None:
        rows["validation"] = problem.validation
    average, begun, spent, index = Average(problem.model, rows), cpu_seconds(), 0.0, 0
    with warnings_noted() as notes:
        kernel.setup(num_warmup, *problem.train)
        params = dict(kernel.initial_params or {})
        while average.num_draws == 0 or (
            index * kernel.thinning < num_steps and cpu_seconds() - begun - spent < budget
        ):
            params, index = kernel.sample(params), index + 1
            if index > num_warmup:
                # A program may be compiled in another thread meanwhile: that is not spent on predictions.
                entered = time.thread_time()
                average.add(params)
                spent += time.thread_time() - entered
        used = cpu_seconds() - begun - spent
        found = kernel.diagnostics()
        kernel.cleanup()
    return {
        "kernel": type(kernel).__name__,
        "reason": kernel.reason,
        "cpu_seconds": round(used, 1),
        "num_steps": index * kernel.thinning,
        "num_warmup": num_warmup * kernel.thinning,
        "num_draws": average.num_draws,
        "step_size": float(found["step_size"][-1]),
        "warnings": notes,
        **average.measured(),
    }


def shifted(problem: Problem) -> Problem:
    """The same with inputs from 0 to 2."""

    def moved(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return rows[0] + 1, rows[1]

    validation = None if problem.validation is None else moved(problem.validation)
    return replace(problem, train=moved(problem.train), test=moved(problem.test), ood={}, validation=validation)


def compared(
    name: str, size: Size, seed: int, results: dict[str, Any], methods: list[str], keep: Callable[[], None]
) -> None:
    """Runs what is not stored, the paper's sampler first."""
    with seeded(seed):
        problem = CASES[size.case].build(seed)
    for wanted in dict.fromkeys([PAPER, *methods]):
        key = f"{name}/{seed}/{wanted}"
        if key in results:
            continue
        is_shifted = wanted.endswith(SHIFTED)
        rows = shifted(problem) if is_shifted else problem
        build = BUILDS[wanted.removesuffix(SHIFTED)]
        kernel = build(problem.model, rows.train, thinning=size.thinning, seed=seed)
        if wanted == PAPER:
            num_warmup = -(-BURN_IN // size.thinning)
            results[key] = run(kernel, rows, num_warmup, num_steps=size.num_steps)
        else:
            num_warmup = round(WARM_UP * size.num_steps / size.thinning)
            budget = results[f"{name}/{seed}/{PAPER}"]["cpu_seconds"]
            results[key] = run(kernel, rows, num_warmup, budget=budget)
        keep()
        print(f"| {name}, seed {seed}: " + " | ".join(cells(wanted, results[key])) + " |", flush=True)


def cells(name: str, entry: Mapping[str, Any]) -> list[str]:
    """A run's row of the table."""
    kinds = sorted({text.partition(":")[0] for text in entry["warnings"]})
    label = name.replace(RECOMMENDED, f"{RECOMMENDED}, {entry['kernel']}")
    figures = [label]
    for rows in ("test", "validation"):
        found = entry.get(rows)
        figures += ["", ""] if found is None else [f"{100 * found['error']:.2f}", f"{found['nll']:.4f}"]
    return [
        *figures,
        f"{100 * entry['test']['error_of_one']:.2f}",
        str(entry["num_draws"]),
        f"{entry['num_steps']:,}",
        f"{entry['cpu_seconds']:.0f}",
        f"{entry['step_size']:.2g}",
        ", ".join(kinds) or "nothing",
    ]


def tables(results: Mapping[str, Any]) -> str:
    """A table per network, with all seeds."""
    parts = []
    for network in SIZES:
        known = [key.split("/") for key in results if key.startswith(f"{network}/")]
        rows = [
            [seed, *cells(name, results[f"{network}/{seed}/{name}"])]
            for name in METHODS
            for _, seed, other in sorted(known)
            if other == name
        ]
        if rows:
            parts += [network, markdown_table(["seed", *HEADER], rows)]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SIZES if name != "64-50-10"]
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[PAPER, RECOMMENDED])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="the digits, 80 steps, nothing written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text()) if path.exists() and not options.quick else {}

    def keep() -> None:
        if not options.quick:
            write_json(NAME, results)

    for seed in [0] if options.quick else options.seeds:
        for network in ["64-50-10"] if options.quick else options.networks:
            compared(network, SIZES[network], seed, results, options.methods, keep)
    print(f"\n{tables(results)}")


if __name__ == "__main__":
    main()
