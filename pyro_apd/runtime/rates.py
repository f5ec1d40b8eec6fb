# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How a learning rate changes over the steps of an optimisation."""

from __future__ import annotations

import math

# Share of the steps over which the rate rises.
_RISING = 0.05


def share_of_rate(progress: float) -> float:
    """Share of the highest learning rate at a ``progress`` from 0 to 1: a linear rise, then half a cosine to zero."""
    if progress < _RISING:
        return progress / _RISING
    return 0.5 * (1 + math.cos(math.pi * (progress - _RISING) / (1 - _RISING)))
