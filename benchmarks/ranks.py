# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains and online distillation over processes: what depends on their number, and what does not.

``python -m benchmarks.ranks [--processes 1 2] [--quick]``

Digits, 64-50-10, four chains with the same seed, under ``torchrun`` with each number of processes, one thread each.
Draws are compared with those of one process: with uncompiled steps, with compiled steps, with the data split over
processes (all rows at each step), and for 784-400-400-10, whose four chains cost one process four times as much as one
chain (those of the small network hardly more than one). Both networks are also run with ``step_size="auto"``. The
generator of online distillation is compared with its held-out draws; its seconds include chains and rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from benchmarks.distillation_cases import Problem, digits
from benchmarks.large_networks import mlp, synthetic
from pyro_apd.runtime.ranks import Ranks, join_process_group

NUM_CHAINS = 4
SIZES = {"num_samples": 100, "warmup_steps": 50, "thinning": 20, "num_steps": 500}
QUICK = {"num_samples": 12, "warmup_steps": 4, "thinning": 2, "num_steps": 10}
FOUND, LARGER = "step size found", "larger network"
CASES = ("as they are", "compiled", "data split", FOUND, LARGER, f"{LARGER}, {FOUND}")


def prepared(case: str, problem: Problem, thinning: int, ranks: Ranks) -> tuple[apd.SGLD, tuple[Any, ...], str | None]:
    """A case's kernel, the data of this process, and what is split in addition to the chains."""
    torch.manual_seed(0)
    is_found = case.endswith(FOUND)
    if case.startswith(LARGER):
        model, (x, y, *_) = apd.BNN(mlp(400), prior_scale="fan_in"), synthetic((784,))
        options = {"step_size": "auto" if is_found else 1e-6, "thinning": thinning // 2}
        return apd.SGLD(model, batch_size=100, seed=0, compile=False, **options), (x, y), None
    if case == "data split":
        rows = tuple(values[ranks.rank :: ranks.size] for values in problem.train)
        return apd.SGLD(problem.model, 1e-4, seed=0, compile=False), rows, "data"
    options = {"step_size": "auto" if is_found else 1e-4, "compile": case == "compiled", "thinning": thinning}
    return apd.SGLD(problem.model, batch_size=100, seed=0, **options), problem.train, None


def work(folder: Path, sizes: dict[str, int]) -> None:
    """Work of each process of ``torchrun``; the first writes the results."""
    torch.set_num_threads(1)
    ranks = join_process_group()
    problem = digits(0)
    found: dict[str, Any] = {}
    draws: dict[str, torch.Tensor] = {}
    counts = {name: sizes[name] for name in ("num_samples", "warmup_steps")}
    for case in CASES:
        kernel, data, split = prepared(case, problem, sizes["thinning"], ranks)
        mcmc = apd.MCMC(
            kernel, num_chains=NUM_CHAINS, chain_method="distributed", split=split, disable_progbar=True, **counts
        )
        ranks.barrier()
        began = time.monotonic()
        mcmc.run(*data)
        found[case] = {"seconds": time.monotonic() - began}
        assert mcmc.store is not None
        draws[case] = mcmc.store.unconstrained().clone()
    ranks.barrier()
    began = time.monotonic()
    kernel = apd.SGLD(problem.model, 1e-4, batch_size=100, thinning=sizes["thinning"], seed=0, compile=False)
    posterior = apd.distill_online(
        kernel, *problem.train, num_chains=NUM_CHAINS, num_steps=sizes["num_steps"], seed=0, progress=False,
        chain_method="distributed", **counts,
    )  # fmt: skip
    found["online"] = {"seconds": time.monotonic() - began, **posterior.metadata["metrics"]}
    if ranks.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
        torch.save(draws, folder / "draws.pt")


def launched(processes: int, folder: Path, is_quick: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Results and draws of a job with this number of processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "benchmarks.ranks", "--worker", str(folder), *(["--quick"] if is_quick else []),
    ]  # fmt: skip
    folder.mkdir()
    subprocess.run(command, check=True)
    return json.loads((folder / "found.json").read_text()), torch.load(folder / "draws.pt", weights_only=True)


def main() -> None:
    """Prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, QUICK if arguments.quick else SIZES)
        return
    with tempfile.TemporaryDirectory() as folder:
        jobs = {n: launched(n, Path(folder) / str(n), arguments.quick) for n in arguments.processes}
    (_, reference), *_ = jobs.values()
    rows, online, report = [], [], {}
    for number, (found, draws) in jobs.items():
        for case in CASES:
            gap = float((draws[case] - reference[case]).abs().max())
            found[case] |= {"is_equal": torch.equal(draws[case], reference[case]), "largest_difference": gap}
            equal = "bit for bit" if found[case]["is_equal"] else f"to {gap:.1e}"
            rows.append([case, str(number), f"{found[case]['seconds']:.1f}", equal])
        figures = found["online"]
        names = ("distance", "spread_ratio", "mi_ratio")
        online.append([str(number), f"{figures['seconds']:.1f}", *(f"{figures[name]:.3f}" for name in names)])
        report[number] = found
    print(markdown_table(["steps", "processes", "s", "draws equal to the first"], sorted(rows)))
    print()
    print(markdown_table(["processes, online", "s", "distance", "spread ratio", "MI ratio"], online))
    write_json("ranks", report)


if __name__ == "__main__":
    main()
