# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tables beside BDE and a deep ensemble: ``PYRO_APD_BDE_PYTHON=... python -m benchmarks.tabular``.

Four UCI regressions with noise that differs by input, and three classifications: networks of 50 ReLU units, the default
prior of ``apd.BNN``, the recommended kernel with nothing set but a seed, eight chains. BDE (``sklearn-contrib-bde``,
MILE, Sommer et al., ICLR 2025) runs at the settings of its README on the same rows, with the same network and eight
members. A deep ensemble trains groups of five members by Adam, each member stopped by rows of its own, until it has
used the CPU seconds of BDE. CPU seconds are of the whole fit, compiling included, prediction not.

The log-likelihood is that of the mixture over draws, per test row, of regressions in the unit of the targets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

import pyro_apd as apd
from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.function_space_networks import PEERS, cpu_seconds
from benchmarks.tabular_cases import (
    CLASSIFICATIONS,
    DATA,
    REGRESSIONS,
    Table,
    load,
    make_model,
    metrics,
    network_outputs,
)
from benchmarks.tabular_ensemble import ensemble_outputs
from pyro_apd.diagnostics.mixing.convergence import statistics

NUM_CHAINS, HIDDEN, THINNING = 8, (50,), 20
#: Langevin steps of warm-up, and kept, of regressions and of classifications: about the CPU seconds of BDE.
STEPS = {"regression": (18_000, 9_000), "classification": (6_000, 6_000)}
#: CPU seconds of the deep ensemble where BDE is absent.
SECONDS_WITHOUT_PEER = 20.0
METHODS = ("pyro_apd", "BDE", "deep ensemble")
SPLITS = {"regression": range(5), "classification": range(3)}


