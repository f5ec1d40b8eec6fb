# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Does the verdict find what is wrong, and only that? ``python -m benchmarks.diagnostics``.

Known posteriors, chains of 4 x 250 draws, generators with one planted defect each, 50 repeats: how often the verdict of
``compare`` finds each, and how often it finds fault with an exact generator. ``--statistics`` times R-hat, effective
sizes and Monte-Carlo errors of 80,000 weights. ``--reports DIR`` writes reports of a good, a collapsed and an unmixed
case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.diagnostics_cases import NUM_MEMORISED, Generator, Problem, clusters, line
from pyro_apd import diagnostics
from pyro_apd.diagnostics.verdict import POORLY_MIXED

#: Chains that an exact generator is compared with, by their autocorrelation.
CLEAN = {"exact": 0.5, "exact, slow chain": 0.9}


def planted(problem: Problem, chain_CSD: Tensor, seed: int) -> dict[str, Callable[[int, torch.Generator], Tensor]]:
    """Samplers by name of their defect."""
    generator = torch.Generator().manual_seed(seed)
    size = len(problem.factor_DD)
    sd_D = problem.draws(4000, generator).std(0)
    sign_D = torch.randint(2, (size,), generator=generator) * 2.0 - 1.0
    known_ND = chain_CSD.flatten(0, 1)[
        torch.randperm(len(chain_CSD.flatten(0, 1)), generator=generator)[:NUM_MEMORISED]
    ]

    def narrow(n: int, g: torch.Generator) -> Tensor:
        centre_D = problem.modes_MD.mean(0)
        return centre_D + 0.7 * (problem.draws(n, g) - centre_D)

    def memorised(n: int, g: torch.Generator) -> Tensor:
        copies = known_ND[torch.randint(NUM_MEMORISED, (n,), generator=g)]
        return copies + 0.01 * sd_D * torch.randn(n, size, generator=g)

    def uncorrelated(n: int, g: torch.Generator) -> Tensor:
        theta = problem.draws(n, g)
        return torch.stack([column[torch.randperm(n, generator=g)] for column in theta.T], 1)

    found = {
        "sd x 0.7": narrow,
        "mean + 1 sd": lambda n, g: problem.draws(n, g) + sign_D * sd_D,
        f"{NUM_MEMORISED} draws memorised": memorised,
        "correlation removed": uncorrelated,
    }
    if len(problem.modes_MD) > 1:
        found["one of two modes dropped"] = lambda n, g: problem.draws(n, g, problem.modes_MD[:1])
    return found


def compared(problem: Problem, chain_CSD: Tensor, sampler: Callable, seed: int) -> diagnostics.Fidelity:
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
        print(problem.name, {case: dict(count) for case, count in counts[problem.name].items()}, flush=True)
    return {name: {case: dict(count) for case, count in cases.items()} for name, cases in counts.items()}
