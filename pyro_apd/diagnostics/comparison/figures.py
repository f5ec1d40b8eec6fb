# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Every figure of a comparison, with its resolution and its verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pyro_apd.diagnostics.comparison.distances import (
    disagreement,
    distance_errors,
    energy_distance,
    function_distances,
    main_coordinates,
    spread,
    spread_error,
)
from pyro_apd.diagnostics.comparison.evaluation import Evaluation
from pyro_apd.diagnostics.comparison.memorisation import new_draw_shares
from pyro_apd.diagnostics.comparison.split import Split
from pyro_apd.diagnostics.comparison.standard_errors import (
    STANDARD_ERRORS,
    Half,
    balanced_halves,
    combined,
    even_halves,
    mean_similarities,
    resolved_errors,
    share_between_pieces,
    slow_halves,
    standard_errors,
)
from pyro_apd.diagnostics.comparison.verdict import POORLY_MIXED_SHARE, Row, judge, lookup
from pyro_apd.predictive.draws import ChainDraws


def figure_rows(chain_draws: ChainDraws, sets: Mapping[str, Evaluation], split: Split) -> tuple[list[Row], float]:
    """All rows, function space first, and the share of predictive variance between half-chains.

    :param chain_draws: all draws of the chain, among which copies are looked for.
    :param sets: evaluations by ``chain``, ``generator`` and ``stored``.
    :param split: which draws these are of.
    """
    chain = sets["chain"]
    mixing = share_between_pieces(chain, split.chains, split.draws_each)
    figures, resolution = _of_predictions(sets, split)
    for found, fine in (_of_distances(sets, split), _of_copies(chain_draws, sets, split)):
        for name, values in found.items():
            figures[name] |= values
        resolution |= fine
    num_data = chain.mean().shape[0] if chain.kind != "weights" else 1
    rows = []
    for name, value in figures["chain"].items():
        # Shares of data are never known better than to one datum.
        floor = 1 / num_data if not lookup(name).relative and chain.kind == "classes" else 0.0
        fine_enough = max(resolution[name], floor, 1e-6 * abs(value))
        found_value = figures["generator"].get(name, math.nan)
        status, verdict = judge(name, value, found_value, fine_enough, mixing > POORLY_MIXED_SHARE)
        kept = figures["stored"].get(name, math.nan)
        rows.append(Row(name, lookup(name).label, _group(name), value, found_value, kept, fine_enough, status, verdict))
    return sorted(rows, key=lambda row: _order(row.group)), mixing


_Figures = tuple[dict[str, dict[str, float]], dict[str, float]]


def _of_predictions(sets: Mapping[str, Evaluation], split: Split) -> _Figures:
    """Figures by ``chain``, ``generator`` and ``stored``, and their resolutions."""
    chain, generator, stored = sets["chain"], sets["generator"], sets.get("stored")
    halves = balanced_halves(split.chains, split.draws_each)
    alike = balanced_halves(1, 2 * len(halves[0][0]))
    errors = resolved_errors(chain, split.chains, split.draws_each)
    generator_errors = standard_errors(generator, even_halves(generator.num_draws))
    figures: dict[str, dict[str, float]] = {"stored": {}} | {name: s.figures() for name, s in sets.items()}
    resolution = {n: STANDARD_ERRORS * math.hypot(errors[n], generator_errors[n]) for n in errors}
    own, own_sd = mean_similarities(chain, halves, chain, halves)
    other, other_sd = mean_similarities(chain, halves, generator, alike)
    figures["chain"] |= own
    figures["generator"] |= other
    resolution |= {name: STANDARD_ERRORS * math.hypot(own_sd[name], other_sd.get(name, 0.0)) for name in own}
    if stored is not None:
        everything = list(range(stored.num_draws))
        figures["stored"] |= mean_similarities(chain, halves, stored, [(everything, everything)] * len(halves))[0]
    return figures, resolution


def _of_distances(sets: Mapping[str, Evaluation], split: Split) -> _Figures:
    """How far draws are apart as functions, and whether the generator's lie where the chain's do."""
    if sets["chain"].kind == "weights":
        return {}, {}
    names = list(sets)
    distance_TT = function_distances([sets[name] for name in names])
    places, start = {}, 0
    for name in names:
        places[name] = list(range(start, start + sets[name].num_draws))
        start += sets[name].num_draws
    chain, generator, size = places["chain"], places["generator"], len(places["chain"])
    even, slow = even_halves(size), slow_halves(split.chains, split.draws_each)
    coordinate_TM = main_coordinates(distance_TT, [*chain, *generator])
    figures = {
        name: {
            "disagreement": disagreement(distance_TT, index),
            "spread": spread(coordinate_TM, index),
            "energy": 0.0 if name == "chain" else energy_distance(distance_TT, chain, index),
        }
        for name, index in places.items()
    }

    def errors(draws: list[int], ways: Sequence[Half]) -> dict[str, float]:
        return distance_errors(distance_TT, draws, ways) | {"spread": spread_error(coordinate_TM, draws, ways)}

    slowest = [errors(chain, ways) for ways in slow]
    own = {name: combined(error, [by_name[name] for by_name in slowest]) for name, error in errors(chain, even).items()}
    other = errors(generator, even)
    error = {
        "disagreement": math.hypot(own["disagreement"], other["disagreement"]),
        "spread": figures["chain"]["spread"] * math.hypot(own["spread"], other["spread"]),
        # A squared distance of means: the noise of either side adds up before it is squared.
        "energy": (own["energy"] + other["energy"]) / 2,
    }
    return figures, {name: STANDARD_ERRORS * value for name, value in error.items()}


def _of_copies(chain_draws: ChainDraws, sets: Mapping[str, Evaluation], split: Split) -> _Figures:
    """How many draws are new; a tenth of copies is never chance where the chain itself has none."""
    others = {name: evaluation.theta_SD for name, evaluation in sets.items() if name != "chain"}
    shares = new_draw_shares(chain_draws, split.steps, others)
    if not shares:
        return {}, {}
    size, own = sets["generator"].num_draws, shares["chain"]
    error = math.sqrt(2 * max(own * (1 - own), 1 / size) / size)
    return {name: {"new_draws": share} for name, share in shares.items()}, {
        "new_draws": max(0.1, STANDARD_ERRORS * error)
    }


def _group(name: str) -> str:
    base, _, which = name.partition("[")
    if which:
        return f"out of distribution: {which[:-1]}"
    if base == "new_draws":
        return "memory"
    return "weight space" if base.startswith("weight") else "function space"


def _order(group: str) -> int:
    return ("function space", "out of distribution", "memory", "weight space").index(group.partition(":")[0])
