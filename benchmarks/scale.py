# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Cost of an SGLD step against the number of weights and of chains: ``python -m benchmarks.scale [--quick]``.

Networks 64-h-h-10 of 10^3 to 10^7 weights, one chain; and 1 to 256 vectorised chains of 64-50-10 (3,760 weights).
Batches of 100, one thread, captured steps, not compiled. Each point is a new process. Time is CPU time, so that other
work on the machine has little influence. Memory is the peak of memory not backed by files while steps are taken: what
the interpreter and the libraries hold, and what grows. The exponent of time is the slope of a least-squares line in
log-log coordinates: over all points, and over those where arithmetic dominates the overhead of calls. The exponent of
memory is p in a + b n^p, fitted to the logarithms of the peaks; the memory shown is that above a.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import nn

import pyro_apd as apd
from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.memory import anonymous
from pyro_apd.kernels.engine.chain_set import ChainSet

NUM_INPUTS, NUM_CLASSES, BATCH_SIZE = 64, 10, 100
WEIGHTS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
CHAINS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: From here on points count for the second exponent.
LARGE_WEIGHTS, MANY_CHAINS = 100_000, 8
#: Resolution of a peak, in bytes.
RESOLUTION = 4e6
QUICK_WEIGHTS, QUICK_CHAINS = (1_000, 10_000, 100_000), (1, 4, 16)


def width(num_weights: int) -> int:
    """Hidden units h with which 64-h-h-10 is nearest to this number of weights."""
    linear = NUM_INPUTS + NUM_CLASSES + 2
    return max(1, round((math.sqrt(linear**2 + 4 * (num_weights - NUM_CLASSES)) - linear) / 2))


def network(num_weights: int | None) -> nn.Sequential:
    """64-h-h-10, or 64-50-10."""
    if num_weights is None:
        return nn.Sequential(nn.Linear(NUM_INPUTS, 50), nn.ReLU(), nn.Linear(50, NUM_CLASSES))
    h = width(num_weights)
    hidden = nn.Linear(NUM_INPUTS, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(h, NUM_CLASSES))


