# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Does the verdict detect what is wrong, and only that? ``python -m benchmarks.diagnostics``.

Known posteriors, chains of 4 x 250 draws, generators with one planted defect each, 50 repeats. The results are how
often the verdict of ``compare`` detects each defect, and how often it reports a defect of an exact generator.
``--statistics`` measures the time of R-hat, effective sample sizes and Monte-Carlo errors of 80,000 weights.
``--reports DIR`` writes reports of a good, a collapsed and an unmixed case.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import markdown_table, write_json
from benchmarks.diagnostics_cases import NUM_MEMORISED, Generator, Problem, clusters, line
from pyro_apd import diagnostics
from pyro_apd.diagnostics.comparison.verdict import POORLY_MIXED
from pyro_apd.diagnostics.mixing.convergence import statistics

#: Chains that an exact generator is compared with, by their autocorrelation.
CLEAN = {"exact": 0.5, "exact, slow chain": 0.9}


Sampler = Callable[[int, torch.Generator], Tensor]


def narrowed(problem: Problem, factor: float) -> Sampler:
    """Every weight's sd times ``factor``."""
    centre_D = problem.modes_MD.mean(0)
    return lambda n, g: centre_D + factor * (problem.draws(n, g) - centre_D)


def shifted(problem: Problem, sds: float, generator: torch.Generator) -> Sampler:
    """Every weight's mean shifted by this number of its sds, up or down at random."""
    sd_D = problem.draws(4000, generator).std(0)
    sign_D = torch.randint(2, (len(sd_D),), generator=generator) * 2.0 - 1.0
    return lambda n, g: problem.draws(n, g) + sds * sign_D * sd_D


def memorised(problem: Problem, chain_CSD: Tensor, number: int, generator: torch.Generator) -> Sampler:
    """This number of draws of the chain, repeated, with noise of a hundredth of an sd."""
    pool = chain_CSD.flatten(0, 1)
    known_ND, sd_D = pool[torch.randperm(len(pool), generator=generator)[:number]], pool.std(0)

    def sampler(n: int, g: torch.Generator) -> Tensor:
        noise = torch.randn(n, len(sd_D), generator=g)
        return known_ND[torch.randint(number, (n,), generator=g)] + 0.01 * sd_D * noise

    return sampler


def uncorrelated(problem: Problem) -> Sampler:
    """Every weight drawn independently: all marginals are right, there is no dependence."""

    def sampler(n: int, g: torch.Generator) -> Tensor:
        return torch.stack([column[torch.randperm(n, generator=g)] for column in problem.draws(n, g).T], 1)

    return sampler


