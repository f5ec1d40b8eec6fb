# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_apd.distillation import calibration
from pyro_apd.distillation.calibration import _best_of_spread, _moved, _Tried, calibrate
from pyro_apd.generators.subspace_fit import SubspaceFit, SubspaceSettings
from pyro_apd.generators.weight_matrices import WeightMatrix
from tests.support.function_spaces import linear_classifier


@pytest.fixture
def case():
    """Draws of a linear classifier, how they are compared, and a generator of them with too much noise."""
    draws, x, functions = linear_classifier()
    moment = torch.cat([x, torch.ones(60, 1)], 1).mT @ torch.cat([x, torch.ones(60, 1)], 1) / 60
    fit = SubspaceFit(draws, [WeightMatrix(0, 5, 8, 40)], [moment], SubspaceSettings(rank=20))
    fit.read()
    generator = fit.generator()
    with torch.no_grad():
        for part in generator.parts:
            part.noise_columns.mul_(20)
    return generator, functions, draws


def ratios(generator, functions, draws):
    space, probes = functions
    inputs = probes.groups(200)["rows"]
    with torch.no_grad():
        own = space.disagreements(space.views(generator(generator.latents(200, generator.step)), inputs))
        chain = space.disagreements(space.views(torch.cat(list(draws.rows())), inputs))
    return float(own.mean() / chain.mean())


def test_draws_disagree_as_much_as_those_of_the_chain(case):
    before = ratios(*case)
    found = calibrate(*case)
    after = ratios(*case)
    assert before > 2
    assert 0.8 < after < 1.25
    assert set(found.residuals) == {"rows", "near", "far"}
    assert max(map(abs, found.residuals.values())) < 0.25


def test_what_is_found_is_set_and_can_be_written(case):
    generator, functions, draws = case
    spread = generator.spread.clone()
    found = calibrate(generator, functions, draws)
    torch.testing.assert_close(generator.spread, spread * found.spread)
    assert generator.noise_cap.item() == pytest.approx(found.noise_cap)
    assert found.to_json()["noise_cap"] == pytest.approx(found.noise_cap, rel=1e-3)


def test_noise_alone_is_capped_where_small_networks_have_each_draw_as_a_mode():
    """Then a factor of the modes would be found for what the noise does."""
    draws, x, functions = linear_classifier()
    inputs = torch.cat([x, torch.ones(60, 1)], 1)
    settings = SubspaceSettings(rank=20, segment_length=1)
    fit = SubspaceFit(draws, [WeightMatrix(0, 5, 8, 40)], [inputs.mT @ inputs / 60], settings)
    fit.read()
    generator = fit.generator()
    modes = generator.modes.clone()
    with torch.no_grad():
        for part in generator.parts:
            part.noise_columns.mul_(20)
    before = ratios(generator, functions, draws)
    calibrate(generator, functions, draws, scales_modes=False)
    torch.testing.assert_close(generator.modes, modes)
    assert before > 2
    assert 0.7 < ratios(generator, functions, draws) < 1.3


def test_random_numbers_are_those_of_the_global_generator(case):
    generator, functions, draws = case
    spread = generator.spread.clone()
    found = []
    for _ in range(2):
        generator.spread.data.copy_(spread)
        torch.manual_seed(3)
        found.append(calibrate(generator, functions, draws))
    assert found[0] == found[1]


def searched(by_square, by_cap, at_zero):
    """The best point where disagreements are linear in the square of the factor and the cap, as they nearly are."""
    points = []

    def search(count):
        found = []

        def residuals(square, log_cap):
            ratio_G = torch.tensor(at_zero).double() + square * torch.tensor(by_square) + math.exp(log_cap) * by_cap
            residual_G = ratio_G.log()
            found.append(_Tried(float(residual_G.square().sum()), square, log_cap, {}, residual_G))
            points.append((square, log_cap))
            return residual_G

        return residuals, found

    by_cap = torch.tensor(by_cap).double()
    return _best_of_spread(search, 100, 0.0, 1000), points


@pytest.mark.parametrize("cap", [0.15, 0.6, 2.0])
@pytest.mark.parametrize("square", [0.1, 0.5, 1.0])
def test_spread_and_cap_are_found_where_they_are_determined(square, cap):
    by_square, by_cap = [0.4, 0.15], [0.2, 0.3]
    at_zero = [1 - square * a - cap * b for a, b in zip(by_square, by_cap, strict=True)]
    best, _ = searched(by_square, by_cap, at_zero)
    assert best.loss < 1e-3
    assert best.square == pytest.approx(square, abs=0.1)


@pytest.mark.parametrize("excess", [0.05, 0.3])
def test_the_cap_is_found_where_no_spread_is_small_enough(excess):
    """With the least spread, the cap alone is free, and its best is where the sum of squares is least."""
    best, points = searched([0.3, 0.1], [0.5, 0.2], [1 - 0.2 + excess, 1 - 0.2])
    assert best.square == 0.0
    finer = [searched_at([0.5, 0.2], [1 - 0.2 + excess, 1 - 0.2], 0.01 * i) for i in range(1, 200)]
    assert best.loss < min(finer) + 2e-3
    assert all(0 <= square <= 1.1**2 for square, _ in points)


def test_spread_and_cap_that_change_functions_alike_are_both_lowered():
    """A step of Gauss-Newton would go far, the one up and the other down."""
    best, _ = searched([0.6, 0.31], [0.4, 0.21], [0.9, 0.9])
    assert best.loss < 0.05
    assert best.square < 0.15


def test_a_step_is_damped_where_it_is_worse(monkeypatch):
    dampings = []

    def moved(here, slope, damping):
        dampings.append(damping)
        return (0.9, 1.0) if damping < 0.5 else (0.3, -1.0)  # far off, and the best

    monkeypatch.setattr(calibration, "_moved", moved)
    best, _ = searched([0.5, 0.2], [0.3, 0.4], [1 - 0.15 - 0.3 / math.e, 1 - 0.06 - 0.4 / math.e])
    assert best.point == (0.3, -1.0)
    assert dampings[0] < 0.5 <= dampings[1]


@pytest.mark.parametrize(("square", "bound"), [(0.0, 0.0), (1.2, 1.1**2)])
def test_at_a_bound_the_best_cap_is_that_of_the_cap_alone(square, bound):
    """Residuals (a, b), slopes (1, 0), (0.5, 1): where the square moves by m, the cap does by -(a + 2 b + m) / 2.5."""
    sign = -1.0 if square == 0 else 1.0
    residual_R = torch.tensor([-sign, 0.2 * sign], dtype=torch.float64)
    slope_R2 = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    found_square, log_cap = _moved(_Tried(1.0, square, 0.0, {}, residual_R), slope_R2, 0.0)
    assert found_square == pytest.approx(bound)
    moved = -(0.5 * (-sign + bound - square) + 0.2 * sign) / 1.25
    assert log_cap == pytest.approx(math.log1p(moved), rel=1e-3)


def searched_at(by_cap, at_zero, cap):
    return sum(math.log(zero + cap * slope) ** 2 for zero, slope in zip(at_zero, by_cap, strict=True))
