# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``step_size="auto"`` against five posteriors with gold-standard draws: ``python -m benchmarks.posteriordb --auto``.

Every kernel runs as a user would run it, on standardised coordinates and the full batch, with nothing set but a seed:
four chains from two posterior sds off the mode, 2,000 Langevin steps of warm-up and 10,000 kept. A run misses where the
mean of a parameter is 0.1 sd or more off, or its sd 15 % or more, Monte Carlo error included. What matters is how many
runs miss and say nothing.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import pyro_apd as apd
from benchmarks.posteriordb_models import POSTERIORS, arguments, data_folder, reference
from benchmarks.tuning import TracedPotential
from pyro_apd.errors import DivergenceError

#: By name; full batch, step size "auto".
KERNELS = {name: getattr(apd, name) for name in ("SGLD", "PSGLD", "SGHMC", "MCLMC") if hasattr(apd, name)}
NUM_CHAINS, NUM_DRAWS, NUM_WARMUP, THINNING = 4, 500, 100, 20
MAX_MEAN_ERROR, MAX_SD_ERROR = 0.1, 0.15
HEADER = ["posterior", "kernel", "step size", "seconds", "smallest ESS", "mean error, sd", "sd ratio", "says"]


def run(name: str, kernel: str, seed: int) -> dict[str, Any]:
    """One run: largest mean error in sds, sd ratio furthest from 1, smallest ESS, and what it warned of."""
    from benchmarks.posteriordb import compare, worst

    posterior, folder = POSTERIORS[name], data_folder()
    args, gold = arguments(folder, posterior), reference(folder, posterior)
    target = TracedPotential(posterior.standardised(args), args, posterior.start(args))
    spread = torch.linalg.cholesky(torch.linalg.inv(target.hessian(target.mode)))
    noise = torch.randn(NUM_CHAINS, len(spread), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    offset = 2 * math.sqrt(len(spread)) * noise / noise.norm(dim=1, keepdim=True) @ spread.T
    sampler = KERNELS[kernel](target.model, "auto", thinning=THINNING, init_strategy=target.init, seed=seed)
    start = target.layout.split(target.mode + offset)
    mcmc = apd.MCMC(sampler, NUM_DRAWS, NUM_WARMUP, num_chains=NUM_CHAINS, initial_params=start, disable_progbar=True)
    begun, entry = time.monotonic(), {"posterior": name, "kernel": kernel, "seed": seed}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mcmc.run(*args)
        except DivergenceError as error:
            return entry | {"seconds": time.monotonic() - begun, "warnings": [str(error)], "misses": True}
    assert mcmc.store is not None
    draws = posterior.scalars(mcmc.get_samples(), args)
    rows = compare(draws, gold, len(mcmc.store.complete_part()[0]))
    mean, sd, _, ess = worst({"parameters": rows})
    return entry | {
        "seconds": time.monotonic() - begun,
        "step_size": float(mcmc.diagnostics()["step_size"][f"chain {mcmc.chains[0]}"][-1]),
        "parameters": rows,
        "mean_error": mean,
        "sd_ratio": sd,
        "ess": ess,
        "misses": not (mean < MAX_MEAN_ERROR and abs(sd - 1) < MAX_SD_ERROR),
        "warnings": [f"{type(w.message).__name__}: {w.message}" for w in caught],
    }


def benchmark(
    names: Sequence[str], kernels: Sequence[str], seeds: Sequence[int], done: Sequence[Mapping[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """All runs, one by one, but those that are ``done``."""
    known = {(entry["posterior"], entry["kernel"], entry["seed"]) for entry in done}
    for case in itertools.product(names, kernels, seeds):
        if case not in known:
            yield run(*case)


def cells(entry: Mapping[str, Any]) -> list[str]:
    """A run's row of the table."""
    says = "warned" if entry["warnings"] else "nothing"
    numbers = ["step_size", "seconds", "ess", "mean_error", "sd_ratio"]
    formats = ["{:.2g}", "{:.0f}", "{:.0f}", "{:.3f}", "{:.3f}"]
    shown = [f.format(entry[name]) if name in entry else "diverged" for name, f in zip(numbers, formats, strict=True)]
    return [entry["posterior"], entry["kernel"], *shown, f"{says}, misses" if entry["misses"] else says]


def summary(entries: Sequence[Mapping[str, Any]]) -> str:
    """How many runs missed, and how many of those said nothing."""
    misses = [entry for entry in entries if entry["misses"]]
    silent = [f"{e['posterior']} {e['kernel']} seed {e['seed']}" for e in misses if not e["warnings"]]
    warned = sum(bool(entry["warnings"]) for entry in entries)
    text = f"{len(entries)} runs; {len(misses)} miss, {len(silent)} of them without a warning; {warned} warned."
    return f"{text} Without a warning: {', '.join(silent)}." if silent else text
