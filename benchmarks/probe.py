# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What the checks before the first step cost: ``python -m benchmarks.probe``.

The potential of 784-100-10 on 60,000 random images is built in each style of mini-batches: arguments, rows and model
are checked, and the model is compared on other rows and other numbers of rows. Beside it stand 30,000 steps of SGLD,
by the time of 300.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.models.building import build_potential

NUM_ROWS, BATCH, REPEATS, STEPS = 60_000, 100, 5, 300


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of this process, the median of several calls."""

    def once() -> float:
        before = time.process_time()
        call()
        return time.process_time() - before

    return statistics.median(once() for _ in range(REPEATS))


def measure() -> list[dict[str, Any]]:
    """CPU seconds by style of mini-batches."""
    torch.manual_seed(0)
    x, y = torch.rand(NUM_ROWS, 784), torch.randint(0, 10, (NUM_ROWS,))
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    model, subsampling = apd.BNN(net), apd.BNN(net, subsample_size=BATCH)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    styles: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "batch_size=100": (model, (x, y), {"batch_size": BATCH}),
        "batch_size=100, NumPy arrays": (model, (x.numpy(), y.numpy()), {"batch_size": BATCH}),
        "DataLoader": (model, (loader,), {}),
        "plate in the model": (subsampling, (x, y), {}),
    }
    chain = apd.SGLD(model, 1e-6, batch_size=BATCH, seed=0).begin((x, y), {}, warmup_steps=0, chains=ChainSet(count=1))
    chain.advance(STEPS)  # captured, and compiled where that pays
    steps = cpu_seconds(lambda: chain.advance(STEPS)) * 30_000 / STEPS
    found = []
    for style, (given, args, settings) in styles.items():
        seconds = cpu_seconds(
            lambda given=given, args=args, settings=settings: build_potential(
                given, args, {}, capture=False, **settings
            )
        )
        found.append({"style": style, "seconds": seconds, "share": seconds / steps, "steps": steps})
    return found


def main() -> None:
    """Prints the table, and writes it beside the others."""
    torch.set_num_threads(1)
    found = measure()
    rows = [[row["style"], f"{row['seconds']:.2f}", f"{100 * row['share']:.1f} %"] for row in found]
    print(markdown_table(["mini-batches", "before the first step, CPU s", "of 30,000 steps"], rows))
    write_json("probe", found)


if __name__ == "__main__":
    main()
