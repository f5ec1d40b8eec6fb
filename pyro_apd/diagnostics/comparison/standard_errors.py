# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Standard errors of the metrics of a chain, estimated from its halves.

Draws of a chain are autocorrelated, so there is no p-value. But a chain can be divided into halves: if a metric differs
by some amount between two halves of one chain, a difference of that size to a generator is not significant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyro_apd.diagnostics.comparison.evaluation import Evaluation, similarities

_BLOCKS = 8
_SLOW = 2.5

#: Resolution in standard errors: with a dozen metrics, none of whose errors is known exactly, this gives a false
#: alarm in less than one of twenty comparisons. Chosen on seeds of its own; ``benchmarks/diagnostics.py`` measures on
#: others what it finds and what it overlooks.
STANDARD_ERRORS = 4.0

Half = tuple[list[int], list[int]]


def balanced_halves(num_chains: int, num_draws: int) -> list[Half]:
    """Seven ways to divide pooled draws into two equal halves: balanced half-samples (McCarthy 1969).

    Every chain is divided into eight blocks in time, and a half takes the same four of every chain: so it holds all
    chains equally, and differs from its complement by time alone. Signs of the rows of a Hadamard matrix choose the
    blocks, in order of how often they alternate: first early against late. Chains of fewer than eight draws are laid
    end to end first.

    :param int num_chains: chains, ``C``; draws are indexed chain after chain.
    :param int num_draws: draws of each chain, ``S``.
    :raises ValueError: if there are fewer than eight draws in all.
    """
    if num_draws < _BLOCKS:
        num_chains, num_draws = 1, num_chains * num_draws
    if num_draws < _BLOCKS:
        raise ValueError(f"At least {_BLOCKS} draws are needed to estimate standard errors; got {num_draws}.")
    width = num_draws // _BLOCKS
    blocks = [
        [i for chain in range(num_chains) for i in range(start + chain * num_draws, start + chain * num_draws + width)]
        for start in range(0, _BLOCKS * width, width)
    ]
    return _alternate(blocks)


def even_halves(num_draws: int) -> list[Half]:
    """Fifteen ways to cut draws in two equal halves, through sixteen runs of them; seven through eight if they are few.

    Runs follow the order of the draws, chain after chain, so that halves differ in time and in chains.

    :raises ValueError: if there are fewer than eight draws.
    """
    runs = 16 if num_draws >= 32 else _BLOCKS
    if num_draws < _BLOCKS:
        raise ValueError(f"At least {_BLOCKS} draws are needed to estimate standard errors; got {num_draws}.")
    width = num_draws // runs
    return _alternate([list(range(start, start + width)) for start in range(0, runs * width, width)])


def slow_halves(num_chains: int, num_draws: int) -> list[list[Half]]:
    """The halves that show poor mixing: the three slowest ways to halve in time, and chains against chains."""
    ways = [balanced_halves(num_chains, num_draws)[:3], halves_by_chain(num_chains, num_draws)[:3]]
    return [halves for halves in ways if halves]


def halves_by_chain(num_chains: int, num_draws: int) -> list[Half]:
    """Ways to set chains against chains in two equal halves: seven with eight chains, three with four, one with two.

    Chains beyond a multiple of eight, four or two are left out; with a single chain there is no way.
    """
    groups = next((size for size in (8, 4, 2) if num_chains >= size), 0)
    width = num_chains // groups * num_draws if groups else 0
    return _alternate([list(range(g * width, (g + 1) * width)) for g in range(groups)])


def _alternate(blocks: Sequence[list[int]]) -> list[Half]:
    """Halves of 16, 8, 4 or 2 blocks by the rows of a Hadamard matrix, those that alternate least first."""
    rows = (8, 12, 4, 6, 14, 10, 2, 3, 11, 15, 7, 5, 13, 9, 1) if len(blocks) == 16 else (4, 6, 2, 3, 7, 5, 1)
    halves = []
    for row in (row for row in rows if row < len(blocks)):
        half: Half = ([], [])
        for number, block in enumerate(blocks):
            half[(row & number).bit_count() % 2].extend(block)
        halves.append(half)
    return halves


def resolved_errors(evaluation: Evaluation, num_chains: int, num_draws: int) -> dict[str, float]:
    """Standard error of each metric of pooled chains; see :func:`combined`."""
    even = standard_errors(evaluation, even_halves(num_chains * num_draws))
    slow = [standard_errors(evaluation, halves) for halves in slow_halves(num_chains, num_draws)]
    return {name: combined(error, [errors[name] for errors in slow]) for name, error in even.items()}


def combined(even: float, slow: Sequence[float]) -> float:
    """One standard error from that of all halves and those of the slowest.

    All halves together give the best estimate where the chain mixes. Where the slowest differ by more than chance
    allows (a variance of more than 2.5 times, from three ways), the chain does not mix, and these alone are right.
    """
    return max([even, *(error for error in slow if error**2 > _SLOW * even**2)])


def standard_errors(evaluation: Evaluation, halves: Sequence[Half]) -> dict[str, float]:
    """Standard error of each metric of all draws, from the root-mean-square difference between halves."""
    squares: dict[str, list[float]] = {}
    for first, second in halves:
        a, b = evaluation.take(first).metrics(), evaluation.take(second).metrics()
        for name in a:
            squares.setdefault(name, []).append((a[name] - b[name]) ** 2)
    # Halves have twice the variance of the whole, and a difference of two twice that of one.
    return {name: math.sqrt(_mean(values)) / 2 for name, values in squares.items()}


def mean_similarities(
    reference: Evaluation, halves: Sequence[Half], other: Evaluation, other_halves: Sequence[Half]
) -> tuple[dict[str, float], dict[str, float]]:
    """Similarity of first halves of ``reference`` and second halves of ``other``: mean and sd over ways to halve."""
    values: dict[str, list[float]] = {}
    for (first, _), (_, second) in zip(halves, other_halves, strict=True):
        for name, value in similarities(reference.take(first), other.take(second)).items():
            values.setdefault(name, []).append(value)
    means = {name: _mean(found) for name, found in values.items()}
    return means, {name: math.sqrt(_mean([(v - means[name]) ** 2 for v in found])) for name, found in values.items()}


def share_between_pieces(evaluation: Evaluation, num_chains: int, num_draws: int) -> float:
    """Share of the variance of predictions over draws that is between half-chains rather than within them.

    About zero for a chain that mixes; near one where every half-chain stays in a region of its own. NaN where chains
    are too short to tell. Summed over all inputs and outputs, so that it is steady where R-hat of single weights is
    not; for one quantity and long chains it is 1 - 1 / R-hat^2.
    """
    pieces = 2 if num_draws >= 4 else 1
    width = num_draws // pieces
    if evaluation.kind == "weights" or width < 2 or num_chains * pieces < 2:
        return math.nan
    starts = [c * num_draws + p * width for c in range(num_chains) for p in range(pieces)]
    within = _mean([float(evaluation.take(range(s, s + width)).total_variance()) for s in starts])
    total = float(evaluation.total_variance())
    return max(0.0, 1 - within / total) if total > 0 else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
