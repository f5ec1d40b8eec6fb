# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How finely a chain resolves a figure, read off its own halves.

A chain of autocorrelated draws has no p-value to offer. It can be cut in halves, though: if a figure differs by so
much between two halves of one chain, a difference of that size to a generator says nothing about the generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyro_apd.diagnostics.evaluation import Evaluation, similarities

_BLOCKS = 8

#: Resolution in standard errors. Chosen by simulation (2-4-3 networks, 80 data, 100 draws): with an exact generator at
#: most one comparison in twenty finds any of twelve figures different, for chains worth 40 independent draws or more
#: (one in eight where the chain is worth ten); spread shrunk to 0.7 is found in eight to nine of ten.
STANDARD_ERRORS = 3.5

Half = tuple[list[int], list[int]]


def balanced_halves(num_chains: int, num_draws: int) -> list[Half]:
    """Seven ways to cut pooled draws in two equal halves: balanced half-samples (McCarthy 1969).

    Every chain is cut into eight blocks in time, and a half takes the same four of every chain: so it holds all
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
        raise ValueError(f"At least {_BLOCKS} draws are needed to see how finely they resolve; got {num_draws}.")
    width = num_draws // _BLOCKS
    blocks = [
        [i for chain in range(num_chains) for i in range(start + chain * num_draws, start + chain * num_draws + width)]
        for start in range(0, _BLOCKS * width, width)
    ]
    return _alternate(blocks)


def halves_by_chain(num_chains: int, num_draws: int) -> list[Half]:
    """Ways to set chains against chains in two equal halves: seven with eight chains, three with four, one with two.

    Chains beyond a multiple of eight, four or two are left out; with a single chain there is no way.
    """
    groups = next((size for size in (8, 4, 2) if num_chains >= size), 0)
    width = num_chains // groups * num_draws if groups else 0
    return _alternate([list(range(g * width, (g + 1) * width)) for g in range(groups)])


def _alternate(blocks: Sequence[list[int]]) -> list[Half]:
    """Halves of 8, 4 or 2 blocks by the rows of a Hadamard matrix, those that alternate least first."""
    halves = []
    for row in (row for row in (4, 6, 2, 3, 7, 5, 1) if row < len(blocks)):
        half: Half = ([], [])
        for number, block in enumerate(blocks):
            half[(row & number).bit_count() % 2].extend(block)
        halves.append(half)
    return halves


def resolved_errors(evaluation: Evaluation, num_chains: int, num_draws: int) -> dict[str, float]:
    """Standard error of each figure of pooled chains: the larger of what time and what chains against chains say."""
    errors = standard_errors(evaluation, balanced_halves(num_chains, num_draws))
    between = standard_errors(evaluation, halves_by_chain(num_chains, num_draws))
    return {name: max(error, between.get(name, 0.0)) for name, error in errors.items()}


def standard_errors(evaluation: Evaluation, halves: Sequence[Half]) -> dict[str, float]:
    """Standard error of each figure of all draws, from the root-mean-square difference between halves.

    The three slowest ways to alternate count by themselves too: where the chain is slow, they differ most.
    """
    squares: dict[str, list[float]] = {}
    for first, second in halves:
        a, b = evaluation.take(first).figures(), evaluation.take(second).figures()
        for name in a:
            squares.setdefault(name, []).append((a[name] - b[name]) ** 2)
    # Halves have twice the variance of the whole, and a difference of two twice that of one.
    return {name: math.sqrt(max(_mean(values), _mean(values[:3]))) / 2 for name, values in squares.items()}


def mean_similarities(
    reference: Evaluation, halves: Sequence[Half], other: Evaluation, other_halves: Sequence[Half]
) -> tuple[dict[str, float], dict[str, float]]:
    """Likeness of first halves of ``reference`` and second halves of ``other``: mean and sd over ways to halve."""
    values: dict[str, list[float]] = {}
    for (first, _), (_, second) in zip(halves, other_halves, strict=True):
        for name, value in similarities(reference.take(first), other.take(second)).items():
            values.setdefault(name, []).append(value)
    means = {name: _mean(found) for name, found in values.items()}
    return means, {name: math.sqrt(_mean([(v - means[name]) ** 2 for v in found])) for name, found in values.items()}


def share_between_pieces(evaluation: Evaluation, num_chains: int, num_draws: int) -> float:
    """Share of the variance of predictions over draws that lies between half-chains rather than inside any.

    About zero for a chain that mixes; near one where every half-chain stays in a place of its own. NaN where chains
    are too short to tell. Summed over all inputs and outputs, so that it is steady where R-hat of single weights is
    not; for one quantity and long chains it is 1 - 1 / R-hat^2.
    """
    pieces = 2 if num_draws >= 4 else 1
    width = num_draws // pieces
    if evaluation.kind == "weights" or width < 2 or num_chains * pieces < 2:
        return math.nan
    starts = [c * num_draws + p * width for c in range(num_chains) for p in range(pieces)]
    within = _mean([float(evaluation.take(range(s, s + width)).spread()) for s in starts])
    total = float(evaluation.spread())
    return max(0.0, 1 - within / total) if total > 0 else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
