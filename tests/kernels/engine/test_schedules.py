# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pickle

import pytest

from pyro_apd.kernels.engine.schedules import Constant, Cyclical, PolynomialDecay, as_schedule


def test_polynomial_decay_by_hand():
    schedule = PolynomialDecay(a=0.5, b=4.0, gamma=0.5)
    assert schedule(0) == pytest.approx(0.25)
    assert schedule(12) == pytest.approx(0.125)


def test_cycles_start_at_the_largest_step_and_never_reach_zero():
    schedule = Cyclical(1e-3, cycle_length=100, floor=0.01)
    assert schedule(0) == schedule(100) == schedule(700) == 1e-3
    assert schedule(50) == pytest.approx(0.5e-3)
    assert min(schedule(step) for step in range(100)) == pytest.approx(1e-5)
    assert all(schedule(step) >= schedule(step + 1) for step in range(99))


@pytest.mark.parametrize("schedule", [Constant(0.1), PolynomialDecay(1.0), Cyclical(0.1, 10)])
def test_schedules_pickle(schedule):
    assert pickle.loads(pickle.dumps(schedule))(3) == schedule(3)


def test_as_schedule_takes_numbers_and_callables():
    assert as_schedule(0.2)(7) == 0.2

    def halving(step):
        return 0.5**step

    assert as_schedule(halving) is halving


@pytest.mark.parametrize("step_size", [0, -1e-3, float("nan"), float("inf"), "large", None, True])
def test_unusable_step_sizes(step_size):
    with pytest.raises(ValueError, match=r"step_size="):
        as_schedule(step_size)


@pytest.mark.parametrize(
    "build", [lambda: PolynomialDecay(-1.0), lambda: Cyclical(1.0, 0), lambda: Cyclical(1.0, 5, 0)]
)
def test_unusable_settings(build):
    with pytest.raises(ValueError, match="must be a positive finite number"):
        build()
