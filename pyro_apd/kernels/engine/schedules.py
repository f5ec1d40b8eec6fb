# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Step sizes as functions of the Langevin step, counted from 0 and through warm-up.

A kernel takes any ``callable(step) -> float``; those here are the field's usual ones, as picklable objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyro_apd.runtime.checks import is_number, number

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same step size throughout: a chain with a small bias that keeps mixing.

    :param float step_size: the step size, positive.
    """

    step_size: float

    def __post_init__(self) -> None:
        _require_positive(step_size=self.step_size)

    def __call__(self, step: int) -> float:
        """The step size at ``step``."""
        return self.step_size


@dataclass(frozen=True)
class PolynomialDecay:
    """``a (b + step)^-gamma``, of Welling & Teh (2011), section 2: no bias in the limit where 1/2 < gamma <= 1.

    :param float a: scale, positive.
    :param float b: offset in steps, positive.
    :param float gamma: exponent, positive.
    """

    a: float
    b: float = 1.0
    gamma: float = 0.55

    def __post_init__(self) -> None:
        _require_positive(a=self.a, b=self.b, gamma=self.gamma)

    def __call__(self, step: int) -> float:
        """The step size at ``step``."""
        size: float = self.a * (self.b + step) ** -self.gamma
        return size


@dataclass(frozen=True)
class Cyclical:
    """Half-cosine cycles from ``step_size`` down towards 0, of Zhang et al. (ICLR 2020), equation 1.

    Large steps move between modes, small steps sample within one. The step size never falls below ``floor`` times
    the largest, so that no draw is a copy of the one before.

    :param float step_size: largest step size, at the start of a cycle.
    :param int cycle_length: Langevin steps per cycle.
    :param float floor: smallest step size, as a share of the largest.
    """

    step_size: float
    cycle_length: int
    floor: float = 1e-3

    def __post_init__(self) -> None:
        _require_positive(step_size=self.step_size, cycle_length=self.cycle_length, floor=self.floor)

    def __call__(self, step: int) -> float:
        """The step size at ``step``."""
        position = (step % self.cycle_length) / self.cycle_length
        return self.step_size * max(0.5 * (math.cos(math.pi * position) + 1.0), self.floor)


def as_schedule(step_size: float | str | Schedule) -> Schedule:
    """A schedule from what users pass as ``step_size``.

    :raises ValueError: if it is neither a positive finite number nor callable.
    """
    if callable(step_size):
        return step_size
    if not is_number(step_size):
        raise ValueError(
            f"step_size={step_size!r}: give a positive number, 'auto', or a callable from the Langevin step to a "
            "number, such as apd.schedules.PolynomialDecay."
        )
    return Constant(number("step_size", step_size, above=0))


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        number(name, value, above=0)
