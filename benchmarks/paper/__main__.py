# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The experiments of Wang et al. (ICML 2018).

``python -m benchmarks.paper {toy,classification,ood,uci,active_learning,adversarial,all}
[--protocol faithful|corrected|both] [--budget smoke|cpu|full] [--device cpu]``

``faithful`` keeps the published settings with their errors; ``corrected`` fixes these: the file of each experiment
lists the differences. Data come from the folder named by ``PYRO_APD_DATA``. Without one, and always with the smoke
budget, scikit-learn's digits replace MNIST. Results are stored after each job; stored results are computed again only
with ``--again``. Chains and fitted networks are cached, and all experiments share the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.paper.common import BUDGETS, PROTOCOLS, Options, Results, write_table
from benchmarks.paper.registry import available, find


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs experiments, and prints a table of each."""
    names = available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=[*names, "all"])
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "both"], default="corrected")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the budget's own")
    parser.add_argument("--digits", action="store_true", help="use the digits even if MNIST is available")
    parser.add_argument("--methods", nargs="+", help="only methods whose names begin with this")
    parser.add_argument("--networks", nargs="+", type=hidden_layers, help="of classification: 100, 400-400 or both")
    parser.add_argument("--again", action="store_true", help="also run what is stored")
    parser.add_argument("--results", type=Path, default=Options().results, help="folder for results and tables")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    asked.results.mkdir(parents=True, exist_ok=True)
    for name in names if asked.experiment == "all" else [asked.experiment]:
        for protocol in PROTOCOLS if asked.protocol == "both" else [asked.protocol]:
            seeds = None if asked.seeds is None else tuple(asked.seeds)
            only = None if asked.methods is None else tuple(asked.methods)
            networks = None if asked.networks is None else tuple(asked.networks)
            options = Options(
                protocol, asked.budget, asked.device, seeds, asked.digits, only, asked.again, asked.results, networks
            )
            run(name, options)


def hidden_layers(text: str) -> tuple[int, ...]:
    """Parses names such as ``400-400``."""
    return tuple(int(size) for size in text.split("-"))


def run(name: str, options: Options) -> Results:
    """One experiment: computes what is missing, then shows all."""
    experiment, results = find(name), Results(name, options)
    start = time.monotonic()
    if not (options.is_smoke or options.digits or options.has_images):
        print("No folder with data (PYRO_APD_DATA): scikit-learn's digits replace MNIST.", file=sys.stderr)
    experiment.run(options, results)
    text = experiment.table(options, results)
    print(f"\n{text}\n", flush=True)
    write_table(options, name, text)
    for path in experiment.figure(options, results) if experiment.figure else []:
        print(f"Drawn: {path}")
    print(f"{name}, {options.protocol}, {options.budget}: {time.monotonic() - start:.0f} s", flush=True)
    return results


if __name__ == "__main__":
    main()