def ours(table: Table, seed: int, share: float) -> dict[str, Any]:
    """Eight chains of the recommended kernel, as a user would run them."""
    model, begun = make_model(table, HIDDEN), cpu_seconds()
    num_warmup, num_kept = (max(2, round(share * steps / THINNING)) for steps in STEPS[kind(table.name)])
    kernel = apd.recommended_kernel(model, table.x, table.y, seed=seed)
    mcmc = apd.MCMC(kernel, num_kept, num_warmup, num_chains=NUM_CHAINS, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(table.x, table.y)
    used = cpu_seconds() - begun
    outputs_SNK = network_outputs(model, mcmc.get_samples(), table.x_test)
    found = statistics(outputs_SNK.unflatten(0, (-1, num_kept)).flatten(2))
    said = {"kernel": type(kernel).__name__, "r_hat": float(found["rhat"].median())}
    said |= {"ess": float(found["ess_bulk"].median()), "num_chains": len(mcmc.chains)}
    said |= {"warnings": [f"{type(w.message).__name__}: {w.message}" for w in caught]}
    return {"cpu_seconds": used, **metrics(table, outputs_SNK), **said}


def bde(table: Table, seed: int, share: float, python: str) -> dict[str, Any]:
    """BDE, in a process of its own Python."""
    arrays = {"x": table.x.numpy(), "y": table.y.numpy(), "x_test": table.x_test.numpy(), "hidden": np.array(HIDDEN)}
    numbers = {"num_classes": table.num_classes, "seed": seed, "share": share, "num_chains": NUM_CHAINS}
    script = Path(__file__).with_name("tabular_peers.py")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(source, **arrays, **numbers)
        done = subprocess.run([python, script, source, target], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"BDE failed: {done.stderr[-2000:]}")
        with np.load(target) as file:
            used, outputs_CSNK = float(file["cpu_seconds"]), torch.as_tensor(file["outputs"])
    found = statistics(outputs_CSNK.flatten(2))
    said = {"r_hat": float(found["rhat"].median()), "ess": float(found["ess_bulk"].median())}
    return {"cpu_seconds": used, **metrics(table, outputs_CSNK.flatten(0, 1)), **said}


def ensemble(table: Table, seed: int, seconds: float) -> dict[str, Any]:
    """As many members as fit into so many CPU seconds, five at least."""
    begun = cpu_seconds()
    outputs_SNK = ensemble_outputs(table, HIDDEN, seed, seconds)
    used = cpu_seconds() - begun
    return {"cpu_seconds": used, **metrics(table, outputs_SNK), "members": len(outputs_SNK)}


def kind(name: str) -> str:
    """Of the set with this name."""
    return "regression" if name in REGRESSIONS else "classification"


def measured(
    table: Table, split: int, stored: Mapping[str, Any], methods: Sequence[str], share: float, python: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those methods that a split does not have yet; BDE first, as its CPU seconds are the ensemble's."""
    missing = [method for method in methods if method not in stored]
    seconds = stored["BDE"]["cpu_seconds"] if "BDE" in stored else share * SECONDS_WITHOUT_PEER
    if python and "BDE" in missing:
        found = bde(table, split, share, python)
        seconds = found["cpu_seconds"]
        yield "BDE", found
    if "pyro_apd" in missing:
        yield "pyro_apd", ours(table, split, share)
    if "deep ensemble" in missing:
        yield "deep ensemble", ensemble(table, split, seconds)


def with_error(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Regressions and classifications, means over splits, and the difference to BDE by split."""
    shown = []
    parts: list[tuple[Sequence[str], list[str], Callable[[dict[str, Any]], list[float]]]] = [
        (REGRESSIONS, ["RMSE"], lambda entry: [entry["rmse"]]),
        (CLASSIFICATIONS, ["accuracy", "ECE"], lambda entry: [entry["accuracy"], entry["ece"]]),
    ]
    for names, columns, others in parts:
        rows = [row for name in names for row in _rows(name, results, others)]
        if rows:
            header = ["set", "method", "log-likelihood", "minus BDE's", *columns, "CPU s", "r-hat", "splits"]
            shown.append(markdown_table(header, rows))
    return "\n\n".join(shown)


def _rows(
    name: str, results: Mapping[str, Mapping[str, Any]], others: Callable[[dict[str, Any]], list[float]]
) -> list[list[str]]:
    found = [entry for key, entry in results.items() if key.rpartition("/")[0] == name]
    rows = []
    for method in METHODS:
        entries = [entry[method] for entry in found if method in entry]
        if not entries:
            continue
        pairs = [(entry[method], entry["BDE"]) for entry in found if method in entry and "BDE" in entry]
        gains = [one["log_likelihood"] - other["log_likelihood"] for one, other in pairs]
        cells = [with_error([entry["log_likelihood"] for entry in entries])]
        cells += [with_error(gains) if gains and method != "BDE" else ""]
        cells += [with_error(values) for values in zip(*map(others, entries), strict=True)]
        cells += [f"{mean(entry['cpu_seconds'] for entry in entries):.0f}"]
        cells += [f"{mean(e['r_hat'] for e in entries):.2f}" if "r_hat" in entries[0] else ""]
        rows.append([name, method, *cells, str(len(entries))])
    return rows


def stored_results() -> dict[str, Any]:
    """By set and split, then method."""
    path = RESULTS / "tabular.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is not stored yet, stores it split by split, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=[*REGRESSIONS, *CLASSIFICATIONS])
    parser.add_argument("--splits", nargs="+", type=int, help="default: 0 to 4 of regressions, 0 to 2 of the others")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="measure these alone")
    parser.add_argument("--again", nargs="+", choices=METHODS, default=[], help="measure these anew")
    parser.add_argument("--quick", action="store_true", help="one split, a hundredth of the steps, nothing written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    python = os.environ.get(PEERS)
    if not python:
        print(f"BDE: skipped; {PEERS} does not name a Python that has sklearn-contrib-bde.")
    names = options.sets or [*REGRESSIONS, *CLASSIFICATIONS]
    if not (DATA / "uci").is_dir():
        print(f"Regressions: skipped; {DATA / 'uci'} does not exist. Set PYRO_APD_DATA to the folder with the data.")
        names = [name for name in names if name in CLASSIFICATIONS]
    share = 0.01 if options.quick else 1.0
    results = {} if options.quick else stored_results()
    # Split by split, so that after an interrupt all sets have some results.
    for split in options.splits or ([0] if options.quick else SPLITS["regression"]):
        for name in names:
            if options.splits is None and split not in SPLITS[kind(name)]:
                continue
            key = f"{name}/{split}"
            kept = {k: v for k, v in results.get(key, {}).items() if k not in options.again}
            for method, found in measured(load(name, split), split, kept, options.methods, share, python):
                print(f"{key} {method}: log-likelihood {found['log_likelihood']:.3f}", flush=True)
                # Another process may have stored others since.
                results = results if options.quick else stored_results()
                results[key] = results.get(key, {}) | {method: found}
                if not options.quick:
                    write_json("tabular", results)
    print(f"\n{tables(results)}")


if __name__ == "__main__":
    main()
