# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.distillation import chosen_inputs, scaled_modes
from pyro_apd.distillation.calibration import calibrate
from pyro_apd.distillation.scaled_modes import _best_square
from pyro_apd.generators.subspace_fit import SubspaceFit, SubspaceSettings
from pyro_apd.generators.weight_matrices import WeightMatrix
from tests.support.function_spaces import linear_classifier, space


def generator_of_modes(draws, x, rank=40):
    """Without spread: each draw is a mode."""
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1)
    settings = SubspaceSettings(rank=rank, segment_length=1, is_dithered=True, has_null_noise=False)
    fit = SubspaceFit(draws, [WeightMatrix(0, 5, 8, 40)], [inputs.mT @ inputs / len(x)], settings)
    fit.read()
    generator = fit.generator()
    assert not generator.spread.any()
    return generator


@pytest.mark.parametrize("factor", [0.9, 0.95, 1.05])
def test_modes_that_were_divided_are_multiplied(factor):
    draws, x, functions = linear_classifier()
    generator = generator_of_modes(draws, x)
    modes = generator.modes.clone()
    with torch.no_grad():
        generator.modes.mul_(factor)
    found = calibrate(generator, functions, draws)
    assert found.spread == pytest.approx(1 / factor, rel=0.03)
    torch.testing.assert_close(generator.modes, factor * found.spread * modes)
    assert abs(found.residuals["rows"]) < 0.05


def test_every_draw_is_compared(monkeypatch):
    """A few draws of a chain have much of its disagreement, so that some in place of all give another factor."""
    counts = []

    def values_at(space, blocks, rows):
        blocks = list(blocks)
        counts.append(sum(map(len, blocks)))
        return chosen_inputs.values_at(space, blocks, rows)

    monkeypatch.setattr(scaled_modes, "values_at", values_at)
    draws, x, functions = linear_classifier()
    calibrate(generator_of_modes(draws, x), functions, draws, num_products=2_000_000)
    assert counts == [len(draws)] * 3  # the chain, and two factors


@pytest.mark.parametrize(("factor", "num_trials"), [(0.98, 2), (0.9, 3)])
def test_residuals_beyond_the_trials_are_tried(factor, num_trials, monkeypatch):
    draws, x, (of_draws, probes) = linear_classifier()
    generator = generator_of_modes(draws, x)
    with torch.no_grad():
        generator.modes.mul_(factor)
    tried, uncertainty = [], scaled_modes._uncertainty

    def noted(*args):
        tried.append(uncertainty(*args))
        return tried[-1]

    monkeypatch.setattr(scaled_modes, "_uncertainty", noted)
    found = calibrate(generator, (of_draws, probes), draws)
    assert len(tried) == 1 + num_trials  # the chain first
    if num_trials == 3:
        measured = float((tried[-1][0]["rows"] / tried[0][0]["rows"]).log())
        assert found.residuals["rows"] == pytest.approx(measured, abs=1e-6)


def test_random_numbers_are_those_of_the_global_generator():
    draws, x, functions = linear_classifier()
    generator, found = generator_of_modes(draws, x), []
    modes = generator.modes.clone()
    for _ in range(2):
        generator.modes.data.copy_(modes)
        torch.manual_seed(3)
        found.append(calibrate(generator, functions, draws))
    assert found[0] == found[1]


def errors(**values):
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}


def test_the_disagreement_alone_is_met_where_there_is_no_entropy():
    here, there = [errors(rows=-0.1)], [errors(rows=-0.02)]
    assert _best_square(here, there) == pytest.approx(1.1)


def test_the_factor_is_one_that_errors_of_entropy_allow():
    """Least squares of (-0.1 + t, -0.0 + 0.4 t), the second 2.5 times as important: t = 0.1 / 2."""
    here, there = [errors(rows=-0.1), errors(rows=0.0)], [errors(rows=-0.02), errors(rows=0.032)]
    assert _best_square(here, there) == pytest.approx(1.05)


def test_the_factor_stays_within_bounds():
    assert _best_square([errors(rows=-9.0)], [errors(rows=-8.9)]) == pytest.approx(1.3**2)
    assert _best_square([errors(rows=9.0)], [errors(rows=9.1)]) == pytest.approx(0.9**2)
    assert _best_square([errors(rows=-0.01)], [errors(rows=-0.01)]) == 1.0


def test_entropies_are_those_of_averaged_predictions():
    views = [torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).log(), torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])]
    expected = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    torch.testing.assert_close(space().entropies(views), expected.reshape(1, 1))
    assert space("gaussian").entropies(views[:1]) is None
