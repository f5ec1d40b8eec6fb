# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Prediction under many draws, against Pyro and a hand-written loop: ``python -m benchmarks.predictive``.

100 draws of 784-100-10 and 30 of 784-400-400-10 x the 10,000 test images of MNIST (``PYRO_APD_DATA``), at one and two
threads. Every method computes class probabilities ``(S, N, K)``, except those named ``labels`` or ``averages``. They
take turns in one process. The result is the median of a method's time divided by that of the loop in the same round.

Then, for the smaller network, peak memory above that of the process when it holds model, data and draws; and the speed
at which networks are drawn, compared with a copy of the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.nn import functional

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from pyro_apd.generators import LowRankGenerator
from pyro_apd.models.layout import Layout

RANK = 20
#: Draws that are timed: fewer of the larger network, so that everything ends within an hour.
NUM_DRAWS = {"784-100-10": 100, "784-400-400-10": 30}
NETWORKS = {"784-100-10": (784, 100, 10), "784-400-400-10": (784, 400, 400, 10)}
LOOP = "loop of matrix products"
# Methods for reference run only once, because a round takes minutes.
ROUNDS = 3
ONCE = (
    "Pyro, parallel, batched model",
    "Pyro, sequential, labels",
    "loop, then sampling, labels",
    "`apd.Predictive`, labels",
)


def images() -> Tensor:
    """The test images, ``(10000, 784)``, from 0 to 1."""
    folder = Path(os.environ.get("PYRO_APD_DATA", "../shared/data")) / "mnist"
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    return torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).reshape(-1, 784).float() / 255


class Problem:
    """A network, its data, a generator of its weights, and draws of it."""

    def __init__(self, name: str, num_draws: int) -> None:
        torch.manual_seed(0)
        sizes = NETWORKS[name]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        net = nn.Sequential(*(m for layer in layers[:-1] for m in (layer, nn.ReLU())), layers[-1])
        self.x, self.num_draws = images(), num_draws
        self.model = apd.BNN(net)
        parameters = {f"net.{n}": p.detach() for n, p in net.named_parameters()}
        names = [n for n in self._sites() if n != "obs"]
        self.parameter_names = [n.removeprefix("net.") for n in parameters]
        layout = Layout({n: parameters[f"net.{n.removeprefix('net.')}"].shape for n in names})
        generator = LowRankGenerator(layout.size, RANK)
        with torch.no_grad():
            torch.nn.init.normal_(generator.location, std=0.03)
            torch.nn.init.normal_(generator.deviations, std=0.01)
        self.posterior = apd.DistilledPosterior(layout, generator)
        self.draws = self.posterior.get_samples(num_draws, seed=1)
        self.names = names

    def _sites(self) -> list[str]:
        trace = pyro.poutine.trace(self.model).get_trace(self.x[:2])
        return [n for n, s in trace.nodes.items() if s["type"] == "sample" and not apd.layout.is_subsample(s)]

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of the layers, ``(S, ...)``."""
        values = [self.draws[n] for n in self.names]
        return [(w, b) for w, b in zip(values[::2], values[1::2], strict=True)]

    def loop(self) -> Tensor:
        """Hand-written, into preallocated memory."""
        weights = self.weights()
        out = torch.empty(self.num_draws, len(self.x), weights[-1][0].shape[1])
        with torch.no_grad():
            for s in range(self.num_draws):
                hidden = self.x
                for w, b in weights[:-1]:
                    hidden = torch.relu(functional.linear(hidden, w[s], b[s]))
                out[s] = functional.linear(hidden, weights[-1][0][s], weights[-1][1][s]).softmax(-1)
        return out

    def batched(self, x: Tensor) -> Tensor:
        """The model as Pyro's ``parallel=True`` needs it: layers that take a dimension of draws."""
        hidden, values = x, []
        for name, value in self.draws.items():
            event = dist.Normal(torch.zeros(value.shape[1:]), 1.0).to_event(value.dim() - 1)
            values.append(pyro.sample(name, event))
        for i, (w, b) in enumerate(zip(values[::2], values[1::2], strict=True)):
            hidden = hidden @ w.mT + b.unsqueeze(-2)
            hidden = torch.relu(hidden) if 2 * i + 2 < len(values) else hidden
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=hidden))
        return hidden

    def contestants(self) -> dict[str, Callable[[], Any]]:
        """Methods by name, the loop first."""
        draws, x, model = self.draws, self.x, self.model
        labels = {"return_sites": ("obs",)}
        return {
            LOOP: self.loop,
            "`outputs`, stored draws": lambda: apd.outputs(model, draws, x).probs_SNK,
            "`outputs`, straight from the generator": lambda: (
                apd.outputs(model, self.posterior.stream(self.num_draws, seed=1), x).probs_SNK
            ),
            "`Predictive(reduce=)`, from the generator, averages": lambda: apd.Predictive(
                model, guide=self.posterior, num_samples=self.num_draws, reduce=apd.reductions.OF_PROBABILITIES
            )(x),
            "`apd.Predictive`, labels": lambda: apd.Predictive(model, draws, **labels)(x),
            "loop, then sampling, labels": lambda: torch.stack([dist.Categorical(p).sample() for p in self.loop()]),
            "Pyro, sequential, labels": lambda: Predictive(model, draws, **labels)(x),
            "Pyro, parallel, batched model": lambda: Predictive(
                self.batched, draws, parallel=True, return_sites=("_RETURN",)
            )(x)["_RETURN"].softmax(-1),
        }


