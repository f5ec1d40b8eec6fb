# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Distances with known values."""

import math

import pytest
import torch

from pyro_apd.distillation.distances import energy_distance, nearest_neighbour_distance, spread


def test_spread_leaves_out_pairs_of_a_draw_with_itself():
    values_PSF = torch.tensor([[[0.0], [1.0], [3.0]], [[2.0], [2.0], [2.0]]])
    torch.testing.assert_close(spread(values_PSF), torch.tensor([2.0, 0.0]))


def test_energy_distance_by_hand():
    fake, real = torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[1.0], [5.0]]])
    # 2 x mean(1, 5, 1, 3) - 2 - 4
    assert energy_distance(fake, real).item() == pytest.approx(-1.0)


def test_energy_distance_of_two_gaussians():
    """For unit Gaussians a distance m apart: 2 E|m + sqrt(2) z| - 2 E|sqrt(2) z|."""
    m = 1.5
    fake = torch.randn(1, 4000, 1, dtype=torch.float64)
    real = torch.randn(1, 4000, 1, dtype=torch.float64) + m
    folded = 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = 2 * folded - 4 / math.sqrt(math.pi)
    assert energy_distance(fake, real).item() == pytest.approx(expected, rel=0.1)


def test_energy_distance_is_zero_on_average_where_the_distributions_agree():
    """Without bias, however few the draws."""
    found = energy_distance(torch.randn(4000, 5, 3), torch.randn(4000, 5, 3))
    assert found.mean().item() == pytest.approx(0.0, abs=4 * float(found.std()) / 4000**0.5)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_energy_distance_sees_a_spread_that_is_off(scale):
    assert energy_distance(scale * torch.randn(1, 500, 3), torch.randn(1, 500, 3)).item() > 0.05


def test_energy_distance_keeps_its_digits_far_from_zero():
    fake, real = torch.randn(1, 200, 2), torch.randn(1, 200, 2)
    near, far = energy_distance(fake, real), energy_distance(fake + 1e4, real + 1e4)
    torch.testing.assert_close(near, far, atol=5e-3, rtol=0)


def reference(fake, real):
    """By torch.cdist."""

    def mean_spread(values):
        return torch.cdist(values, values).sum((1, 2)) / (values.shape[1] * (values.shape[1] - 1))

    return 2 * torch.cdist(fake, real).mean((1, 2)) - mean_spread(fake) - mean_spread(real)


def test_energy_distance_and_its_gradient_by_another_way():
    fake = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    real = torch.randn(3, 9, 4, dtype=torch.float64) + 1
    torch.testing.assert_close(energy_distance(fake, real), reference(fake, real))
    ours, theirs = (torch.autograd.grad(f(fake, real).sum(), fake)[0] for f in (energy_distance, reference))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda x: energy_distance(x, real), (fake,))


def test_draws_that_coincide_have_a_distance_and_a_gradient_of_zero():
    fake = torch.ones(2, 5, 3, requires_grad=True)
    found = energy_distance(fake, torch.ones(2, 6, 3))
    found.sum().backward()
    assert not found.any()
    assert not fake.grad.any()


def test_nearest_neighbours_see_both_failures():
    real = torch.randn(300, 2)
    same = nearest_neighbour_distance(torch.randn(300, 2), real)
    assert nearest_neighbour_distance(3 * torch.randn(300, 2), real) > 1.5 * same
    assert nearest_neighbour_distance(0.05 * torch.randn(300, 2), real) > 1.5 * same
