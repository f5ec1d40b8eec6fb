# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Detects generators that collapsed or diverged. Such a generator is never returned without a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pyro_apd.distillation.calibration import Calibration

#: Spread of the generator's draws relative to the chain's: below it collapsed, above it diverged.
ACCEPTED_SPREAD = (0.5, 3.0)
#: Of a generator in fewer bytes than the default: distance to held-out draws in units of their spread, and disagreement
#: of its draws on the data relative to the chain's.
ACCEPTED_DISTANCE, ACCEPTED_EXCESS = 0.3, 1.25


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


def find_shortage(
    byte_budget: float | int, default_bytes: int, metrics: Mapping[str, float], calibration: Calibration | None
) -> str | None:
    """Why a budget is too small for a posterior; None if it is not.

    :param int default_bytes: what the default without a budget takes.
    :param dict metrics: as for :func:`find_failures`.
    :param calibration: of this generator, where functions are known and it was not trained afterwards.
    """
    found = []
    excess = 1.0 if calibration is None else math.exp(calibration.residuals.get("rows", 0.0))
    if excess > ACCEPTED_EXCESS:
        found.append(f"on the data, draws disagree {excess:.2f} times as much as the chain's")
    if metrics.get("distance", 0.0) > ACCEPTED_DISTANCE:
        found.append(f"the distance to held-out draws is {metrics['distance']:.2g} of their spread")
    if not found:
        return None
    return (
        f"byte_budget={byte_budget!r} is too small for this posterior: {', and '.join(found)}; the default, without a "
        f"budget, takes about {default_bytes:,} bytes"
    )
