# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chain against generator on the digits, over seeds: ``python -m benchmarks.digits [--seeds 0 1 2]``.

All settings are the demo's. Each seed has its own split of the data, its own chains and its own generator.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.common import markdown_table, write_json
from pyro_apd import BNN, diagnostics, distill
from pyro_apd.cli.demo import FULL, digit_network, sample_chains
from pyro_apd.datasets import digits, inverted, noise


def one_seed(seed: int) -> dict:
    """Metrics by name for chain, generator and stored draws of the same bytes; and seconds."""
    data = digits(seed=seed)
    model = BNN(digit_network(), likelihood="categorical", prior_scale=0.4)
    start = time.monotonic()
    mcmc = sample_chains(model, data, seed, FULL)
    sampled = time.monotonic()
    posterior = distill(mcmc, seed=seed)
    distilled = time.monotonic()
    ood = {"noise": noise(data.x_test, seed=seed), "inverted": inverted(data.x_test)}
    fidelity = diagnostics.compare(
        mcmc, posterior, model, data.x_test, data.y_test, ood=ood, num_samples=200, seed=seed
    )
    print(f"\nseed {seed}\n{fidelity}\n", flush=True)
    return {
        "seed": seed,
        "sampling_seconds": sampled - start,
        "distilling_seconds": distilled - sampled,
        "fidelity": json.loads(fidelity.to_json()),
    }


def main() -> None:
    """Prints a table per seed, and the means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    torch.set_num_threads(1)
    runs = [one_seed(seed) for seed in parser.parse_args().seeds]
    rows = []
    for i, row in enumerate(runs[0]["fidelity"]["rows"]):
        figures = [[run["fidelity"]["rows"][i][column] for run in runs] for column in ("chain", "generator", "stored")]
        if any(value is None for column in figures for value in column):
            continue
        means = [sum(column) / len(column) for column in figures]
        chain = means[0]
        cells = [f"{means[0]:.4f}", *(f"{mean:.4f} ({_difference(mean, chain)})" for mean in means[1:])]
        rows.append([row["label"] + (f" [{row['group'][21:]}]" if "[" in row["name"] else ""), *cells])
    num_bytes = [run["fidelity"]["num_bytes"] for run in runs]
    rows.append(
        ["bytes", *(f"{sum(b[c] for b in num_bytes) / len(runs):.0f}" for c in ("chain", "generator", "stored"))]
    )
    print(markdown_table(["mean over seeds", "chain", "generator", "stored draws, same bytes"], rows))
    for name in ("sampling_seconds", "distilling_seconds"):
        print(f"{name.replace('_', ' ')}: " + ", ".join(f"{run[name]:.0f}" for run in runs))
    print(f"Written to {write_json('digits', runs)}")


def _difference(value: float, chain: float) -> str:
    return f"{value - chain:+.4f}" + (f", {100 * (value / chain - 1):+.1f} %" if chain else "")


if __name__ == "__main__":
    main()
