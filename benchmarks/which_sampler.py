# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The measurements behind ``docs/which_sampler.md``: ``python -m benchmarks.which_sampler [--data ...] [--quick]``.

Every kernel with ``step_size="auto"``, nothing else set but a seed, the steps and the rows per step. Four chains in one
process, steps not compiled, on one thread. Effective draws: bulk ESS of function values, the median over held-out
inputs, per CPU second of the whole run.

* ``diabetes``: 10-20-1, tanh, 261 weights and a noise scale that is learned; 400 rows, 42 held out.
* ``digits``: 64-50-10, ReLU, prior sd 0.4, 3,760 weights; 1,257 rows, 50 held-out images.
* ``collinear``: four predictors with correlation 0.9, whose posterior is known: 32 chains.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_apd as apd
from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.function_space_networks import cpu_seconds
from benchmarks.posteriordb_auto import KERNELS
from pyro_apd.datasets import digits
from pyro_apd.diagnostics.mixing.convergence import statistics
from pyro_apd.models.bnn import BNN
from pyro_apd.predictive.predictive import outputs

HEADER = ["kernel", "rows per step", "effective draws per CPU second", "r-hat", "step size", "said"]
THINNING = 20


@dataclass(frozen=True)
class Task:
    """A model on data, and what is measured of draws.

    :ivar functions: from draws ``(C, S, ...)`` by site to function values ``(C, S, F)``.
    :ivar measured: from those and the draws to a few numbers by name.
    :ivar tuple batch_sizes: rows per step; None for all.
    :ivar tuple steps: of warm-up, and kept.
    """

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    functions: Callable[[Mapping[str, Tensor]], Tensor]
    measured: Callable[[Tensor], dict[str, float]]
    batch_sizes: tuple[int | None, ...]
    steps: tuple[int, int]
    num_chains: int = 4


def diabetes_task() -> Task:
    """Targets and inputs standardised by the training rows."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    table = np.concatenate([data.data, data.target[:, None]], 1)[np.random.default_rng(0).permutation(442)]
    table = torch.as_tensor((table - table[:400].mean(0)) / table[:400].std(0)).float()
    model = BNN(nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1)), likelihood="gaussian")

    def functions(draws: Mapping[str, Tensor]) -> Tensor:
        return of_model(model, draws, table[400:, :-1], "mean_SN")

    def measured(functions_CSF: Tensor) -> dict[str, float]:
        return {"sd of functions": float(functions_CSF.flatten(0, 1).std(0).mean())}

    return Task(model, (table[:400, :-1], table[:400, -1]), functions, measured, (50, None), (8_000, 4_000))


def digits_task() -> Task:
    """The most probable class of the first draws is what is read of an image."""
    data = digits(seed=0)
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    model = BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), prior_scale=0.4)
    labels = y[1257:1307]

    def functions(draws: Mapping[str, Tensor]) -> Tensor:
        probs = of_model(model, draws, x[1257:1307], "probs_SNK")
        return probs.gather(-1, labels[:, None].expand(*probs.shape[:-1], 1)).squeeze(-1)

    def measured(functions_CSF: Tensor) -> dict[str, float]:
        return {"NLL": -float(functions_CSF.flatten(0, 1).mean(0).log().mean())}

    return Task(model, (x[:1257], y[:1257]), functions, measured, (100, None), (5_000, 2_500))


def collinear_task() -> Task:
    """Noise and prior sd 1; coordinates are the functions."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(200, 1, generator=generator)
    x = math.sqrt(0.9) * shared + math.sqrt(0.1) * torch.randn(200, 4, generator=generator)
    y = x.sum(1) + torch.randn(200, generator=generator)
    sds = torch.linalg.inv(x.double().T @ x.double() + torch.eye(4)).diagonal().sqrt()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    def measured(functions_CSF: Tensor) -> dict[str, float]:
        ratio = functions_CSF.flatten(0, 1).double().std(0) / sds
        return {"sd over exact, furthest": float(ratio[(ratio - 1).abs().argmax()])}

    return Task(model, (x, y), lambda draws: draws["w"], measured, (None,), (2_000, 10_000), num_chains=32)


TASKS: dict[str, Callable[[], Task]] = {
    "diabetes": diabetes_task,
    "digits": digits_task,
    "collinear": collinear_task,
}


def of_model(model: BNN, draws: Mapping[str, Tensor], x: Tensor, name: str) -> Tensor:
    """Outputs of a network ``(C, S, N, ...)`` for draws ``(C, S, ...)``."""
    num_chains = len(next(iter(draws.values())))
    found = getattr(outputs(model, {site: value.flatten(0, 1) for site, value in draws.items()}, x), name)
    return found.unflatten(0, (num_chains, -1))


def run(task: Task, kernel: str, batch_size: int | None, share: float = 1.0) -> dict[str, Any]:
    """One run of a kernel."""
    begun = cpu_seconds()
    num_warmup, num_kept = (max(2, round(share * num / THINNING)) for num in task.steps)
    sampler = KERNELS[kernel](task.model, "auto", batch_size=batch_size, thinning=THINNING, seed=0, compile=False)
    mcmc = apd.MCMC(sampler, num_kept, num_warmup, num_chains=task.num_chains, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(*task.args)
    used = cpu_seconds() - begun
    functions = task.functions(mcmc.get_samples(group_by_chain=True))
    found = statistics(functions)
    return {
        "kernel": kernel,
        "batch_size": batch_size,
        "cpu_seconds": used,
        "ess": float(found["ess_bulk"].median()),
        "r_hat": float(found["rhat"].max()),
        "step_size": float(mcmc.diagnostics()["step_size"][f"chain {mcmc.chains[0]}"][-1]),
        "measured": task.measured(functions),
        "warnings": [f"{type(w.message).__name__}: {w.message}" for w in caught],
    }


def cells(entry: Mapping[str, Any]) -> list[str]:
    """A run's row of the table."""
    kinds = sorted({text.partition(":")[0] for text in entry["warnings"]})
    return [
        entry["kernel"],
        "all" if entry["batch_size"] is None else str(entry["batch_size"]),
        f"{entry['ess'] / entry['cpu_seconds']:.1f}",
        f"{entry['r_hat']:.2f}",
        f"{entry['step_size']:.2g}",
        ", ".join(kinds) or "nothing",
        *(f"{value:.3f}" for value in entry["measured"].values()),
    ]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--all-rows", action="store_true", help="no mini-batches")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the steps, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "which_sampler.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in TASKS if options.data == "all" else [options.data]:
        task, entries = TASKS[name](), []
        for kernel in options.kernels:
            for batch_size in (None,) if options.all_rows else task.batch_sizes:
                entries.append(run(task, kernel, batch_size, 0.01 if options.quick else 1.0))
                if len(entries) == 1:
                    print(f"\n{name}\n\n{markdown_table([*HEADER, *entries[0]['measured']], [])}", flush=True)
                print("| " + " | ".join(cells(entries[-1])) + " |", flush=True)
        measured = {(entry["kernel"], entry["batch_size"]) for entry in entries}
        others = [old for old in results.get(name, []) if (old["kernel"], old["batch_size"]) not in measured]
        results[name] = others + entries
        if not options.quick:
            write_json("which_sampler", results)


if __name__ == "__main__":
    main()