def child(num_weights: int | None, num_chains: int | None) -> None:
    """Prints CPU seconds per step and the peak memory of this process's steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(1000, NUM_INPUTS), torch.arange(1000) % NUM_CLASSES
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    kernel = apd.SGLD(
        apd.BNN(network(num_weights), prior_scale="fan_in"), 1e-6, batch_size=BATCH_SIZE, seed=0, compile=False
    )
    chain = kernel.begin((x, y), {}, warmup_steps=1, chains=ChainSet(count=num_chains))
    size = chain.layout.size
    chain.advance(2)  # captures the model
    count = max(3, min(200, 20_000_000 // (size * (num_chains or 1))))
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    seconds = []
    for _ in range(3):
        began = time.process_time()
        chain.advance(count)
        seconds.append((time.process_time() - began) / count)
    done.set()
    watcher.join()
    found = {"weights": size, "chains": num_chains or 1, "seconds": sorted(seconds)[1], "bytes": peak[0]}
    print(json.dumps(found))


def measure(num_weights: int | None, num_chains: int | None) -> dict[str, Any]:
    """The same from a new process."""
    code = f"import benchmarks.scale as s; s.child({num_weights}, {num_chains})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(found, file=sys.stderr, flush=True)
    return found


def growth(points: list[dict[str, Any]], by: str) -> tuple[float, float]:
    """Constant part in bytes, and the exponent of the part that grows."""
    n, num_bytes = (np.array([float(point[of]) for point in points]) for of in (by, "bytes"))
    added = num_bytes[-1] - num_bytes.min()
    if len(points) < 4 or added <= RESOLUTION:
        return float(num_bytes.min()), math.nan

    def peak(x: Any, anyway: float, log_added: float, power: float) -> Any:
        return np.log(np.exp(anyway) + np.exp(log_added) * x**power)

    start = (math.log(num_bytes.min()), math.log(added), 1.0)
    (anyway, _, power), _ = curve_fit(peak, n / n[-1], np.log(num_bytes), start)
    return math.exp(anyway), float(power)


def above(points: list[dict[str, Any]], anyway: float) -> list[dict[str, Any]]:
    """Points with their memory above the constant part; unknown if that is too small to measure."""
    grown = [{**point, "peak_bytes": point["bytes"], "bytes": point["bytes"] - anyway} for point in points]
    return [{**point, "bytes": point["bytes"] if point["bytes"] > RESOLUTION else math.nan} for point in grown]


def exponent(points: list[dict[str, Any]], by: str, of: str, least: int = 0) -> float:
    """Slope in log-log of ``of`` against ``by``, over points of at least ``least``."""
    kept = [point for point in points if point[by] >= least and not math.isnan(point[of])]
    if len(kept) < 2:
        return math.nan
    return float(np.polyfit(np.log([p[by] for p in kept]), np.log([p[of] for p in kept]), 1)[0])


def exponents(points: list[dict[str, Any]], by: str, least: int) -> dict[str, float]:
    """Exponents of time, over all points and over the large ones."""
    return {f"time, {name}": exponent(points, by, "seconds", n) for name, n in (("all", 0), (f"from {least:,}", least))}


def summed_up(by_weights: list[dict[str, Any]], by_chains: list[dict[str, Any]]) -> dict[str, Any]:
    """Both series, and their exponents."""
    found: dict[str, Any] = {"exponents": {}}
    for by, points, least in (("weights", by_weights, LARGE_WEIGHTS), ("chains", by_chains, MANY_CHAINS)):
        # Modules for vectorisation are loaded with the second chain.
        anyway, power = growth(points[by == "chains" :], by)
        found[by] = above(points, anyway)
        found["exponents"][by] = {**exponents(points, by, least), "memory": power}
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """The figure: time and memory, against weights and against chains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8.5, 6.2), layout="constrained")
    sides = (("weights", "weights, one chain", LARGE_WEIGHTS), ("chains", "chains of 3,760 weights", MANY_CHAINS))
    rows = (("seconds", "CPU s per step", 1.0), ("bytes", "memory that grows, MB", 1e6))
    for column, (by, label, least) in enumerate(sides):
        points = results[by]
        size = np.array([point[by] for point in points], float)
        for row, (of, name, unit) in enumerate(rows):
            value, axis = np.array([point[of] for point in points]) / unit, axes[row, column]
            axis.loglog(size, value, "o-", color="C0", markersize=4, label="measured")
            line = value[-1] * size / size[-1]
            kept = line > 0.3 * np.nanmin(value)
            axis.loglog(size[kept], line[kept], ":", color="0.5", label="proportional")
            slopes = results["exponents"][by]
            slope = slopes["memory"] if of == "bytes" else slopes[f"time, from {least:,}"]
            axis.set_title(f"exponent {slope:.2f}" + (f" from {least:,} {by}" if of == "seconds" else ""), fontsize=9)
            axis.set(xlabel=label, ylabel=name)
            axis.grid(True, which="major", color="0.9")
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _megabytes(num_bytes: float) -> str:
    return "" if math.isnan(num_bytes) else f"{num_bytes / 1e6:.0f}"


def main() -> None:
    """The tables, the figure and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small sizes: checks that it runs")
    quick = parser.parse_args().quick
    sizes, counts = (QUICK_WEIGHTS, QUICK_CHAINS) if quick else (WEIGHTS, CHAINS)
    results: dict[str, Any] = summed_up([measure(n, None) for n in sizes], [measure(None, n) for n in counts])
    for by in ("weights", "chains"):
        rows = [[f"{p[by]:,}", f"{1e3 * p['seconds']:.3g}", _megabytes(p["bytes"])] for p in results[by]]
        print(markdown_table([by, "CPU ms per step", "memory, MB"], rows))
        slopes = [f"{name} {value:.2f}" for name, value in results["exponents"][by].items()]
        print("\nExponents:", ", ".join(slopes), "\n")
    if not quick:
        draw(results, RESULTS / "scale.png")
        for by in ("weights", "chains"):
            results[by] = [{**p, "bytes": None if math.isnan(p["bytes"]) else p["bytes"]} for p in results[by]]
        path = write_json("scale", results)
        print(f"Written to {path} and {RESULTS / 'scale.png'}")


if __name__ == "__main__":
    main()
