# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The last layer of a trained language model on CLINC150: which queries belong to none of 150 intents?

``python -m benchmarks.last_layer`` needs ``pip install transformers`` (extra ``benchmark``) and the folder named by
PYRO_APD_DATA. Every method has the same embeddings. Hyperparameters, and the temperature of mean probabilities, are
those with the least NLL on the 3,000 validation rows; the 100 out-of-scope validation rows are not used. Entropy and
mutual information are those of the draws as they are: a temperature changes what a prediction claims, and not how far
draws disagree. Results of methods and seeds are merged into ``benchmarks/results/last_layer.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import last_layer_methods as methods
from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.last_layer_data import CACHE, Queries, load_encoder, load_queries
from benchmarks.last_layer_methods import NUM_CLASSES, Fit, Predictor
from pyro_apd import uncertainty
from pyro_apd.metrics import expected_calibration_error

DATA = Path(os.environ.get("PYRO_APD_DATA", "../shared/data"))
METHODS = ("map", "laplace", "ensemble", "mc_dropout", "chain")
TEMPERATURES = torch.linspace(0.2, 1.5, 66)
FALSE_ALARMS = 0.05
BUDGET = 1.5
COLUMNS = ("accuracy", "NLL", "ECE", "AUROC H", "AUROC MI", "recall H", "recall MI", "temperature", "CPU s")


def nll(probs_NK: Tensor, y_N: Tensor) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-probs_NK.gather(1, y_N.unsqueeze(1)).clamp_min(1e-12).log().mean())


def tempered(probs_NK: Tensor, temperature: float) -> Tensor:
    """Probabilities to the power of 1/T, normalised."""
    return (probs_NK.clamp_min(1e-12).log() / temperature).softmax(-1)


def auroc(inside_N: Tensor, outside_M: Tensor) -> float:
    """Probability that a query of no intent has the higher score."""
    order = inside_N.sort().values
    below = torch.searchsorted(order, outside_M) + torch.searchsorted(order, outside_M, right=True)
    return float(below.double().mean() / (2 * len(order)))


def recall(inside_N: Tensor, outside_M: Tensor) -> float:
    """Share of queries of no intent that are found with false alarms for 5 % of the others."""
    return float((outside_M > inside_N.quantile(1 - FALSE_ALARMS)).double().mean())


def best_temperature(predict: Predictor, val: Queries) -> tuple[float, float]:
    """The temperature with the least NLL on validation rows, and that NLL."""
    probs_NK = predict(val.x_NF)[0]
    found = [(nll(tempered(probs_NK, float(t)), val.y_N), float(t)) for t in TEMPERATURES]
    least, temperature = min(found)
    return temperature, least


def measure(fit: Fit, queries: dict[str, Queries]) -> dict[str, Any]:
    """All metrics on the test rows. NLL and ECE are of tempered probabilities."""
    test, temperature = queries["test"], best_temperature(fit.predict, queries["val"])[0]
    inside_NK, mi_N = fit.predict(test.x_NF)
    outside_MK, mi_M = fit.predict(queries["oos_test"].x_NF)
    probs_NK = tempered(inside_NK, temperature)
    h_N, h_M = (uncertainty.predictive_entropy(probs.unsqueeze(0)) for probs in (inside_NK, outside_MK))
    return {
        "accuracy": float((inside_NK.argmax(-1) == test.y_N).double().mean()),
        "NLL": nll(probs_NK, test.y_N),
        "NLL at T = 1": nll(inside_NK, test.y_N),
        "ECE": float(expected_calibration_error(probs_NK, test.y_N)),
        "AUROC H": auroc(h_N, h_M),
        "AUROC MI": auroc(mi_N, mi_M),
        "recall H": recall(h_N, h_M),
        "recall MI": recall(mi_N, mi_M),
        "temperature": temperature,
        **fit.notes,
    }


def by_validation(fits: Iterable[tuple[str, Fit]], queries: dict[str, Queries]) -> dict[str, Any]:
    """Metrics of the setting with the least NLL on validation rows; the time is that of all settings."""
    start = time.process_time()
    tried = [(best_temperature(fit.predict, queries["val"])[1], setting, fit) for setting, fit in fits]
    _, setting, fit = min(tried, key=lambda entry: entry[0])
    return {**measure(fit, queries), "setting": setting, "cpu_seconds": (time.process_time() - start) / len(tried)}


def run_chain(queries: dict[str, Queries], seed: int, scale: float | None) -> dict[str, Any]:
    """The chain and its generator; the prior is chosen on validation rows of the first seed where it is not given."""
    encoder = load_encoder()[1]
    net = nn.Sequential(encoder, nn.Linear(queries["train"].x_NF.shape[1], NUM_CLASSES))
    found = {}
    for candidate in methods.CHAIN_SCALES if scale is None else (scale,):
        bnn, mcmc, fit = methods.chain(queries["train"], net, candidate, seed, time.process_time)
        found[candidate] = (best_temperature(fit.predict, queries["val"])[1], bnn, mcmc, fit)
        print(f"  prior {candidate}: NLL on validation rows {found[candidate][0]:.4f}", flush=True)
    chosen = min(found, key=lambda candidate: found[candidate][0])
    _, bnn, mcmc, fit = found[chosen]
    path = CACHE / f"last_layer_{seed}.safetensors"
    made = methods.generator(bnn, mcmc, seed, BUDGET, path, time.process_time)
    results = {"chain": measure(fit, queries), "generator": measure(made, queries)}
    results["generator"]["cpu_seconds"] += results["chain"]["cpu_seconds"]
    for result in results.values():
        result["setting"] = f"sd {chosen}"
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Means over seeds."""
    rows = []
    for method, by_seed in results.items():
        entries = list(by_seed.values())
        keys = [*COLUMNS[:-1], "cpu_seconds"]
        means = [sum(entry[key] for entry in entries) / len(entries) for key in keys]
        digits = [4, 3, 3, 4, 4, 3, 3, 2, 0]
        numbers = [f"{value:.{count}f}" for value, count in zip(means, digits, strict=True)]
        rows.append([method, ", ".join(dict.fromkeys(entry["setting"] for entry in entries)), *numbers])
    return markdown_table(["method", "chosen", *COLUMNS], rows)


def main() -> None:
    """Runs what is asked for, and prints the table of all that is stored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scale", type=float, help="prior of the chain, chosen on validation rows before")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (DATA / "clinc150").is_dir():
        print(f"skipped; {DATA / 'clinc150'} does not exist. Set PYRO_APD_DATA to the folder with the data.")
        return
    queries = load_queries(DATA)
    path = RESULTS / "last_layer.json"
    for seed in args.seeds:
        for method in args.methods:
            if method == "chain":
                found = run_chain(queries, seed, args.scale)
            else:
                make = {"map": methods.maximum}.get(method) or getattr(methods, method)
                found = {method: by_validation(make(queries["train"], seed), queries)}
            results = json.loads(path.read_text()) if path.is_file() else {}
            for name, result in found.items():
                results.setdefault(name, {})[str(seed)] = result
            write_json("last_layer", results)
            print(method, seed, json.dumps(found), flush=True)
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
