# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Detects generators that collapsed or diverged. Such a generator is never returned without a warning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyro_apd.distillation.calibration import Calibration

#: Spread of the generator's draws relative to the chain's: below it collapsed, above it diverged.
ACCEPTED_SPREAD = (0.5, 3.0)
#: Of a generator in fewer bytes than the default: distance to held-out draws in units of their spread, and disagreement
#: of its draws on the data relative to the chain's.
ACCEPTED_DISTANCE, ACCEPTED_EXCESS = 0.1, 1.25
#: Disagreement of the default's draws on the data relative to the chain's, or its inverse.
ACCEPTED_DISAGREEMENT = 1.35
# The default is better than a smaller generator if one of its metrics is this share of that one's, or less.
_BETTER = 0.9


class DistillationWarning(UserWarning):
    """The generator is returned, but its metrics are bad, or its training was cut short."""


class DistillationError(ArithmeticError):
    """Raised with ``strict=True`` where :class:`DistillationWarning` would be issued otherwise."""


def find_failures(metrics: Mapping[str, float]) -> list[str]:
    """What is wrong with a generator by its metrics on held-out draws; empty if nothing is.

    :param dict metrics: ``spread_ratio`` and, for classification, ``mi_ratio``: generator over chain.
    """
    smallest, largest = ACCEPTED_SPREAD
    names = {"spread_ratio": "spread between draws", "mi_ratio": "mutual information"}
    failures = []
    for name in names.keys() & metrics.keys():
        ratio = metrics[name]
        if smallest <= ratio <= largest:
            continue
        what = "collapsed" if ratio < smallest else "diverged"
        failures.append(
            f"the generator {what}: its {names[name]} is {ratio:.2f} times that of held-out draws of the chain, "
            f"where {smallest:g} to {largest:g} is accepted"
        )
    return sorted(failures)


def find_disagreement(calibration: Calibration | None) -> str | None:
    """How wrong the disagreement of draws on the data is after calibration; None if it is accepted."""
    ratio = _excess(calibration)
    if 1 / ACCEPTED_DISAGREEMENT <= ratio <= ACCEPTED_DISAGREEMENT:
        return None
    return (
        f"on the data, draws disagree {ratio:.2f} times as much as the chain's, where {1 / ACCEPTED_DISAGREEMENT:.2f} "
        f"to {ACCEPTED_DISAGREEMENT:.2f} is accepted"
    )


@dataclass(frozen=True)
class Quality:
    """Of a generator that was not trained.

    :ivar metrics: as for :func:`find_failures`.
    :ivar calibration: None where functions are not known, or it no longer holds since the generator was trained.
    """

    metrics: Mapping[str, float]
    calibration: Calibration | None


@dataclass(frozen=True)
class Shortage:
    """A budget is too small for a posterior.

    :ivar str reason: in words.
    :ivar str advice: what helps.
    """

    reason: str
    advice: str


def find_shortage(
    byte_budget: float | int, default_bytes: int, networks: float, own: Quality, default: Callable[[], Quality]
) -> Shortage | None:
    """Why a budget is too small for a posterior; None if it is not.

    :param int default_bytes: what the default without a budget takes.
    :param float networks: the same in networks.
    :param Quality own: of the generator with this budget.
    :param callable default: returns that of the default, and is called only if this one is bad: where draws are too
        few, more bytes do not help.
    """
    found = []
    if _excess(own.calibration) > ACCEPTED_EXCESS:
        found.append(f"on the data, draws disagree {_excess(own.calibration):.2f} times as much as the chain's")
    if own.metrics.get("distance", 0.0) > ACCEPTED_DISTANCE:
        found.append(f"the distance to held-out draws is {own.metrics['distance']:.2g} of their spread")
    if not found:
        return None
    what = f"{', and '.join(found)}; the default, without a budget, takes about {default_bytes:,} bytes "
    what += f"({networks:.3g} networks)"
    if _is_better(default(), own):
        return Shortage(f"byte_budget={byte_budget!r} is too small for this posterior: {what}", "more bytes")
    return Shortage(f"there are too few draws for this posterior: {what}, and is no better", "more draws")


def _is_better(default: Quality, own: Quality) -> bool:
    pairs = []
    if _excess(own.calibration) > ACCEPTED_EXCESS:
        pairs.append((_excess(default.calibration), _excess(own.calibration)))
    if own.metrics.get("distance", 0.0) > ACCEPTED_DISTANCE:
        pairs.append((default.metrics.get("distance", math.inf), own.metrics["distance"]))
    return any(ours <= _BETTER * theirs for ours, theirs in pairs)


def _excess(calibration: Calibration | None) -> float:
    """Disagreement of draws on the data relative to the chain's; one where it is not known."""
    return 1.0 if calibration is None else calibration.ratio
