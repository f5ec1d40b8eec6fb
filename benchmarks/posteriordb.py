# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The kernels against five posteriors with gold-standard draws.

Run ``python -m benchmarks.posteriordb [--quick] [--auto [--resume]]``.

Models and data are in :mod:`benchmarks.posteriordb_models`. Each kernel runs through :class:`pyro.infer.MCMC` in two
coordinate systems: ``plain``, the model as Stan writes it, and ``standardised``, where a least-squares fit of the data
centres and scales each site. The goals are means within 0.1 sd of the reference and sds within 15 %, with at least
:data:`MIN_ESS` effective draws of every parameter.

Nothing is tuned on the reference: step sizes and the number of steps come from :mod:`benchmarks.tuning`, the latter up
to a limit. Chains start two posterior sds from the mode.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import MCMC
from torch import Tensor

from benchmarks import posteriordb_auto
from benchmarks.common import markdown_table, read_json, write_json
from benchmarks.posteriordb_models import BATCHES, POSTERIORS, Posterior, arguments, data_folder, reference
from benchmarks.tuning import KERNELS, SETTINGS, Plan, TracedPotential, explore, plan, shown
from pyro_apd.errors import DivergenceError

NUM_DRAWS, TARGET_ESS, MAX_STEPS = 5_000, 2_500, 100_000
QUANTILES = (0.05, 0.5, 0.95)
#: With fewer effective draws the Monte Carlo error of a mean is more than 0.1 sd, so success is chance.
MIN_ESS = 100


def compare(draws: Mapping[str, Tensor], gold: Mapping[str, Tensor], num_chains: int = 1) -> dict[str, Any]:
    """Draws ``(S,)``, chain after chain, against reference draws ``(10, 1000)``, both by scalar parameter.

    :returns: by parameter ``mean_error`` in reference sds, ``sd_ratio``, ``quantile_error`` (5, 50, 95 %) in sds, and
        ``ess``.
    """
    rows = {}
    for name, expected in gold.items():
        mine, flat = draws[name], expected.flatten()
        sd, quantiles = flat.std(), torch.tensor(QUANTILES).to(flat)
        rows[name] = {
            "mean_error": float((mine.mean() - flat.mean()) / sd),
            "sd_ratio": float(mine.std() / sd),
            "quantile_error": ((mine.quantile(quantiles) - flat.quantile(quantiles)) / sd).tolist(),
            "ess": float(pyro.ops.stats.effective_sample_size(mine.reshape(num_chains, -1))),
        }
    return rows


