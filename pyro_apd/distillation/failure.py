# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Detects generators that collapsed or diverged. Such a generator is never returned without a warning."""

from __future__ import annotations

from collections.abc import Mapping

#: Spread of the generator's draws relative to the chain's: below it collapsed, above it diverged.
ACCEPTED_SPREAD = (0.5, 3.0)


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
