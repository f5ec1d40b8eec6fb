# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Every metric of a comparison, with its resolution and its verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pyro_apd.diagnostics.comparison.distances import (
    disagreement,
    distance_errors,
    function_points,
    main_coordinates,
    main_spread,
    main_spread_error,
    relative_energy,
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
from pyro_apd.predictive.chain_draws import ChainDraws

#: Values by metric, by set, and resolutions by metric.
_Metrics = tuple[dict[str, dict[str, float]], dict[str, float]]
_OWN_SETS = ("chain", "generator", "stored")


def metric_rows(chain_draws: ChainDraws, sets: Mapping[str, Evaluation], split: Split) -> tuple[list[Row], float]:
    """All rows, function space first, and the share of predictive variance between half-chains.

    :param chain_draws: all draws of the chain, among which copies are searched for.
    :param sets: evaluations by ``chain``, ``generator``, ``stored`` and names of baselines.
    :param split: which draws these are of.
    """
    chain = sets["chain"]
    mixing = share_between_pieces(chain, split.chains, split.draws_each)
    values, resolution = _of_predictions(sets, split)
    for by_set, more in (_of_distances(sets, split), _of_copies(chain_draws, sets, split)):
        for name, further in by_set.items():
            values[name] |= further
        resolution |= more
    num_data = chain.mean().shape[0] if chain.kind != "weights" else 1
    rows = []
    for name, value in values["chain"].items():
        # Shares of data are never known better than to one datum.
        floor = 1 / num_data if not lookup(name).relative and chain.kind == "classes" else 0.0
        resolved = max(resolution[name], floor, 1e-6 * abs(value))
        of_generator = values["generator"].get(name, math.nan)
        of_stored = values["stored"].get(name, math.nan)
        others = {other: values[other].get(name, math.nan) for other in sets if other not in _OWN_SETS}
        status, verdict = judge(name, value, of_generator, resolved, mixing > POORLY_MIXED_SHARE)
        own = (value, of_generator, of_stored, resolved)
        rows.append(Row(name, lookup(name).label, _group(name), *own, status, verdict, others))
    return sorted(rows, key=lambda row: _order(row.group)), mixing


def _of_predictions(sets: Mapping[str, Evaluation], split: Split) -> _Metrics:
    """Metrics of predictions and of pairs of sets."""
    chain, generator = sets["chain"], sets["generator"]
    halves = balanced_halves(split.chains, split.draws_each)
    alike = balanced_halves(1, 2 * len(halves[0][0]))
    errors = resolved_errors(chain, split.chains, split.draws_each)
    generator_errors = standard_errors(generator, even_halves(generator.num_draws))
    values: dict[str, dict[str, float]] = {"stored": {}} | {name: s.metrics() for name, s in sets.items()}
    resolution = {n: STANDARD_ERRORS * math.hypot(errors[n], generator_errors[n]) for n in errors}
    own, own_sd = mean_similarities(chain, halves, chain, halves)
    other, other_sd = mean_similarities(chain, halves, generator, alike)
    values["chain"] |= own
    values["generator"] |= other
    resolution |= {name: STANDARD_ERRORS * math.hypot(own_sd[name], other_sd.get(name, 0.0)) for name in own}
    for name in set(sets) - {"chain", "generator"}:
        everything = list(range(sets[name].num_draws))
        values[name] |= mean_similarities(chain, halves, sets[name], [(everything, everything)] * len(halves))[0]
    return values, resolution


def _of_distances(sets: Mapping[str, Evaluation], split: Split) -> _Metrics:
    """Distances between draws as functions, within each set and from the chain's."""
    if sets["chain"].kind == "weights":
        return {}, {}
    points_TM = function_points(list(sets.values()))
    places = {}
    start = 0
    for name, evaluation in sets.items():
        places[name] = list(range(start, start + evaluation.num_draws))
        start += evaluation.num_draws
    chain = places["chain"]
    generator = places["generator"]
    even = even_halves(len(chain))
    slow = slow_halves(split.chains, split.draws_each)
    main_TM = main_coordinates(points_TM, [*chain, *generator])
    values = {
        name: {
            "disagreement": disagreement(points_TM, index),
            "spread": main_spread(main_TM, index),
            "energy": 0.0 if name == "chain" else relative_energy(points_TM, chain, index),
        }
        for name, index in places.items()
    }

    def errors(draws: list[int], ways: Sequence[Half]) -> dict[str, float]:
        return distance_errors(points_TM, draws, ways) | {"spread": main_spread_error(main_TM, draws, ways)}

    slowest = [errors(chain, ways) for ways in slow]
    own = {name: combined(error, [by_name[name] for by_name in slowest]) for name, error in errors(chain, even).items()}
    other = errors(generator, even)
    error = {
        "disagreement": math.hypot(own["disagreement"], other["disagreement"]),
        "spread": values["chain"]["spread"] * math.hypot(own["spread"], other["spread"]),
        # A squared distance of means: the noise of both sets adds up before it is squared.
        "energy": (own["energy"] + other["energy"]) / 2,
    }
    return values, {name: STANDARD_ERRORS * value for name, value in error.items()}


def _of_copies(chain_draws: ChainDraws, sets: Mapping[str, Evaluation], split: Split) -> _Metrics:
    """Shares of draws that are no copies. With none in the chain, a tenth of copies is never due to chance."""
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
