# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Steps per second by threads, on a quiet and on a busy machine: ``python -m benchmarks.threads_of_steps [--quick]``.

SGLD without compiling, batches of 100. Torch is set to one thread, to two, and to two with the choice of the package
(``cpu_threads``: small steps on one) undone. The machine is busy where as many processes as it has cores do nothing but
count. Rows of the table have the median of rounds, which take turns; also the system's load before the first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from pyro_apd.kernels.engine.chain import Chain
from pyro_apd.runtime.cpu_threads import cpu_threads

NETWORKS = {"64-50-10": (64, 50, 10), "784-100-10": (784, 100, 10), "784-400-400-10": (784, 400, 400, 10)}
#: Threads that torch is set to, and whether small steps take one by themselves.
SETTINGS = {"1": (1, True), "2": (2, True), "2, not limited": (2, False)}


def network_chain(sizes: tuple[int, ...]) -> Chain:
    """A chain on random data, at its first step."""
    random = torch.Generator().manual_seed(0)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    x, y = torch.randn(2000, sizes[0], generator=random), torch.arange(2000) % sizes[-1]
    kernel = apd.SGLD(apd.BNN(nn.Sequential(*layers[:-1])), 1e-6, batch_size=100, seed=0, compile=False, thinning=5)
    return kernel.begin((x, y), {}, warmup_steps=0)


def steps_per_second(chain: Chain, seconds: float, num_threads: int, is_limited: bool) -> float:
    """Of a chain, for so long."""
    chosen = chain._num_threads
    chain._num_threads = chosen if is_limited else None
    try:
        with cpu_threads(num_threads), torch.no_grad():
            chain.advance(5)
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                chain.advance(5)
                count += 5
            return count / (time.perf_counter() - began)
    finally:
        chain._num_threads = chosen


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """Context in which so many processes use the cores."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(names: list[str], seconds: float, rounds: int, num_busy: int) -> list[dict[str, Any]]:
    """Steps per second of each network, by setting."""
    results = []
    for name in names:
        chain = network_chain(NETWORKS[name])
        for load, count in (("quiet", 0), ("busy", num_busy)):
            found: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
            before = os.getloadavg()[0]
            with busy(count):
                for i in range(rounds):
                    for setting in list(SETTINGS) if i % 2 else list(SETTINGS)[::-1]:
                        found[setting].append(steps_per_second(chain, seconds, *SETTINGS[setting]))
            results.append({"network": name, "machine": load, "load_before": before, "steps_per_second": found})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """One row per network and load."""
    rows = []
    for result in results:
        rates = [f"{statistics.median(rates):.0f}" for rates in result["steps_per_second"].values()]
        rows.append([result["network"], result["machine"], *rates, f"{result['load_before']:.1f}"])
    header = ["network", "machine", *(f"{setting} threads" for setting in SETTINGS), "load before"]
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one network, short, nothing written")
    options = parser.parse_args(arguments)
    if options.quick:
        options.networks, options.seconds, options.rounds = ["64-50-10"], 0.05, 1
    results = measure(options.networks, options.seconds, options.rounds, os.cpu_count() or 1)
    print(table(results))
    if not options.quick:
        print(f"Written to {write_json('threads_of_steps', {'cores': os.cpu_count(), 'results': results})}")


if __name__ == "__main__":
    main()