def planted(problem: Problem, chain_CSD: Tensor, seed: int) -> dict[str, Sampler]:
    """Samplers by name of their defect."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        "sd x 0.7": narrowed(problem, 0.7),
        "mean + 1 sd": shifted(problem, 1.0, generator),
        f"{NUM_MEMORISED} draws memorised": memorised(problem, chain_CSD, NUM_MEMORISED, generator),
        "correlation removed": uncorrelated(problem),
    }
    if len(problem.modes_MD) > 1:
        found["one of two modes dropped"] = lambda n, g: problem.draws(n, g, problem.modes_MD[:1])
    return found


def smaller(problem: Problem, chain_CSD: Tensor, seed: int) -> dict[str, Sampler]:
    """Smaller defects, to find the size below which the verdict does not detect them."""
    generator = torch.Generator().manual_seed(seed)
    found = {f"sd x {factor}": narrowed(problem, factor) for factor in (0.8, 0.9, 1.1, 1.3)}
    found |= {f"mean + {sds} sd": shifted(problem, sds, generator) for sds in (0.25, 0.5)}
    found |= {f"{n} draws memorised": memorised(problem, chain_CSD, n, generator) for n in (200, 1000)}
    return found


def compared(problem: Problem, chain_CSD: Tensor, sampler: Sampler, seed: int) -> diagnostics.Fidelity:
    """The verdict at the default settings of ``compare``."""
    return diagnostics.compare(
        problem.constrain(chain_CSD), Generator(problem, sampler), problem.model, problem.x, problem.y,
        seed=seed, group_by_chain=True,
    )  # fmt: skip


def one_repeat(problem: Problem, seed: int) -> dict[str, tuple[str, str]]:
    """Status and verdict of every case."""
    generator = torch.Generator().manual_seed(1000 * seed + 17)
    found = {}
    for name, autocorrelation in CLEAN.items():
        fidelity = compared(problem, problem.chain(generator, autocorrelation), problem.draws, seed)
        found[name] = (fidelity.status, fidelity.verdict)
    chain_CSD = problem.chain(generator)
    for name, sampler in planted(problem, chain_CSD, seed).items():
        fidelity = compared(problem, chain_CSD, sampler, seed)
        found[name] = (fidelity.status, fidelity.verdict)
    unmixed_CSD = problem.unmixed(generator)
    pool = unmixed_CSD.flatten(0, 1)

    def alike(n: int, g: torch.Generator) -> Tensor:
        return pool[torch.randint(len(pool), (n,), generator=g)]

    fidelity = compared(problem, unmixed_CSD, alike, seed)
    found["unmixed chain"] = (fidelity.status, fidelity.verdict)
    return found


def outcome(case: str, status: str, verdict: str) -> str:
    """``found``, ``alarm``, ``missed``, ``right`` or ``cannot tell``."""
    unmixed = verdict.lower().startswith(POORLY_MIXED)
    if case == "unmixed chain":
        return "found" if unmixed else "missed"
    faulty = status in ("loses", "departs")
    if case in CLEAN:
        return "alarm" if faulty or unmixed else "right" if status == "indistinguishable" else "cannot tell"
    return "found" if faulty else "cannot tell" if status == "unclear" else "missed"


def study(repeats: int, first_seed: int) -> dict[str, dict[str, dict[str, int]]]:
    """Outcomes counted by problem and case."""
    counts: dict[str, dict[str, Counter]] = {}
    for problem in (line(False), line(True), clusters(False), clusters(True)):
        for seed in range(first_seed, first_seed + repeats):
            for case, (status, verdict) in one_repeat(problem, seed).items():
                counts.setdefault(problem.name, {}).setdefault(case, Counter())[outcome(case, status, verdict)] += 1
        print(f"{problem.name}: done", flush=True)
    return {name: {case: dict(count) for case, count in cases.items()} for name, cases in counts.items()}


def frontier(repeats: int, first_seed: int) -> dict[str, dict[str, dict[str, int]]]:
    """The same for smaller defects, on the posteriors with one mode."""
    counts: dict[str, dict[str, Counter]] = {}
    for problem in (line(False), clusters(False)):
        for seed in range(first_seed, first_seed + repeats):
            chain_CSD = problem.chain(torch.Generator().manual_seed(1000 * seed + 29))
            for case, sampler in smaller(problem, chain_CSD, seed).items():
                fidelity = compared(problem, chain_CSD, sampler, seed)
                found = outcome(case, fidelity.status, fidelity.verdict)
                counts.setdefault(problem.name, {}).setdefault(case, Counter())[found] += 1
    return {name: {case: dict(count) for case, count in cases.items()} for name, cases in counts.items()}


def table(counts: dict[str, dict[str, dict[str, int]]]) -> str:
    """Shares of repeats by case and problem."""
    cases = list(dict.fromkeys(case for by_case in counts.values() for case in by_case))

    def cell(count: dict[str, int]) -> str:
        total = sum(count.values())
        return ", ".join(f"{what} {number / total:.0%}" for what, number in sorted(count.items())) if count else ""

    rows = [[case, *(cell(by_case.get(case, {})) for by_case in counts.values())] for case in cases]
    return markdown_table(["case", *counts], rows)


def time_statistics(num_weights: int = 80_000) -> dict[str, float]:
    """Seconds for all statistics of 4 x 500 draws of this number of weights, and the largest difference to ArviZ."""
    from pyro_apd.diagnostics.arviz_export import compat

    torch.set_num_threads(2)
    values_CSD = torch.randn(4, 500, num_weights, generator=torch.Generator().manual_seed(0))
    values_CSD[1:] += 0.5 * values_CSD[:-1].roll(1, 1)  # neither independent nor with equal spread
    before = _peak_memory()
    start, cpu = time.monotonic(), time.process_time()
    found = statistics(values_CSD)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
    memory = _peak_memory() - before
    arviz = compat.import_arviz()
    makers = {
        "rhat": arviz.rhat,
        "ess_bulk": lambda v: arviz.ess(v, method="bulk"),
        "ess_tail": lambda v: arviz.ess(v, method="tail"),
        "mcse_mean": lambda v: arviz.mcse(v, method="mean"),
        "mcse_sd": lambda v: arviz.mcse(v, method="sd"),
    }
    worst = 0.0
    for i in range(0, num_weights, num_weights // 100):
        column = values_CSD[:, :, i].double().numpy()
        for name, make in makers.items():
            theirs = float(make(column))
            worst = max(worst, abs(float(found[name][i]) - theirs) / abs(theirs))
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds, "megabytes": memory / 1e6}
    return {"weights": num_weights, **times, "largest_difference": worst}


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def write_reports(folder: Path) -> list[Path]:
    """Reports of a good, a collapsed and an unmixed case."""
    folder.mkdir(parents=True, exist_ok=True)
    problem = clusters(True)
    generator = torch.Generator().manual_seed(3)
    mixed, unmixed = problem.chain(generator), problem.unmixed(generator)
    pool = unmixed.flatten(0, 1)
    cases: dict[str, tuple[Tensor, Sampler]] = {
        "good": (mixed, problem.draws),
        "collapsed": (mixed, narrowed(problem, 0.02)),
        "unmixed": (unmixed, lambda n, g: pool[torch.randint(len(pool), (n,), generator=g)]),
    }
    written = []
    for name, (chain_CSD, sampler) in cases.items():
        path = diagnostics.report(
            problem.constrain(chain_CSD), Generator(problem, sampler), problem.model, problem.x, problem.y,
            ood={"far": 3 * problem.x.flip(0)}, group_by_chain=True, path=folder / f"{name}.html",
            title=f"A planted case: {name}",
        )  # fmt: skip
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)
        written.append(path)
    return written


def main() -> None:
    """Prints the tables and writes ``benchmarks/results/diagnostics.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--smaller-repeats", type=int, default=20, help="repeats of the smaller defects")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--statistics", action="store_true", help="only measure the time of the statistics of all weights"
    )
    parser.add_argument("--reports", nargs="?", const=Path("diagnostics-reports"), type=Path, metavar="DIR",
                        help="only write three reports")  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.reports is not None:
        write_reports(arguments.reports)
        return
    if arguments.statistics:
        torch.set_num_threads(2)  # the goal is for two cores
        print(time_statistics())
        return
    start = time.monotonic()
    counts = study(arguments.repeats, arguments.first_seed)
    print(table(counts), flush=True)
    seeds = [arguments.first_seed, arguments.first_seed + arguments.repeats - 1]
    results = {"seeds": seeds, "stated": counts, "seconds": time.monotonic() - start}
    write_json("diagnostics", results)
    small = frontier(arguments.smaller_repeats, arguments.first_seed)
    print(table(small), flush=True)
    timed = time_statistics()
    print(timed)
    write_json("diagnostics", {**results, "smaller": small, "statistics": timed})


if __name__ == "__main__":
    main()
