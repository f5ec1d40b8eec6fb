# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A generator that did not come out well is never returned silently."""

from __future__ import annotations

from collections.abc import Mapping

#: Spread of the generator's draws over the chain's, below which it has collapsed and above which it has blown up.
ACCEPTED_SPREAD = (0.5, 3.0)


class DistillationWarning(UserWarning):
    """The generator was returned, but its figures are bad, or training was cut short."""


class DistillationError(ArithmeticError):
    """What :class:`DistillationWarning` says, raised because of ``strict=True``."""


def find_failures(figures: Mapping[str, float]) -> list[str]:
    """What is wrong with a generator by its figures on held-out draws; empty where nothing is.

    :param dict figures: ``spread_ratio`` and, for classification, ``mi_ratio``: generator over chain.
    """
    smallest, largest = ACCEPTED_SPREAD
    names = {"spread_ratio": "spread between draws", "mi_ratio": "mutual information"}
    failures = []
    for name in names.keys() & figures.keys():
        ratio = figures[name]
        if smallest <= ratio <= largest:
            continue
        what = "collapsed" if ratio < smallest else "blew up"
        failures.append(
            f"the generator {what}: its {names[name]} is {ratio:.2f} times that of held-out draws of the chain, "
            f"where {smallest:g} to {largest:g} is accepted"
        )
    return sorted(failures)
