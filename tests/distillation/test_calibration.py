# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.distillation.calibration import calibrate
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
