# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Steps on data from a loader or a file, compared with data in memory: ``python -m benchmarks.loaders``.

MNIST (60,000 rows, from the folder named by ``PYRO_APD_DATA``), 784-100-10, batches of 100, SGLD, compiled steps, one
thread for torch. All chains are in one process. In each round every chain runs a block of steps, in alternating order,
so that other load affects all equally. Results are medians [quartiles] over rounds of the ratio to data in memory in
the same round. A block ends when as much has been read ahead as at its beginning. Wall time is what a user waits for.
CPU time includes the cost of the reading thread on any core. The measurement is then repeated with one core, where the
thread can hide nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.common import markdown_table, write_json
from pyro_apd import BNN, SGLD
from pyro_apd.data.index_stream import EpochStream, IndependentStream
from pyro_apd.datasets import mnist
from pyro_apd.kernels.engine.chain_set import ChainSet

BATCH_SIZE, STEP_SIZE, TARGET = 100, 1e-6, 0.15
MEMORY = "tensors in memory, `batch_size=100`"


class Items(Dataset[tuple[Tensor, Tensor]]):
    """A user's data set: the loader asks for items one by one, and stacks them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


class Pixels:
    """Rows of bytes on disk, scaled when they are read."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.pixels[rows]).float() / 127.5 - 1


def contestants(folder: Path) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of a run, and settings of its kernel, by description."""
    data = mnist()
    x, y = data.x_train, data.y_train
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "pixels.npy", ((x + 1) * 127.5).round().to(torch.uint8).numpy())
    mapped, pixels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "pixels"))
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=True)
    rows: dict[str, Any] = {"batch_size": BATCH_SIZE}
    return {
        MEMORY: ((x, y), rows),
        "`DataLoader` over a `TensorDataset`": ((loader,), {}),
        "the same, `prefetch=0`": ((loader,), {"prefetch": 0}),
        "`DataLoader` over a data set of items": ((DataLoader(Items(x, y), BATCH_SIZE, shuffle=True),), {}),
        "`numpy.memmap`, float32": ((mapped, y), rows),
        "the same, `prefetch=0`, memmap": ((mapped, y), {**rows, "prefetch": 0}),
        "`numpy.memmap`, bytes scaled when read": ((Pixels(pixels), y), rows),
    }


def begun(args: tuple[Any, ...], settings: dict[str, Any], compile: bool) -> Callable[[int], tuple[float, float]]:
    """A chain as a function from a number of steps to their wall time and CPU time in seconds."""
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    kernel = SGLD(BNN(net, prior_scale=0.141), STEP_SIZE, thinning=20, seed=0, compile=compile, **settings)
    chain = kernel.begin(args, {}, warmup_steps=0, chains=ChainSet())

    def advance(num_steps: int) -> tuple[float, float]:
        began = time.perf_counter(), time.process_time()
        with torch.no_grad():
            chain.advance(num_steps)
        worker = getattr(chain.potential.source, "_worker", None)
        if worker is not None:
            worker.wait()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    advance(100)
    return advance


def measured(chains: dict[str, Any], num_steps: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds per step, round by round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chains}
    for i in range(rounds):
        for name in chains if i % 2 == 0 else reversed(chains):
            wall, cpu = chains[name](num_steps)
            seconds[name].append((wall / num_steps, cpu / num_steps))
    return seconds


def table(seconds: dict[str, list[tuple[float, float]]]) -> str:
    """The table in Markdown."""
    rows = []
    for name, pairs in seconds.items():
        row = [name.removesuffix(", memmap")]
        for clock in (0, 1):
            row.append(f"{1e3 * statistics.median(pair[clock] for pair in pairs):.3f}")
            ratios = [pair[clock] / own[clock] for pair, own in zip(pairs, seconds[MEMORY], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            is_met = "yes" if middle <= 1 + TARGET else "**no**"
            row += ["–", "–"] if name == MEMORY else [f"{middle:.3f} [{low:.2f}, {high:.2f}]", is_met]
        rows.append(row)
    compared = ["ratio", f"within {TARGET:.0%}"]
    header = ["data", "ms per step", *compared, "CPU ms per step", *compared]
    return markdown_table(header, rows)


def epochs_table() -> tuple[str, list[dict[str, Any]]]:
    """CPU time to choose the rows of a batch: epochs by a table of all rows, and independent draws."""
    rows, results = [], []
    for num_data in (60_000, 1_000_000, 30_000_000, 1_000_000_000):
        for kind, name in ((EpochStream, "epochs"), (IndependentStream, "independent")):
            if kind is EpochStream and num_data > 10**8:
                rows.append([f"{num_data:,}", name, f"{8 * num_data / 1e6:,.0f}", "not run", ""])
                continue
            stream = kind(num_data, BATCH_SIZE, torch.Generator().manual_seed(0))
            began = time.process_time()
            next(stream)
            first, began = time.process_time() - began, time.process_time()
            for _ in range(2000):
                next(stream)
            each = (time.process_time() - began) / 2000
            held = 8 * num_data if kind is EpochStream else 0
            results.append({"num_data": num_data, "kind": name, "bytes": held, "first": first, "each": each})
            rows.append([f"{num_data:,}", name, f"{held / 1e6:,.2f}", f"{1e3 * first:,.1f}", f"{1e6 * each:.1f}"])
    header = ["rows", "drawn", "MB per chain", "first batch of an epoch, CPU ms", "each after, CPU µs"]
    return markdown_table(header, rows), results


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=500, help="in a block")
    parser.add_argument("--no-compile", action="store_true", help="steps with the captured graph, not compiled")
    parser.add_argument("--epochs", action="store_true", help="only the time to determine the next rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text, epochs = epochs_table()
    print(f"### Epochs\n\n{text}", flush=True)
    if options.epochs:
        return
    results: dict[str, Any] = {"epochs": epochs}
    with tempfile.TemporaryDirectory() as folder:
        named = contestants(Path(folder))
        chains = {name: begun(*given, compile=not options.no_compile) for name, given in named.items()}
        cores = sorted(os.sched_getaffinity(0))
        for title, used in ((f"{len(cores)} cores", cores), ("one core", cores[:1])):
            for task in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(task), used)
            before = os.getloadavg()[0]
            seconds = measured(chains, options.steps, options.rounds)
            load = [round(before, 1), round(os.getloadavg()[0], 1)]
            results[title] = {"load": load, "seconds": seconds}
            print(f"\n### {title}, load of the machine {load[0]} to {load[1]}\n\n{table(seconds)}", flush=True)
    print(f"\nWritten to {write_json('loaders', results)}")


if __name__ == "__main__":
    main()
