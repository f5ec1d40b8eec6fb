# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Large networks, from the chain to predictions: ``python -m benchmarks.large [--quick] [--case NAME ...]``.

A convolutional network (that of the paper's active learning), ResNet-20 on padded handwriting, and fully connected
networks of one and ten million weights. Each is sampled to a store on disk, distilled from there, and used for
predictions from the file. Each stage runs in a new process. Its peak memory is reported twice: all resident memory,
including pages of the store, which the system can reclaim; and memory not backed by files. Seconds are CPU time. Chains
are short: the results do not show that they have mixed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from benchmarks.large_networks import CASES, QUICK, Case
from benchmarks.memory import anonymous
from pyro_apd.chains.stores.disk import open_store

NUM_PREDICTED, NUM_DRAWN = 20, 5


def sample(case: Case, folder: Path) -> dict[str, float]:
    """Samples a chain to disk."""
    (x, y, *_), model = case.data(), case.model(is_trained=True)
    start = {"init_strategy": model.init_to_network} if case.num_trained else {"warm_start": case.warm_start}
    kernel = apd.SGLD(
        model, case.step_size, batch_size=case.batch_size, thinning=case.thinning, seed=0, compile=False, **start
    )
    times = []

    def note(kernel: Any, params: Any, stage: str, i: int) -> None:
        times.append(time.process_time())

    options = {"store": "disk", "store_path": folder / "draws", "disable_progbar": True}
    apd.MCMC(kernel, case.num_draws, case.warmup, hook_fn=note, **options).run(x, y)
    of_draws = torch.tensor(times).diff()
    size = open_store(folder / "draws").layout.size
    return {"processor_seconds_a_step": float(of_draws.median()) / case.thinning, "weights": size}


def distil(case: Case, folder: Path) -> dict[str, Any]:
    """Distils the chain to a file."""
    x, y, *_ = case.data()
    posterior = apd.distill(
        open_store(folder / "draws"), case.model(), data=(x, y), seed=0, progress=False,
    )  # fmt: skip
    posterior.save(folder / "posterior.safetensors")
    return {
        "networks": (folder / "posterior.safetensors").stat().st_size / (4 * posterior.layout.size),
        "rank": posterior.generator.rank,
        "num_steps": posterior.metadata["num_steps"],
        "start": {name: posterior.training_log[name][0] for name in posterior.metadata["metrics"]},
        "figures": posterior.metadata["metrics"],
    }


def draw(case: Case, folder: Path) -> dict[str, float]:
    """Available networks."""
    posterior = apd.DistilledPosterior.load(folder / "posterior.safetensors")
    began = time.process_time()
    posterior.get_samples(NUM_DRAWN, seed=0)
    return {"processor_seconds_a_draw": (time.process_time() - began) / NUM_DRAWN}


def predict(case: Case, folder: Path) -> dict[str, Any]:
    """Averaged predictions of generator and chain on test data."""
    _, _, x, y = case.data()
    model, posterior = case.model(), apd.DistilledPosterior.load(folder / "posterior.safetensors")
    found: dict[str, Any] = {}
    means = []
    store = open_store(folder / "draws")
    draws = {"chain": store.samples(), "generator": posterior.stream(NUM_PREDICTED, seed=0)}
    for name, source in draws.items():
        if name == "chain":
            index = torch.linspace(0, case.num_draws - 1, min(NUM_PREDICTED, case.num_draws)).long()
            parts = [
                apd.outputs(model, {site: value[0, i : i + 1] for site, value in source.items()}, x).probs_SNK
                for i in index.tolist()
            ]
            probs_SNK = torch.cat(parts)
        else:
            began = time.process_time()
            probs_SNK = apd.outputs(model, source, x).probs_SNK
            found["processor_seconds_a_prediction"] = (time.process_time() - began) / NUM_PREDICTED
        mean_NK = probs_SNK.mean(0)
        means.append(mean_NK)
        found[name] = {
            "accuracy": float((mean_NK.argmax(-1) == y).float().mean()),
            "nll": float(-mean_NK[torch.arange(len(y)), y].clamp_min(1e-12).log().mean()),
            "mutual_information": float(apd.uncertainty.mutual_information(probs_SNK).mean()),
        }
    found["total_variation"] = 0.5 * float((means[0] - means[1]).abs().sum(-1).mean())
    return found


STAGES: dict[str, Callable[[Case, Path], dict[str, Any]]] = {
    "sample": sample, "distil": distil, "draw": draw, "predict": predict,
}  # fmt: skip


def child(stage: str, name: str, quick: bool, folder: str) -> None:
    """Prints the results of a stage, with its time and peak memory."""
    torch.set_num_threads(1)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, busy = time.perf_counter(), time.process_time()
    found = STAGES[stage]((QUICK if quick else CASES)[name], Path(folder))
    found |= {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - busy}
    done.set()
    watcher.join()
    found |= {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_anonymous": peak[0]}
    print(json.dumps(found))


def run(stage: str, name: str, quick: bool, folder: str) -> dict[str, Any]:
    """The same from a new process."""
    code = f"import benchmarks.large as b; b.child({stage!r}, {name!r}, {quick}, {folder!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(stage, name, json.dumps(result), file=sys.stderr, flush=True)
    return result


def main() -> None:
    """The table, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks: checks that it runs, writes no results")
    parser.add_argument("--case", nargs="*", help="some of the cases")
    arguments = parser.parse_args()
    cases = arguments.case or list(QUICK if arguments.quick else CASES)
    rows, results = [], {}
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            stages = {stage: run(stage, name, arguments.quick, folder) for stage in STAGES}
        results[name] = stages
        sampled, distilled, predicted = stages["sample"], stages["distil"], stages["predict"]
        peaks = [f"{found['peak'] / 1e9:.1f} ({found['peak_anonymous'] / 1e9:.1f})" for found in stages.values()]
        rows.append([
            name, f"{int(sampled['weights']):,}", f"{sampled['processor_seconds_a_step']:.2f}",
            f"{distilled['networks']:.1f}", f"{distilled['processor_seconds']:.0f}",
            f"{stages['draw']['processor_seconds_a_draw']:.2f}",
            f"{predicted['processor_seconds_a_prediction']:.2f}", *peaks,
            f"{predicted['chain']['nll']:.3f}", f"{predicted['generator']['nll']:.3f}",
            f"{predicted['chain']['mutual_information']:.3f}", f"{predicted['generator']['mutual_information']:.3f}",
        ])  # fmt: skip
        if not arguments.quick:
            write_json(f"large_{name}", stages)
    header = ["network", "weights", "s per step", "file, networks", "distil, s", "s per draw", "s per prediction"]
    header += [f"peak of {stage}, GB" for stage in STAGES]
    header += ["NLL, chain", "generator", "MI, chain", "generator"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
