# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Distillation as the chains go, against distillation of the stored chains: what is lost, and what memory it takes.

``python -m benchmarks.online [--seeds 0 1 2] [--quick]``

Both see the very same chains (digits, 64-50-10, four chains) and train for as long; the online one holds a buffer of
512 draws in all. Figures are on the test set, of 100 draws, beside 100 draws of the chains. Memory: highest resident
size of a process that distils online, with a run and with one of ten times the draws.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import markdown_table, write_json
from benchmarks.distillation import compared, predictions
from benchmarks.distillation_cases import Problem, digits
from pyro_apd import MCMC, SGLD, DistilledPosterior, distill, distill_online
from pyro_apd.models.layout import Layout

NUM_CHAINS, NUM_COMPARED = 4, 100
SIZES = {"num_samples": 600, "warmup_steps": 300, "thinning": 20}
QUICK = {"num_samples": 60, "warmup_steps": 30, "thinning": 2}
FIGURES = ("accuracy", "nll", "mean_mi", "mi_correlation", "total_variation", "mean_mi[inverted]", "mean_mi[noise]")


def kernel(problem: Problem, seed: int, thinning: int) -> SGLD:
    """Of both; ``seed`` makes their chains the same."""
    return SGLD(problem.model, 1e-4, batch_size=100, thinning=thinning, seed=seed, compile="auto")


def run_seed(seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Figures of chain, offline and online."""
    problem = digits(seed)
    counts = {name: sizes[name] for name in ("num_samples", "warmup_steps")}
    mcmc = MCMC(kernel(problem, seed, sizes["thinning"]), num_chains=NUM_CHAINS, disable_progbar=True, **counts)
    mcmc.run(*problem.train)
    theta_CSD = mcmc.store.unconstrained()
    layout = mcmc.store.layout
    pooled_ND = theta_CSD.transpose(0, 1).flatten(0, 1)

    def evaluated(theta_SD: Tensor) -> Any:
        return predictions(problem, layout, theta_SD, "test")

    index = torch.linspace(0, len(pooled_ND) - 1, NUM_COMPARED).round().long()
    reference = evaluated(pooled_ND[index])
    found = {"chain": compared(reference, reference)}
    start = time.monotonic()
    offline = distill(mcmc, seed=seed, progress=False)
    found["offline"] = {"seconds": time.monotonic() - start, **compared(reference, evaluated(drawn(offline, layout)))}
    start = time.monotonic()
    online = distill_online(
        kernel(problem, seed, sizes["thinning"]),
        *problem.train,
        num_chains=NUM_CHAINS,
        seed=seed,
        progress=False,
        **counts,
    )
    found["online"] = {"seconds": time.monotonic() - start, **compared(reference, evaluated(drawn(online, layout)))}
    return found


def drawn(posterior: DistilledPosterior, layout: Layout) -> Tensor:
    """As many draws as are compared."""
    return layout.unconstrain(posterior.get_samples(NUM_COMPARED, seed=1000))


def peak_bytes(num_samples: int) -> int:
    """Highest resident size of a process of its own."""
    code = f"from benchmarks.online import hold; print(hold({num_samples}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def hold(num_samples: int) -> int:
    """Distils online, with little training; to be run in a process of its own."""
    torch.set_num_threads(1)
    problem = digits(0)
    distill_online(
        kernel(problem, 0, 1),
        *problem.train,
        num_samples=num_samples,
        warmup_steps=10,
        num_chains=NUM_CHAINS,
        num_steps=20,
        seed=0,
        progress=False,
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="short chains, one seed: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = options.seeds[:1] if options.quick else options.seeds
    found = {str(seed): run_seed(seed, QUICK if options.quick else SIZES) for seed in seeds}
    rows = []
    for label in ("chain", "offline", "online"):
        runs = [stored[label] for stored in found.values()]
        cells = [f"{sum(run[name] for run in runs) / len(runs):.4f}" for name in FIGURES]
        seconds = sum(run.get("seconds", 0.0) for run in runs) / len(runs)
        rows.append([label, f"{seconds:.0f}" if seconds else "", *cells])
    print(markdown_table(["", "s", *FIGURES], rows))
    lost = {
        name: sum(100 * (run["online"][name] / run["offline"][name] - 1) for run in found.values()) / len(found)
        for name in ("nll", "mean_mi")
    }
    print("\nOnline beside offline: " + ", ".join(f"{name} {value:+.1f} %" for name, value in lost.items()))
    lengths = (300, 3000) if options.quick else (2000, 20_000)
    memory = {length: peak_bytes(length) for length in lengths}
    print(
        "\n"
        + markdown_table(
            ["draws a chain", "peak memory, MB"],
            [[f"{length:,}", f"{value / 1e6:.0f}"] for length, value in memory.items()],
        )
    )
    if not options.quick:
        write_json("online", {"seeds": found, "online_beside_offline_per_cent": lost, "peak_bytes": memory})


if __name__ == "__main__":
    main()
