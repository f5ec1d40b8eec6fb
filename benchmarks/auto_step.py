# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What ``step_size="auto"`` and ``warm_start=`` achieve.

``python -m benchmarks.auto_step [--data conjugate|digits|mnist|concrete|yacht|all] [--quick]``

Conjugate: how much too large the trace and single directions of the covariance are, on linear regressions with a
posterior in closed form (3 weights; 3 of condition number 100; 100 weights). 10 % are allowed.

Networks: test NLL of SGLD's predictive with the automatic step size, against each step size of a grid. All have the
same number of Langevin steps, a third of them warm-up, and one chain per seed. The best of the grid is chosen on the
test rows, by its mean over seeds; the automatic step size does not have this advantage. ``short`` has a quarter of the
steps, without and with ``warm_start``, whose steps count.

Data other than the digits are read from the folder named by PYRO_APD_DATA.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from torch import Tensor, nn

from benchmarks.common import RESULTS, markdown_table, write_json
from pyro_apd import BNN, PSGLD, SGHMC, SGLD
from pyro_apd.cli.demo import digit_network
from pyro_apd.datasets import digits
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.predictive.predictive import log_likelihood

SEEDS = (0, 1, 2)
NUM_DRAWS = 150
DATA = Path(os.environ.get("PYRO_APD_DATA", "../shared/data"))


@dataclass(frozen=True)
class Task:
    """A model, its data and how long to sample it: training rows ``(x, y)``, test rows ``(x_test, y_test)``."""

    model: BNN
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    num_steps: int
    grid: tuple[float, ...]


def digits_task(seed: int) -> Task:
    """64-50-10, the demo's model and number of steps per chain."""
    data = digits(seed=seed)
    model = BNN(digit_network(), prior_scale=0.4)
    train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
    return Task(model, train, test, 100, 18_000, (3e-5, 1e-4, 3e-4, 1e-3))


def mnist_task(seed: int) -> Task:
    """784-100-10 on all 60,000 images."""

    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((DATA / "mnist" / name).read_bytes()), np.uint8, offset=offset)

    parts = []
    for part in ("train", "t10k"):
        x = torch.as_tensor(read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 784).astype(np.float32)) / 255
        parts.append((x, torch.as_tensor(read(f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64))))
    model = BNN(nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)), prior_scale="fan_in")
    return Task(model, parts[0], parts[1], 100, 30_000, (1e-6, 3e-6, 1e-5, 3e-5))


def uci_task(name: str, batch_size: int) -> Callable[[int], Task]:
    """50 hidden units and a learned noise scale, on one of the standard splits, standardised by the training rows."""

    def task(seed: int) -> Task:
        table = np.loadtxt(DATA / "uci" / f"{name}.txt")
        state = np.random.RandomState(1)  # the published splits come from this generator
        for _ in range(seed + 1):
            order = state.choice(range(len(table)), len(table), replace=False)
        train, test = np.split(table[order], [round(0.9 * len(table))])
        mean, sd = train.mean(0), train.std(0)
        rows = [torch.as_tensor((part - mean) / np.where(sd > 0, sd, 1.0)).float() for part in (train, test)]
        net = nn.Sequential(nn.Linear(table.shape[1] - 1, 50), nn.ReLU(), nn.Linear(50, 1))
        model = BNN(net, likelihood="gaussian", prior_scale="fan_in")
        of = [(part[:, :-1], part[:, -1]) for part in rows]
        return Task(model, of[0], of[1], batch_size, 20_000, (3e-6, 1e-5, 3e-5, 1e-4, 3e-4))

    return task


TASKS: dict[str, Callable[[int], Task]] = {
    "digits": digits_task,
    "concrete": uci_task("concrete", 100),
    "yacht": uci_task("yacht", 50),
    "mnist": mnist_task,
}


