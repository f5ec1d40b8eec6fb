# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Langevin steps per second, compared with other implementations: ``python -m benchmarks.sampling``.

(a) a hand-written PyTorch loop, (b) ``posteriors``, (c) BlackJAX under ``lax.scan``, (d) Pyro's ``potential_fn`` at
every step, (e) pyro_apd through ``pyro.infer.MCMC`` without progress bar, (f) pyro_apd with vectorised chains; and the
floor, the arithmetic that every step needs. The other packages come with ``pip install -c constraints.txt -e
'.[benchmark]'``; missing ones are skipped.

Each contestant has its own process. All processes are alive together and on the same cores, as many as threads. One
runs at a time, for a block of half a second, in rounds of alternating order, so that other load affects all equally.
Results are medians over rounds, and ratios are medians of each round's ratio. At the end, one step of each contestant
is compared with an exact one: drift and noise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.common import markdown_table, write_json
from benchmarks.sampling_peers import BATCH_SIZE, PRIOR_SD, Job
from benchmarks.sampling_worker import serve

WORK = {
    "784-100-10": Job((784, 100, 10), 50_000),
    "64-50-10": Job((64, 50, 10), 1_500),
    "784-400-400-10": Job((784, 400, 400, 10), 50_000),
}
LABELS = {
    "a": "(a) hand-written PyTorch loop",
    "b": "(b) posteriors",
    "c": "(c) BlackJAX, lax.scan",
    "d": "(d) Pyro potential_fn",
    "e": "(e) ours through pyro.infer.MCMC",
    "floor": "floor: products, noise, gather",
}
# Goals for (e) against each, with one thread on a CPU; and for chain-steps of (f) against (e).
TARGETS = {
    "784-100-10": {"a": 1.4, "b": 2.5, "c": 1.2, "d": 4.0, "floor": 1.5, "f16": 1.2},
    "64-50-10": {"a": 2.0, "b": 2.5, "c": 1.2, "d": 4.0, "floor": 1.5, "f16": 3.0, "f64": 4.0},
    "784-400-400-10": {"a": 1.3, "b": 2.5, "c": 1.2, "d": 4.0, "floor": 1.5},
}
CHAINS = {"784-100-10": ("f16",), "64-50-10": ("f16", "f64"), "784-400-400-10": ()}
CUDA_TARGETS = {"a": 10.0}
DRIVER_TARGET = 0.02
# Makes the drift of the check's step larger than float32's rounding.
CHECK_STEP_SIZE = 1e-4


@dataclass
class Worker:
    """A contestant's process, seen from the parent.

    :ivar list rates: steps (of all chains) per second of wall time, block by block.
    :ivar list cpu_rates: the same per second of processor time.
    """

    name: str
    process: Any
    connection: Any
    unit: int = 1
    num_chains: int = 1
    startup_seconds: float = 0.0
    block_steps: int = 0
    rates: list[float] = field(default_factory=list)
    cpu_rates: list[float] = field(default_factory=list)

    def ask(self, *request: Any) -> tuple[Any, ...]:
        """The answer to a request.

        :raises WorkerError: if the contestant fails, or cannot be imported.
        """
        self.connection.send(request)
        return self.answer()

    def answer(self) -> tuple[Any, ...]:
        """The next message; raises as :meth:`ask`."""
        try:
            kind, *content = self.connection.recv()
        except EOFError:
            raise WorkerError("error", f"its process ended with code {self.process.exitcode}") from None
        if kind in ("missing", "error"):
            raise WorkerError(kind, content[0])
        return tuple(content)

    def time(self, num_steps: int, request: str = "block") -> tuple[float, float]:
        """Wall and processor seconds of this number of steps."""
        wall, cpu = self.ask(request, num_steps)
        return float(wall), float(cpu)

    def calibrate(self, seconds: float, settle: float) -> None:
        """Warms up, then fixes the length of a block."""
        self.startup_seconds, _ = self.time(self.unit)
        steps, spent, wall = self.unit, 0.0, 0.0
        while spent < settle or wall < seconds / 4:
            wall, _ = self.time(steps)
            spent += wall
            if wall < seconds / 4:
                steps *= 2
        self.block_steps = self.unit * max(1, round(seconds / wall * steps / self.unit))

    def block(self) -> None:
        """One timed block."""
        wall, cpu = self.time(self.block_steps)
        self.rates.append(self.num_chains * self.block_steps / wall)
        self.cpu_rates.append(self.num_chains * self.block_steps / max(cpu, 1e-9))


