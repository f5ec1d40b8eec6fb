# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Peak memory of a run against the size of its draws: ``python -m benchmarks.memory``.

A 784-100-10 network (79,510 weights), 2,000 draws, 636 MB in float32. Every driver runs in a new process. The result is
its peak resident memory above that of the same run with one draw, as a multiple of the draws.

Then ``distill`` of such a run stored on disk, 1,500 draws, in a new process: its peak anonymous memory. This is what
the process itself requests and the system cannot reclaim, unlike pages of the draws' file. A step of training holds 64
networks and their gradients for any number of draws, so the same is measured with 100 draws.
"""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import markdown_table, write_json

SIZES, NUM_SAMPLES, NUM_ROWS, BATCH_SIZE = (784, 100, 10), 2000, 500, 10
DISTILLED, FEW_DISTILLED, DISTIL_STEPS = 1500, 100, 5
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


def problem() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Model and data."""
    import pyro_apd

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(NUM_ROWS, SIZES[0]), torch.arange(NUM_ROWS) % SIZES[-1]
    net = nn.Sequential(nn.Linear(*SIZES[:2]), nn.ReLU(), nn.Linear(*SIZES[1:]))
    return pyro_apd.BNN(net), x, y


def child(name: str, num_samples: int) -> None:
    """Prints the peak resident memory of this process, in bytes."""
    import pyro_apd

    model, x, y = problem()
    # Without the compiler, whose memory is not the driver's.
    kernel = pyro_apd.SGLD(model, step_size=1e-6, batch_size=BATCH_SIZE, seed=0, compile=False)
    with tempfile.TemporaryDirectory() as folder:
        mcmc = driver(name, kernel, num_samples, folder)
        mcmc.run(x, y)
        count = next(iter(mcmc.get_samples().values())).shape[0]
    assert count == max(num_samples, mcmc.num_chains)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(name: str, num_samples: int) -> int:
    """Peak of a new process."""
    return int(run(f"child({name!r}, {num_samples})").split()[-1])


def sample(path: str, num_samples: int) -> None:
    """Writes a run to disk."""
    import pyro_apd

    model, x, y = problem()
    kernel = pyro_apd.SGLD(model, step_size=1e-6, batch_size=BATCH_SIZE, seed=0, compile=False)
    options = {"warmup_steps": 1, "disable_progbar": True, "store": "disk", "store_path": path}
    pyro_apd.MCMC(kernel, num_samples, **options).run(x, y)


def anonymous() -> int:
    """Anonymous resident memory of this process, in bytes; 0 where the system, unlike Linux, does not report it."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


@contextmanager
def peak_anonymous(seconds: float = 0.01) -> Iterator[dict[str, int]]:
    """Measures the peak of anonymous memory above that before, as ``peak_anonymous`` of the dict, every so often."""
    found, before, done = {"peak_anonymous": 0}, anonymous(), threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            found["peak_anonymous"] = max(found["peak_anonymous"], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def distil(path: str) -> None:
    """Prints the peak anonymous memory of ``distill`` above that before the call, in bytes."""
    import pyro_apd
    from pyro_apd.chains.stores.disk import open_store

    model, x, y = problem()
    store = open_store(path)
    with peak_anonymous(0.001) as found:
        posterior = pyro_apd.distill(store, model, data=(x, y), num_steps=DISTIL_STEPS, seed=0, progress=False)
    assert posterior.metadata["space"] == "functions"
    print(found["peak_anonymous"])


def distil_peak(num_samples: int) -> int:
    """Peak of ``distill`` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "draws")
        run(f"sample({path!r}, {num_samples})")
        return int(run(f"distil({path!r})").split()[-1])


def run(call: str) -> str:
    """Output of one of this module's functions in a new process."""
    code = f"import benchmarks.memory as m; m.{call}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def distil_table(num_weights: int) -> tuple[str, list[dict[str, Any]]]:
    """The table of ``distill``, and its numbers."""
    rows, results = [], []
    for num_samples in (FEW_DISTILLED, DISTILLED):
        num_bytes, peak_bytes = 4 * num_weights * num_samples, distil_peak(num_samples)
        results.append({"draws": num_samples, "bytes": num_bytes, "peak_anonymous": peak_bytes})
        rows.append([f"{num_samples:,}", f"{num_bytes / 1e6:.0f}", f"{peak_bytes / 1e6:.0f}"])
        print(rows[-1], file=sys.stderr)
    few, many = results
    growth = (many["peak_anonymous"] - few["peak_anonymous"]) / (many["bytes"] - few["bytes"])
    table = markdown_table(["draws", "draws, MB", "peak anonymous memory of distill, MB"], rows)
    return f"{table}\n\nGrowth: {growth:.2f} bytes per byte of draws.", results


def main() -> None:
    """Prints the tables."""
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
    table, distilled = distil_table(num_weights)
    print(f"\n{table}")
    print(f"\nWritten to {write_json('memory', results)} and {write_json('memory_distill', distilled)}")


if __name__ == "__main__":
    main()
