# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which default prior ``apd.BNN`` should have: ``python -m benchmarks.default_prior``.

Candidates are compared by the log-likelihood of validation rows, 15 % of the training rows of seven sets; the test rows
are not read. Networks are 1 x 50 with ReLU and with tanh and 2 x 50 with ReLU. Regressions learn their noise by input.
Four chains of the recommended kernel, 2,000 Langevin steps of warm-up and 2,000 kept.

The rule, set before anything was measured: a candidate replaces 1.0 if it has the best mean rank over sets and
networks; if its mean over networks is higher on at least six of the seven sets; and if no set's is lower by more than
0.05 nats per row.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import pyro_apd as apd
from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.tabular_cases import CLASSIFICATIONS, DATA, REGRESSIONS, load, make_model, metrics, network_outputs
from pyro_apd.models.priors import PriorSpec

NETWORKS: dict[str, tuple[tuple[int, ...], str]] = {
    "50 relu": ((50,), "relu"),
    "50 tanh": ((50,), "tanh"),
    "50-50 relu": ((50, 50), "relu"),
}
NUM_CHAINS, THINNING = 4, 20
#: Langevin steps of warm-up, and kept.
STEPS = (2_000, 2_000)
PRESENT = "1.0"
#: Sets of seven on which a new default must be better, and by how much it may be worse on any.
MIN_BETTER, MAX_WORSE = 6, 0.05


def scaled(factor: float) -> PriorSpec:
    """``factor`` / sqrt(inputs of a unit) for weights, 1 for biases."""

    def sd(name: str, parameter: Tensor) -> float:
        return factor / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 1.0

    return sd


CANDIDATES: dict[str, PriorSpec] = {
    PRESENT: 1.0,
    "fan_in": "fan_in",
    "√2 fan_in": scaled(math.sqrt(2)),
    "2 fan_in": scaled(2.0),
    "1.0, then fan_in": {"": "fan_in", "0": 1.0},
}


def measure(name: str, split: int, network: str, candidate: str, steps: tuple[int, int] = STEPS) -> dict[str, Any]:
    """One run, measured on validation rows."""
    table, (hidden, activation) = load(name, split).inner(split), NETWORKS[network]
    model = make_model(table, hidden, activation, CANDIDATES[candidate])
    begun, (num_warmup, num_kept) = time.process_time(), steps
    kernel = apd.recommended_kernel(model, table.x, table.y, seed=split, compile=False)
    mcmc = apd.MCMC(kernel, num_kept // THINNING, num_warmup // THINNING, num_chains=NUM_CHAINS, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(table.x, table.y)
    found = metrics(table, network_outputs(model, mcmc.get_samples(), table.x_test))
    used = {"kernel": type(kernel).__name__, "cpu_seconds": time.process_time() - begun}
    return found | used | {"warnings": sorted({type(w.message).__name__ for w in caught})}


def ranks(values: Sequence[float]) -> list[int]:
    """1 for the highest."""
    return [1 + sum(other > value for other in values) for value in values]


def by_case(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Log-likelihood by set and network, then candidate: means over the splits that have all candidates."""
    found: dict[str, dict[str, list[float]]] = {}
    for key in {key.rpartition("/")[0] for key in results}:
        entries = {candidate: results.get(f"{key}/{candidate}") for candidate in CANDIDATES}
        if all(entries.values()):
            name, _, network = key.split("/")
            for candidate, entry in entries.items():
                found.setdefault(f"{name}/{network}", {}).setdefault(candidate, []).append(entry["log_likelihood"])
    return {case: {name: mean(values) for name, values in found[case].items()} for case in sorted(found)}


def summary(cases: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean rank of each candidate; on how many sets it is better than the present default; its worst difference."""
    ranked = [ranks(list(values.values())) for values in cases.values()]
    sets = sorted({case.partition("/")[0] for case in cases})
    found = {}
    for i, candidate in enumerate(CANDIDATES):
        gains = [
            mean(v[candidate] - v[PRESENT] for case, v in cases.items() if case.partition("/")[0] == name)
            for name in sets
        ]
        found[candidate] = {"mean_rank": mean(row[i] for row in ranked), "better": sum(gain > 0 for gain in gains)}
        found[candidate] |= {"worst": min(gains), "mean_gain": mean(gains)}
    return found


def decision(found: Mapping[str, Mapping[str, float]]) -> str:
    """The candidate that the rule chooses."""
    best = min(found, key=lambda candidate: found[candidate]["mean_rank"])
    holds = found[best]["better"] >= MIN_BETTER and found[best]["worst"] >= -MAX_WORSE
    return best if holds else PRESENT


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables, and what the rule says."""
    cases = by_case(results)
    if not cases:
        return "No case has all candidates yet."
    rows = [[*case.split("/"), *(f"{value:.3f}" for value in values.values())] for case, values in cases.items()]
    found = summary(cases)
    lines = [
        [name, f"{f['mean_rank']:.2f}", f"{f['mean_gain']:+.3f}", f"{f['better']:.0f}", f"{f['worst']:+.3f}"]
        for name, f in found.items()
    ]
    header = ["prior", "mean rank", f"mean gain over {PRESENT}", "sets where better", "worst set"]
    table = markdown_table(["set", "network", *CANDIDATES], rows)
    return f"{table}\n\n{markdown_table(header, lines)}\n\nThe rule chooses: {decision(found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is not stored yet, stores it, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", type=int, default=[0])
    parser.add_argument("--sets", nargs="+", choices=[*REGRESSIONS, *CLASSIFICATIONS])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="a hundredth of the steps, nothing written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    has_uci = (DATA / "uci").is_dir()
    names = options.sets or [*(REGRESSIONS if has_uci else ()), *CLASSIFICATIONS]
    path = RESULTS / "default_prior.json"
    results = json.loads(path.read_text()) if path.exists() and not options.quick else {}
    steps = (STEPS[0] // 50, STEPS[1] // 50) if options.quick else STEPS
    keys = [
        (name, s, net, prior)
        for s in options.splits
        for net in options.networks
        for name in names
        for prior in CANDIDATES
    ]
    for name, split, network, candidate in keys:
        key = f"{name}/{split}/{network}/{candidate}"
        if key not in results:
            results[key] = measure(name, split, network, candidate, steps)
            print(key, results[key], flush=True)
            if not options.quick:
                write_json("default_prior", results)
    print(f"\n{report(results)}")


if __name__ == "__main__":
    main()
