# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_apd.diagnostics.comparison.distances import (
    disagreement,
    distance_errors,
    function_points,
    main_coordinates,
    main_spread,
    main_spread_error,
    relative_energy,
)
from pyro_apd.diagnostics.comparison.evaluation import Evaluation
from pyro_apd.diagnostics.comparison.standard_errors import even_halves


def classes(probs_SNK):
    return Evaluation(torch.zeros(len(probs_SNK), 1), "classes", {"": probs_SNK})


def numbers(mean_SN, variance):
    return Evaluation(mean_SN, "numbers", {"": torch.stack([mean_SN, torch.full_like(mean_SN, variance)])})


def between(*sets):
    points_TM = function_points(list(sets))
    return torch.cdist(points_TM, points_TM)


def test_distance_of_classes_is_hellingers():
    probs = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    # The first datum as far as can be, the second not at all.
    torch.testing.assert_close(between(classes(probs[:1]), classes(probs[1:]))[0, 1].square().item(), 0.5)


def test_distance_of_numbers_is_in_predictive_sds():
    first = numbers(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), 3.0)  # sds: 2 and the root of 3
    distance = between(first, numbers(torch.tensor([[0.0, 3.0]]), 9.0))
    assert distance[0, 1].item() == pytest.approx(math.sqrt(1 / 2))
    assert distance[0, 2].item() == pytest.approx(math.sqrt(9 / 3 / 2))


def test_points_keep_all_distances_in_parts_of_the_data_too(monkeypatch):
    mean_SN = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).double()
    scale_N = numbers(mean_SN, 1.0).scores()["sd"]
    expected = torch.cdist(mean_SN / scale_N, mean_SN / scale_N) / math.sqrt(40)
    torch.testing.assert_close(between(numbers(mean_SN, 1.0)), expected, atol=1e-7, rtol=0)
    monkeypatch.setattr("pyro_apd.diagnostics.comparison.distances._CHUNK_ENTRIES", 100)
    torch.testing.assert_close(between(numbers(mean_SN, 1.0)), expected, atol=1e-7, rtol=0)


def test_equal_draws_have_no_distance():
    probs = torch.rand(1, 500, 10).softmax(-1)
    jitter = probs.expand(8, -1, -1) * (1 + 1e-7 * torch.randn(8, 500, 10))
    points = function_points([classes(jitter)])
    assert disagreement(points, range(8)) == 0.0
    assert math.isnan(relative_energy(points, [0, 1, 2], [3, 4]))
    assert main_coordinates(points, range(8)).shape == (8, 0)


def test_metrics_by_hand():
    points = torch.tensor([[0.0], [1.0], [3.0], [10.0]]).double()
    assert disagreement(points, [0, 1, 2]) == pytest.approx(2.0)
    assert math.isnan(disagreement(points, [0]))
    across = (3 + 10 + 2 + 9) / 4
    assert relative_energy(points, [0, 1], [2, 3]) == pytest.approx((2 * across - 1 - 7) / 1)
    assert math.isnan(relative_energy(points, [0, 0], [2, 3]))
    assert math.isnan(relative_energy(points, [0, 1], [2]))


def test_energy_is_about_zero_for_one_distribution_and_not_for_two():
    g = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(60):
        points = function_points([numbers(torch.randn(80, 5, generator=g), 1.0)])
        found.append(relative_energy(points, range(40), range(40, 80)))
        errors.append(distance_errors(points, range(80), even_halves(80))["energy"])
    assert abs(sum(found) / 60) < 0.01
    # What halves of forty say of forty against forty: half of what they show.
    spread = (sum(value**2 for value in found) / 60) ** 0.5
    assert sum(errors) / 60 == pytest.approx(spread / 2, rel=0.3)
    shifted = torch.cat([torch.randn(40, 5, generator=g), torch.randn(40, 5, generator=g) + 1])
    points = function_points([numbers(shifted, 1.0)])
    assert relative_energy(points, range(40), range(40, 80)) > 5 * spread


def test_main_coordinates_keep_distances_of_the_pool_and_place_others():
    points = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points[:, 2] *= 0.01  # less than 5 % of the variance
    found = main_coordinates(points, range(20))
    assert found.shape == (30, 2)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(points, points), atol=0.05, rtol=0)
    torch.testing.assert_close(found[:20].mean(0), torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert main_coordinates(torch.zeros(30, 3).double(), range(30)).shape == (30, 0)


def test_spread_is_a_geometric_mean_and_its_error_one_of_logarithms():
    coordinates = torch.tensor([[0.0, 0.0], [2.0, 8.0]]).double()
    assert main_spread(coordinates, [0, 1]) == pytest.approx(math.sqrt(2 / 2**0.5 * 8 / 2**0.5))
    assert math.isnan(main_spread(coordinates, [0]))
    assert math.isnan(main_spread(coordinates[:, :0], [0, 1]))
    assert main_spread(torch.zeros(5, 3).double(), range(5)) < 1e-300
    g = torch.Generator().manual_seed(0)
    errors, logs = [], []
    for _ in range(100):
        draws = torch.randn(64, 4, generator=g, dtype=torch.float64)
        logs.append(math.log(main_spread(draws, range(64))))
        errors.append(main_spread_error(draws, range(64), even_halves(64)) ** 2)
    variance = sum((value - sum(logs) / 100) ** 2 for value in logs) / 99
    assert sum(errors) / 100 == pytest.approx(variance, rel=0.4)
    assert main_spread_error(torch.zeros(64, 3).double(), range(64), even_halves(64)) == 0.0