class WorkerError(Exception):
    """A contestant that cannot continue: ``kind`` is ``"missing"`` or ``"error"``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@contextmanager
def environment(num_threads: int, cache: str) -> Iterator[None]:
    """Limits the threads of processes started within, and gives them a new cache for compiled code."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if num_threads == 1 else ""
    limits = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    limits |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    limits["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor", dir=cache)
    before = os.environ.copy()
    os.environ.update(limits)
    try:
        yield
    finally:
        for name in limits:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in limits if name in before})


def open_worker(name: str, job: Job, cache: str) -> Worker:
    """Starts a contestant, and waits until it is ready.

    :raises WorkerError: if it fails.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, name, job, CHECK_STEP_SIZE), daemon=True)
    with environment(job.num_threads, cache):
        process.start()
    there.close()
    worker = Worker(name, process, here)
    worker.unit, worker.num_chains = worker.answer()
    return worker


def exact_drift(job: Job) -> np.ndarray:
    """-(epsilon/2) grad U ``(D,)`` at the start, on data of N equal rows; in float64."""
    x, y = replace(job, num_data=1).data()
    params = [value.astype(np.float64) for value in job.start()]
    weights, biases = params[::2], params[1::2]
    inputs = [x[0].astype(np.float64)]
    for weight, bias in zip(weights, biases, strict=True):
        inputs.append(weight @ np.maximum(inputs[-1], 0 if len(inputs) > 1 else -np.inf) + bias)
    logits = inputs.pop()
    delta = np.exp(logits - logits.max())
    delta /= delta.sum()
    delta[y[0]] -= 1
    parts: list[np.ndarray] = []
    for i in reversed(range(len(weights))):
        h = np.maximum(inputs[i], 0) if i else inputs[i]
        parts = [np.outer(delta, h).ravel(), delta, *parts]
        delta = (weights[i].T @ delta) * (inputs[i] > 0)
    likelihood = job.num_data * np.concatenate(parts)
    prior = np.concatenate([p.ravel() for p in params]) / PRIOR_SD**2
    return -0.5 * CHECK_STEP_SIZE * (likelihood + prior)


def check(worker: Worker, job: Job, drift: np.ndarray) -> dict[str, Any]:
    """Whether a contestant makes steps of SGLD: relative error of the drift, and sd of the noise over its exact one.

    The contestant runs no further blocks.
    """
    without, with_noise = worker.ask("stop")
    if without is None:
        return {}
    start = np.concatenate([value.ravel() for value in job.start()])
    error = float(np.max(np.linalg.norm(without - start - drift, axis=-1)) / np.linalg.norm(drift))
    noise = (with_noise - without) / CHECK_STEP_SIZE**0.5
    is_right = error < 1e-3 and abs(noise.std() - 1) < 5 / (2 * noise.size) ** 0.5
    return {"drift_error": error, "noise_sd_ratio": float(noise.std()), "is_right": bool(is_right)}


def driver_overhead(worker: Worker, pairs: int, share: float) -> dict[str, dict[str, Any]]:
    """Overhead of Pyro's driver as a share of a bare step, in wall time and in processor time.

    One number per pair of blocks, each a ``share`` of those of the rounds: short, so that load affects both equally.
    """
    steps = worker.unit * max(1, round(worker.block_steps * share / worker.unit))
    added: dict[str, list[float]] = {"wall": [], "cpu": []}
    for i in range(pairs):
        seconds = {r: worker.time(steps, r) for r in (("block", "bare") if i % 2 else ("bare", "block"))}
        for kind, within, bare in zip(added, seconds["block"], seconds["bare"], strict=True):
            added[kind].append(within / bare - 1)
    return {kind: {**spread(values), "pairs": values} for kind, values in added.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, first, median, third, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return {"median": median, "q1": first, "q3": third, "min": low, "max": high}


def compare(workers: Mapping[str, Worker]) -> dict[str, dict[str, Any]]:
    """Paired ratios with (e) by name, as :func:`ratio_name` says."""
    ratios: dict[str, dict[str, Any]] = {}
    ours = workers.get("e")
    for name, worker in workers.items():
        if ours is None or name == "e":
            continue
        for kind in ("rates", "cpu_rates"):
            pairs = zip(getattr(ours, kind), getattr(worker, kind), strict=True)
            is_above = name == "floor" or name.startswith("f")
            values = [other / own if is_above else own / other for own, other in pairs]
            ratios.setdefault(name, {})[kind.replace("rates", "ratio")] = {**spread(values), "rounds": values}
    return ratios


def measure(work: str, job: Job, names: Sequence[str], options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """All contestants on one network, at one number of threads; compiled code goes to the folder ``cache``."""
    workers: dict[str, Worker] = {}
    result: dict[str, Any] = {"work": work, "num_threads": job.num_threads, "device": job.device, "skipped": {}}
    result["load"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    drift = exact_drift(job)
    try:
        for name in names:
            try:
                workers[name] = open_worker(name, job, cache)
                workers[name].calibrate(options.block_seconds, options.settle_seconds)
            except WorkerError as error:
                _skip(result, workers, name, error)
        for i in range(options.rounds):
            for name in list(workers) if i % 2 else list(workers)[::-1]:
                try:
                    workers[name].block()
                except WorkerError as error:
                    _skip(result, workers, name, error)
        result["ratios"] = compare(workers)
        result["contestants"] = {}
        for name, worker in workers.items():
            figures = result["contestants"][name] = summarise(worker)
            try:
                if name == "e":
                    result["driver_overhead"] = driver_overhead(worker, options.pairs, 0.2)
                figures |= worker.ask("facts")[0]
                figures |= check(worker, job, drift)
            except WorkerError as error:
                _skip(result, {}, name, error)
    finally:
        for worker in workers.values():
            worker.connection.close()  # the waiting process ends
            worker.process.join(10)
            worker.process.kill()
    return result


def summarise(worker: Worker) -> dict[str, Any]:
    """Results of one contestant."""
    return {
        "label": label(worker.name),
        "steps_per_second": {**spread(worker.rates), "rounds": worker.rates},
        "processors_used": float(np.median(np.divide(worker.rates, worker.cpu_rates))),
        "block_steps": worker.block_steps,
        "startup_seconds": worker.startup_seconds,
    }


def _skip(result: dict[str, Any], workers: dict[str, Worker], name: str, error: WorkerError) -> None:
    workers.pop(name, None)
    reason = str(error)
    if error.kind == "missing" and name in "bc":
        reason += "; pip install -c constraints.txt -e '.[benchmark]'"
    result["skipped"][name] = {"kind": error.kind, "reason": reason}
    verb = "stopped" if error.kind == "error" else "skipped"
    print(f"{label(name)}: {verb}: {reason}", file=sys.stderr, flush=True)


def label(name: str) -> str:
    """A contestant's name for readers."""
    return LABELS.get(name) or f"(f) ours, {name[1:]} vectorised chains"