def run_chain(task: Task, step_size: float | str, seed: int, num_steps: int, warm_start: int | None) -> dict[str, Any]:
    """Test NLL of one chain of ``num_steps`` steps, including those of the optimiser; NaN if it diverged."""
    thinning = max(1, (num_steps - (warm_start or 0)) // (NUM_DRAWS * 3 // 2))
    kernel = SGLD(
        task.model,
        step_size,
        batch_size=task.batch_size,
        thinning=thinning,
        warm_start=warm_start,
        seed=seed,
        compile=False,
    )
    mcmc = MCMC(kernel, num_samples=NUM_DRAWS, warmup_steps=NUM_DRAWS // 2, disable_progbar=True)
    start = time.monotonic()
    try:
        mcmc.run(*task.train)
    except ArithmeticError:
        return {"nll": math.nan, "seconds": time.monotonic() - start}
    seconds = time.monotonic() - start
    log_probs_SN = log_likelihood(task.model, mcmc.get_samples(), *task.test)
    nll = -(torch.logsumexp(log_probs_SN, 0) - math.log(NUM_DRAWS)).mean()
    return {"nll": float(nll), "seconds": seconds, "tuning": kernel.tuning}


def network(name: str, quick: bool) -> dict[str, Any]:
    """All runs on one data set; prints its table."""
    seeds = SEEDS[:1] if quick else SEEDS
    results: dict[str, list[dict]] = {}
    for seed in seeds:
        task = TASKS[name](seed)
        steps = task.num_steps // (10 if quick else 1)
        runs: dict[str, tuple[float | str, int, int | None]] = {f"{step:g}": (step, steps, None) for step in task.grid}
        runs["auto"] = ("auto", steps, None)
        if name != "mnist":
            runs["auto, short"] = ("auto", steps // 4, None)
            runs["auto, short, warm start"] = ("auto", steps // 4, steps // 40)
        for label, (step, num_steps, warm_start) in runs.items():
            results.setdefault(label, []).append(run_chain(task, step, seed, num_steps, warm_start))
            print(f"{name} seed {seed} {label}: {results[label][-1]}", flush=True)
    means = {label: float(np.mean([run["nll"] for run in runs])) for label, runs in results.items()}
    grid = {label: mean for label, mean in means.items() if not label.startswith("auto") and math.isfinite(mean)}
    best = min(grid, key=lambda label: grid[label])
    rows = []
    for label, runs in results.items():
        behind = (means[label] - means[best]) / abs(means[best])
        chosen = [f"{run['tuning']['step_size']:.2g}" for run in runs if run.get("tuning")]
        by_seed = " ".join(f"{run['nll']:.4f}" for run in runs)
        rows.append([label, f"{means[label]:.4f}", f"{behind:+.1%}", by_seed, " ".join(chosen)])
    print(f"\n{name}, {steps} Langevin steps")
    print(markdown_table(["step size", "test NLL", f"against {best}", "by seed", "chosen"], rows), flush=True)
    return {"steps": steps, "best_of_grid": best, "mean_nll": means, "runs": results}


class Regression:
    """Linear regression with noise and prior sd 1 and a posterior in closed form.

    :param condition: ratio of the largest to the smallest eigenvalue of x'x.
    """

    def __init__(self, num_weights: int, num_data: int, condition: float) -> None:
        generator = torch.Generator().manual_seed(5)
        basis, _ = torch.linalg.qr(torch.randn(num_data, num_weights, generator=generator))
        scale = torch.logspace(0, -0.5 * math.log10(condition), num_weights) * math.sqrt(num_data)
        self.x = basis * scale
        self.y = self.x @ torch.ones(num_weights) + torch.randn(num_data, generator=generator)
        precision = self.x.double().T @ self.x.double() + torch.eye(num_weights, dtype=torch.float64)
        self.covariance = torch.linalg.inv(precision)

    def model(self, x: Tensor, y: Tensor) -> None:
        """A model as for full-batch NUTS."""
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


def conjugate(quick: bool) -> list[dict[str, Any]]:
    """Predicted and measured widening; prints the table."""
    easy, stiff, wide = Regression(3, 200, 2.0), Regression(3, 200, 100.0), Regression(100, 1000, 4.0)
    cases: list[tuple[str, Regression, type, dict[str, Any], int]] = []
    for kernel in (SGLD, SGHMC, PSGLD):
        cases.append(("3 weights, full batch", easy, kernel, {}, 11))
        cases.append(("3 weights", easy, kernel, {"batch_size": 50}, 11))
        cases.append(("3 weights, condition 100", stiff, kernel, {"batch_size": 50}, 31))
    cases.append(("3 weights, T = 0.25", easy, SGLD, {"batch_size": 50, "temperature": 0.25}, 11))
    cases.append(("100 weights", wide, SGLD, {"batch_size": 100}, 11))
    rows, results = [], []
    for label, problem, kernel, settings, thinning in cases:
        made = kernel(problem.model, "auto", seed=1, compile=False, **settings)
        draws, tuning = _drawn(made, problem, thinning, quick)
        exact, vectors = torch.linalg.eigh(problem.covariance * made.temperature)
        achieved = torch.cov((draws @ vectors).T).diagonal()
        trace, worst = float(achieved.sum() / exact.sum() - 1), float((achieved / exact).max() - 1)
        results.append({"case": label, "kernel": kernel.__name__, "trace": trace, "worst": worst, "tuning": tuning})
        chosen = f"{tuning['step_size']:.2g} ({tuning['bound']})"
        rows.append([kernel.__name__, label, chosen, f"{tuning['inflation']:+.1%}", f"{trace:+.1%}", f"{worst:+.1%}"])
        print(rows[-1], flush=True)
    print(
        markdown_table(["kernel", "problem", "chosen", "predicted", "trace(cov)", "worst direction"], rows), flush=True
    )
    return results


def _drawn(kernel: Any, problem: Regression, thinning: int, quick: bool) -> tuple[Tensor, dict[str, Any]]:
    """Draws of 32 chains that advance together, in float64, and the chosen step size."""
    num_draws, num_warmup = (20, 200) if quick else (200, 1000)
    data, chains = (problem.x, problem.y), ChainSet(count=32)
    chain = kernel.begin(data, {}, warmup_steps=num_warmup, num_samples=num_draws, chains=chains)
    draws = []
    with torch.no_grad():
        chain.advance(num_warmup)
        for _ in range(num_draws):
            chain.advance(thinning)
            draws.append(chain.theta)
    kernel.end(chain)
    return torch.cat(draws).double(), kernel.tuning


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["conjugate", *TASKS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the workload, one seed: checks that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = ["conjugate", *TASKS] if options.data == "all" else [options.data]
    results: dict[str, Any] = {}
    for name in wanted:
        if name not in ("conjugate", "digits") and not DATA.is_dir():
            print(f"{name}: skipped; {DATA} does not exist. Set PYRO_APD_DATA to the folder with the data.")
            continue
        results[name] = conjugate(options.quick) if name == "conjugate" else network(name, options.quick)
        if not options.quick:
            # Data sets can be run one by one: results of the others are kept.
            path = RESULTS / "auto_step.json"
            write_json("auto_step", {**(json.loads(path.read_text()) if path.exists() else {}), **results})


if __name__ == "__main__":
    main()