class Case:
    """A posterior in one of the two coordinate systems.

    :param Posterior posterior: which one.
    :param args: its model's arguments.
    :param gold: reference draws by scalar parameter.
    :param bool is_standardised: which coordinates.
    """

    def __init__(
        self, posterior: Posterior, args: tuple[Tensor, ...], gold: Mapping[str, Tensor], is_standardised: bool
    ) -> None:
        self.posterior, self.args, self.gold, self.is_standardised = posterior, args, gold, is_standardised
        model = posterior.standardised(args) if is_standardised else posterior.model
        self.target = TracedPotential(model, args, posterior.start(args))
        self.pilot = explore(self.target, by_row=len(args[0]) > 100)
        self._spread = torch.linalg.cholesky(torch.linalg.inv(self.target.hessian(self.target.mode)))

    def run(self, kernel: str, how: Plan, thinning: int, batch_size: int | None, seed: int) -> dict[str, Any]:
        """One chain and its comparison; a chain that diverges is marked."""
        noise = torch.randn(len(self._spread), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        offset = 2 * self._spread @ noise * math.sqrt(len(noise)) / noise.norm()
        sampler = KERNELS[kernel](
            self.target.model,
            how.step_size,
            thinning=thinning,
            batch_size=batch_size,
            init_strategy=self.target.init,
            seed=seed,
            compile=True,
            **SETTINGS[kernel],
        )
        start = self.target.layout.split(self.target.mode + offset)
        mcmc = MCMC(sampler, NUM_DRAWS, NUM_DRAWS // 10, initial_params=start, disable_progbar=True)
        begun = time.monotonic()
        try:
            mcmc.run(*self.args)
        except DivergenceError as error:
            return {"seed": seed, "diverged": str(error)}
        seconds = time.monotonic() - begun
        draws = self.posterior.scalars(mcmc.get_samples(), self.args)
        return {"seed": seed, "seconds": seconds, "parameters": compare(draws, self.gold)}


def worst(run: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Of all parameters: largest |mean error|, sd ratio furthest from 1, largest |quantile error|, smallest ESS."""
    rows = list(run["parameters"].values())
    sd = max((row["sd_ratio"] for row in rows), key=lambda ratio: abs(ratio - 1))
    quantile = max(abs(error) for row in rows for error in row["quantile_error"])
    return max(abs(row["mean_error"]) for row in rows), sd, quantile, min(row["ess"] for row in rows)


HEADER = ["posterior", "kernel", "coordinates", "batch", "step size", "steps", "steps wanted", "seconds"]
HEADER += ["smallest ESS", "mean, sd", "sd ratio", "quantiles, sd", "within"]


def cells(entry: Mapping[str, Any]) -> list[str]:
    """An entry's row of the table; one number per seed, of the worst parameter."""
    runs = [run for run in entry["runs"] if "parameters" in run]
    figures = [worst(run) for run in runs]
    passed = sum(mean < 0.1 and abs(sd - 1) < 0.15 and ess >= MIN_ESS for mean, sd, _, ess in figures)
    lost = len(entry["runs"]) - len(runs)
    return [
        entry["posterior"],
        entry["kernel"],
        entry["coordinates"],
        str(entry["batch_size"] or "all"),
        shown(entry["step_size"]),
        f"{entry['steps']:,}",
        f"{entry['steps_wanted']:.1g}",
        " ".join(f"{run['seconds']:.0f}" for run in runs),
        " ".join(f"{ess:.0f}" for *_, ess in figures),
        " ".join(f"{mean:.3f}" for mean, *_ in figures),
        " ".join(f"{sd:.3f}" for _, sd, *_ in figures),
        " ".join(f"{quantile:.2f}" for _, _, quantile, _ in figures),
        f"{passed} of {len(entry['runs'])}" + (f", {lost} diverged" if lost else ""),
    ]


def benchmark(names: Sequence[str], seeds: Sequence[int], limit: int, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All kernels: standardised, standardised with mini-batches, and plain; yields entries one by one.

    Full batches in standardised coordinates use all seeds, the others the first.
    """
    folder = data_folder()
    for name in names:
        args, gold = arguments(folder, POSTERIORS[name]), reference(folder, POSTERIORS[name])
        for coordinates in ("standardised", "plain"):
            if not any(kind == coordinates or (kind, coordinates) == ("batches", "standardised") for kind in kinds):
                continue
            case = Case(POSTERIORS[name], args, gold, coordinates == "standardised")
            batches: list[int | None] = [None] if coordinates in kinds else []
            if coordinates == "standardised" and "batches" in kinds and name in BATCHES:
                batches.append(BATCHES[name])
            for batch_size in batches:
                mine = seeds if coordinates == "standardised" and batch_size is None else seeds[:1]
                for kernel in KERNELS:
                    how = plan(kernel, case.pilot, len(args[0]), batch_size)
                    wanted = TARGET_ESS * how.steps_each
                    thinning = max(1, math.ceil(min(wanted, limit) / NUM_DRAWS))
                    yield {
                        "posterior": name,
                        "kernel": kernel,
                        "coordinates": coordinates,
                        "batch_size": batch_size,
                        "step_size": how.step_size,
                        "steps": thinning * NUM_DRAWS,
                        "steps_wanted": wanted,
                        "runs": [case.run(kernel, how, thinning, batch_size, seed) for seed in mine],
                    }


def _automatic(options: argparse.Namespace) -> None:
    """Prints the table of :mod:`benchmarks.posteriordb_auto`; where it is whole or resumed, writes each run's JSON."""
    kernels = options.kernels or list(posteriordb_auto.KERNELS)
    seeds = [0] if options.quick else options.seeds
    is_whole = options.only == list(POSTERIORS) and kernels == list(posteriordb_auto.KERNELS) and not options.quick
    entries = read_json("posteriordb_auto") if options.resume else []
    print(markdown_table(posteriordb_auto.HEADER, [posteriordb_auto.cells(entry) for entry in entries]), flush=True)
    for entry in posteriordb_auto.benchmark(options.only, kernels, seeds, entries):
        entries.append(entry)
        print("| " + " | ".join(posteriordb_auto.cells(entry)) + " |", flush=True)
        if is_whole or options.resume:
            write_json("posteriordb_auto", entries)
    print(posteriordb_auto.summary(entries))


def main() -> None:
    """Prints the table, and writes the JSON after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["standardised", "batches", "plain"]
    parser.add_argument("--quick", action="store_true", help="one seed, 40,000 steps at most, nothing written")
    parser.add_argument("--only", nargs="+", choices=list(POSTERIORS), default=list(POSTERIORS))
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--auto", action="store_true", help="step_size='auto', see benchmarks.posteriordb_auto")
    parser.add_argument("--kernels", nargs="+", choices=list(posteriordb_auto.KERNELS), help="with --auto; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="with --auto: keep the runs in its JSON, and add others")
    options = parser.parse_args()
    is_whole = not options.quick and options.only == list(POSTERIORS) and options.kinds == kinds
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        if options.auto:
            _automatic(options)
            return
        entries = []
        print(markdown_table(HEADER, []), flush=True)
        seeds, limit = ([0], 40_000) if options.quick else (options.seeds, MAX_STEPS)
        for entry in benchmark(options.only, seeds, limit, options.kinds):
            entries.append(entry)
            print("| " + " | ".join(cells(entry)) + " |", flush=True)
            if is_whole:
                write_json("posteriordb", entries)
    finally:
        torch.set_default_dtype(dtype)


if __name__ == "__main__":
    main()