def time_all(name: str, num_threads: int, num_draws: int) -> dict[str, dict[str, float]]:
    """Seconds, and the ratio to the loop of the same round, medians by method."""
    torch.set_num_threads(num_threads)
    problem = Problem(name, num_draws)
    contestants = problem.contestants()
    seconds: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    ratios: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    reference = contestants[LOOP]()
    for contestant in list(contestants)[1:3]:
        torch.testing.assert_close(contestants[contestant](), reference, atol=1e-4, rtol=1e-3)
    del reference
    for round_ in range(ROUNDS):
        loop_seconds = 0.0
        for contestant, run in contestants.items():
            if round_ and contestant in ONCE:
                continue
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            loop_seconds = elapsed if contestant == LOOP else loop_seconds
            seconds[contestant].append(elapsed)
            ratios[contestant].append(loop_seconds / elapsed)
    return {
        c: {"seconds": statistics.median(seconds[c]), "speed": statistics.median(ratios[c]), "rounds": len(ratios[c])}
        for c in contestants
    }


def anonymous_bytes() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon")


def child(name: str, contestant: str, num_draws: int) -> None:
    """Prints peak anonymous memory above that before the call, and the bytes of the output."""
    torch.set_num_threads(1)
    problem = Problem(name, num_draws if "generator" not in contestant else 2)
    problem.num_draws = num_draws
    run = problem.contestants()[contestant]
    apd.outputs(problem.model, problem.posterior.stream(9, seed=0), problem.x[:64])
    before, highest, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    done.set()
    watcher.join()
    values = result.values() if isinstance(result, dict) else [result]
    print(highest[0] - before, sum(v.numel() * v.element_size() for v in values))


def memory(name: str, contestant: str, num_draws: int) -> tuple[int, int]:
    """Peak and output in bytes, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.predictive", "--child", name, contestant, str(num_draws)]
    peak, output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return int(peak), int(output)


def drawing(name: str, num_draws: int = 100, rounds: int = 15) -> dict[str, float]:
    """Bytes per second of networks drawn, and of a copy of as many bytes, which reads and writes each once."""
    torch.set_num_threads(1)
    posterior = Problem(name, 2).posterior
    target = torch.empty(num_draws, posterior.layout.size)
    source = torch.randn_like(target)
    rates: dict[str, list[float]] = {"drawn": [], "copied": [], "ratio": []}
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        middle = time.perf_counter()
        posterior.get_samples(num_draws)
        stop = time.perf_counter()
        size = target.numel() * target.element_size()
        rates["copied"].append(size / (middle - start))
        rates["drawn"].append(size / (stop - middle))
        rates["ratio"].append((middle - start) / (stop - middle))
    return {key: statistics.median(values) for key, values in rates.items()}


def main() -> None:
    """All tables, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--only", choices=["speed", "memory", "drawing"])
    parser.add_argument("--draws", nargs=2, type=int, default=list(NUM_DRAWS.values()), help="timed, by network")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], int(arguments.child[2]))
        return
    results: dict[str, Any] = {}
    if arguments.only in (None, "speed"):
        columns = [(name, threads) for threads in (1, 2) for name in NETWORKS]
        num_draws = dict(zip(NETWORKS, arguments.draws, strict=True))
        speed = {}
        for name, threads in columns:
            speed[f"{name}, {threads} threads"] = time_all(name, threads, num_draws[name])
            print(name, threads, speed[f"{name}, {threads} threads"], file=sys.stderr, flush=True)
        results["speed"], results["draws"] = speed, num_draws
        rows = [
            [c, *(f"{column[c]['speed']:.2f} ({column[c]['seconds']:.1f} s)" for column in speed.values())]
            for c in next(iter(speed.values()))
        ]
        print(markdown_table(["speed, loop = 1 (seconds)", *speed], rows) + "\n")
    if arguments.only in (None, "memory"):
        cases = [(next(iter(NETWORKS)), c, s) for c, s in MEASURED]
        peaks = [(*case, *memory(*case)) for case in cases]
        results["memory"] = [dict(zip(("network", "what", "draws", "peak", "output"), p, strict=True)) for p in peaks]
        rows = [[n, c, f"{s:,}", f"{p / 1e6:.1f}", f"{o / 1e6:.1f}"] for n, c, s, p, o in peaks]
        print(markdown_table(["network", "what", "draws", "peak, MB", "output, MB"], rows) + "\n")
    if arguments.only in (None, "drawing"):
        results["drawing"] = {name: drawing(name) for name in NETWORKS}
        rows = [
            [name, *(f"{r[k] / 1e9:.2f}" for k in ("drawn", "copied")), f"{100 * r['ratio']:.0f} %"]
            for name, r in results["drawing"].items()
        ]
        print(markdown_table(["network", "drawn, GB/s", "copied, GB/s", "share"], rows))
    write_json("predictive" if arguments.only is None else f"predictive_{arguments.only}", results)


MEASURED = (
    ("`outputs`, stored draws", 100),
    ("`outputs`, straight from the generator", 100),
    ("`Predictive(reduce=)`, from the generator, averages", 100),
    ("`Predictive(reduce=)`, from the generator, averages", 1000),
    (LOOP, 100),
)

if __name__ == "__main__":
    main()