def ratio_name(name: str) -> str:
    """Names of numerator and denominator of a ratio of :func:`compare`, both in steps per second."""
    if name.startswith("f"):
        return ("floor" if name == "floor" else "(f)") + "/(e)"
    return f"(e)/({name})"


def table(result: Mapping[str, Any]) -> str:
    """Results of one network in Markdown."""
    on_cpu = result["device"] == "cpu"
    targets = (TARGETS[result["work"]] if result["num_threads"] == 1 else {}) if on_cpu else CUDA_TARGETS
    rows = []
    for name, figures in result["contestants"].items():
        rate, ratio = figures["steps_per_second"], result["ratios"].get(name)
        cells = ["–", "–", "–", "–"]
        if ratio is not None:
            wall, target = ratio["ratio"], targets.get(name)
            cells[0] = f"{ratio_name(name)} {wall['median']:.2f} [{wall['q1']:.2f}, {wall['q3']:.2f}]"
            if on_cpu and result["num_threads"] == 1:
                cells[1] = f"{ratio['cpu_ratio']['median']:.2f}"
            if target is not None:
                is_met = wall["median"] <= target if name == "floor" else wall["median"] >= target
                cells[2] = f"{'≤' if name == 'floor' else '≥'} {target:g}"
                cells[3] = "yes" if is_met else "**no**"
        exact = f"{figures['drift_error']:.0e}, {figures['noise_sd_ratio']:.3f}" if "is_right" in figures else "–"
        if not figures.get("is_right", True):
            exact += " **wrong**"
        rows.append(
            [
                figures["label"] + (f" ({figures['path']})" if "path" in figures else ""),
                f"{rate['median']:.0f} [{rate['q1']:.0f}, {rate['q3']:.0f}]",
                *cells,
                f"{figures['startup_seconds']:.2f}",
                f"{figures['processors_used']:.2f}",
                exact,
            ]
        )
    header = ["", "steps/s", "ratio", "by CPU time", "target", "met", "first steps, s", "cores", "drift, noise"]
    lines = [markdown_table(header, rows)]
    if "driver_overhead" in result:
        share = result["driver_overhead"]["wall"]
        verdict = f" (target < {DRIVER_TARGET:.0%}: {'yes' if share['median'] < DRIVER_TARGET else '**no**'})"
        lines.append(
            f"\nPyro's driver adds {share['median']:+.1%} [{share['q1']:+.1%}, {share['q3']:+.1%}] to a bare step"
            + (verdict if targets else "")
            + f"; by CPU time {result['driver_overhead']['cpu']['median']:+.1%}."
        )
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """Versions and processor, for the record."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "pyro-ppl", "posteriors", "blackjax", "jax", "jaxlib", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine(), **versions}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: (a), (e), (f) with 1, 16 and 256 chains")
    parser.add_argument("--only", help="contestants, separated by commas, such as a,e,f16,floor")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of blocks for the driver's overhead")
    parser.add_argument("--block-seconds", type=float, default=0.5)
    parser.add_argument("--settle-seconds", type=float, default=2.0, help="untimed steps of each contestant")
    parser.add_argument(
        "--compile",
        choices=["auto", "true", "false"],
        default="true",
        help="setting of pyro_apd: its default, auto, compiles only runs of 30,000 steps and more; these are shorter",
    )
    parser.add_argument("--quick", action="store_true", help="few short rounds, nothing written: checks that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.pairs, options.block_seconds, options.settle_seconds = 3, 5, 0.1, 0.1
    options.compile = {"auto": "auto", "true": True, "false": False}[options.compile]
    unknown = [n for n in (options.only or "").split(",") if n and not re.fullmatch(r"[a-e]|floor|f[1-9]\d*", n)]
    if unknown:
        parser.error(f"--only {options.only}: {unknown} are none of a, b, c, d, e, floor, or f and a number of chains")
    if options.device != "cpu":
        options.threads = options.threads[:1]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each network and number of threads; 1 if a contestant failed or its step is wrong."""
    options = parse(arguments)
    is_good, path = True, None
    for num_threads in options.threads:
        results = []
        for work in options.work:
            job = replace(WORK[work], num_threads=num_threads, device=options.device, compile=options.compile)
            names = ["a", "b", "c", "d", "e", *CHAINS[work], "floor"]
            if options.device != "cpu":
                names = ["a", "e", "f1", "f16", "f256"]
            if options.only:
                names = options.only.split(",")
            with tempfile.TemporaryDirectory(prefix="sampling_benchmark_", ignore_cleanup_errors=True) as cache:
                result = measure(work, job, names, options, cache)
            results.append(result)
            where = f"{num_threads} thread{'s' * (num_threads > 1)}" if options.device == "cpu" else options.device
            print(f"\n### {work}, N = {job.num_data:,}, batch {BATCH_SIZE}, {where}\n\n{table(result)}", flush=True)
            if not options.quick:
                many = f"_{num_threads}_threads" if num_threads > 1 else ""
                name = f"sampling{many}" if options.device == "cpu" else "sampling_cuda"
                content = {"machine": describe_machine(), "compile": options.compile, "results": results}
                path = write_json(name, content)
            is_good &= all(figures.get("is_right", True) for figures in result["contestants"].values())
            is_good &= all(skipped["kind"] == "missing" for skipped in result["skipped"].values())
    if path is not None:
        print(f"\nWritten to {path}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
