# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Peak memory of a run against the size of its draws: ``python -m benchmarks.memory``.

A 784-100-10 network (79,510 weights), 2,000 draws, 636 MB in float32. Every driver runs in a fresh process. What is
stated is its peak resident memory above that of the same run with one draw, as a multiple of the draws.
"""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import markdown_table, write_json

SIZES, NUM_SAMPLES, NUM_ROWS, BATCH_SIZE = (784, 100, 10), 2000, 500, 10
DRIVERS = ("pyro.infer.MCMC", "apd.MCMC", "apd.MCMC, 4 chains vectorised", "apd.MCMC, store='disk'",
           "apd.MCMC, checkpoint=")  # fmt: skip


def driver(name: str, kernel: Any, num_samples: int, folder: str) -> Any:
    """The driver of that name, about to draw ``num_samples`` in all."""
    import pyro.infer

    import pyro_apd

    common = {"warmup_steps": 1, "disable_progbar": True}
    if name == "pyro.infer.MCMC":
        return pyro.infer.MCMC(kernel, num_samples, **common)
    if "chains" in name:
        return pyro_apd.MCMC(kernel, max(1, num_samples // 4), num_chains=4, **common)
    if "disk" in name:
        return pyro_apd.MCMC(kernel, num_samples, store="disk", store_path=Path(folder) / "draws", **common)
    if "checkpoint" in name:
        return pyro_apd.MCMC(kernel, num_samples, checkpoint=Path(folder) / "checkpoint", **common)
    return pyro_apd.MCMC(kernel, num_samples, **common)


def child(name: str, num_samples: int) -> None:
    """Prints the peak resident memory of this process, in bytes."""
    import pyro_apd

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(NUM_ROWS, SIZES[0]), torch.arange(NUM_ROWS) % SIZES[-1]
    net = nn.Sequential(nn.Linear(*SIZES[:2]), nn.ReLU(), nn.Linear(*SIZES[1:]))
    model = pyro_apd.BNN(net)
    # Without the compiler, whose own memory is no matter of the driver.
    kernel = pyro_apd.SGLD(model, step_size=1e-6, batch_size=BATCH_SIZE, seed=0, compile=False)
    with tempfile.TemporaryDirectory() as folder:
        mcmc = driver(name, kernel, num_samples, folder)
        mcmc.run(x, y)
        count = next(iter(mcmc.get_samples().values())).shape[0]
    assert count == max(num_samples, mcmc.num_chains)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(name: str, num_samples: int) -> int:
    """Peak of a fresh process."""
    code = f"from benchmarks.memory import child; child({name!r}, {num_samples})"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    return int(out.stdout.split()[-1])


def main() -> None:
    """Prints the table."""
    num_weights = sum(a * b + b for a, b in itertools.pairwise(SIZES))
    num_bytes = 4 * num_weights * NUM_SAMPLES
    rows, results = [], []
    for name in DRIVERS:
        base, full = peak(name, 1), peak(name, NUM_SAMPLES)
        results.append({"driver": name, "bytes": num_bytes, "peak": full, "peak_of_one_draw": base})
        share = (full - base) / num_bytes
        rows.append([name, f"{base / 1e6:.0f}", f"{full / 1e6:.0f}", f"{share:.2f}"])
        print(rows[-1], file=sys.stderr)
    print(f"{num_weights:,} weights, {NUM_SAMPLES:,} draws, {num_bytes / 1e6:.0f} MB\n")
    header = ["driver", "peak with one draw, MB", "peak, MB", "above it, in multiples of the draws"]
    print(markdown_table(header, rows))
    print(f"\nWritten to {write_json('memory', results)}")


if __name__ == "__main__":
    main()
