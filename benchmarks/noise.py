# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What noise costs: ``python -m benchmarks.noise [--quick]``.

Microseconds of processor time per step, on one thread, for the raw numbers and for the compiled update of SGLD that
turns them into noise, by kind of noise and network; alternating blocks, medians. ``Tensor.normal_`` is what the floor
of :mod:`benchmarks.sampling` counts. With ``--quick`` the update is not compiled, and nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.common import markdown_table, write_json
from pyro_apd.kernels.engine.noise import FORMS, Noise
from pyro_apd.kernels.engine.programs import compiled

NETWORKS = {"64-50-10": (64, 50, 10), "784-100-10": (784, 100, 10), "784-400-400-10": (784, 400, 400, 10)}
AT_ONCE = 5


def parts_of(kind: str, sizes: Sequence[int], is_quick: bool) -> dict[str, Callable[[], object]]:
    """Functions for :data:`AT_ONCE` steps: of raw numbers, and of the update of weights of these sizes by site."""
    noise = Noise(torch.zeros(sum(sizes)), [1], AT_ONCE, kind=kind)
    state = [[torch.randn(size) for size in sizes] for _ in range(2)]  # theta and gradient
    step_size = torch.tensor(1e-6)

    def update(state: list[list[Tensor]], raw: Tensor, step_size: Tensor) -> Tensor:
        for normal in noise.to_normal(raw):
            for theta, gradient, piece in zip(*state, normal.split(list(sizes)), strict=True):
                theta.addcmul_(gradient, step_size, value=-0.5).addcmul_(piece, step_size.sqrt())
        return step_size * 1

    raw = noise.raw(AT_ONCE).clone()
    if is_quick:
        return {"raw": lambda: noise.raw(AT_ONCE), "update": lambda: update(state, raw, step_size)}
    program = compiled(update, state, raw, step_size)
    return {"raw": lambda: noise.raw(AT_ONCE), "update": lambda: program(*state[0], *state[1], raw, step_size)}


def microseconds(function: Callable[[], object], num_calls: int) -> float:
    """Processor time per step."""
    began = time.process_time()
    for _ in range(num_calls):
        function()
    return (time.process_time() - began) / num_calls / AT_ONCE * 1e6


def measure(name: str, is_quick: bool, num_blocks: int) -> dict[str, float]:
    """Medians for one network, by kind and part."""
    sizes = [size for i, o in pairwise(NETWORKS[name]) for size in (i * o, o)]
    normal = torch.empty(sum(sizes))
    functions = {
        f"{kind}, {part}": function for kind in FORMS for part, function in parts_of(kind, sizes, is_quick).items()
    }
    functions["normal_"] = lambda: [normal.normal_() for _ in range(AT_ONCE)]
    num_calls = max(1, (1 if is_quick else 400) * 3760 // sum(sizes))
    times: dict[str, list[float]] = {what: [] for what in functions}
    for i in range(num_blocks):
        for what in list(functions)[:: 1 if i % 2 else -1]:
            times[what].append(microseconds(functions[what], num_calls))
    return {what: statistics.median(values) for what, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and stores it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    found = {name: measure(name, is_quick, 2 if is_quick else 15) for name in NETWORKS}
    header = ["network", *next(iter(found.values()))]
    rows = [[name, *(f"{value:.1f}" for value in values.values())] for name, values in found.items()]
    print(markdown_table(header, rows))
    if not is_quick:
        print(f"\nWritten to {write_json('noise', found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
