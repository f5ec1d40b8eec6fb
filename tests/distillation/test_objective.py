# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Distances with known values, and objectives that can be seen to work."""

import math

import pytest
import torch

from pyro_apd.distillation.objective import (
    AdversarialObjective,
    FunctionJudge,
    FunctionObjective,
    FunctionSpace,
    WeightJudge,
    energy_distance,
    nearest_neighbour_distance,
    pick,
    spread,
)
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators import draw_blocks
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.models.layout import Layout


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


def test_a_batch_has_every_chain_equally_often():
    draws = DrawBlocks(torch.arange(3.0).reshape(3, 1, 1).expand(3, 50, 2))
    counts = torch.bincount(pick(draws, 31)[:, 0].long())
    assert sorted(counts.tolist()) == [10, 10, 11]
    assert len({int(pick(draws, 1)[0, 0]) for _ in range(60)}) == 3


def test_nearest_neighbours_see_both_failures():
    real = torch.randn(300, 2)
    same = nearest_neighbour_distance(torch.randn(300, 2), real)
    assert nearest_neighbour_distance(3 * torch.randn(300, 2), real) > 1.5 * same
    assert nearest_neighbour_distance(0.05 * torch.randn(300, 2), real) > 1.5 * same


LAYOUT = Layout({"w": (3,)})


def logits_of(draws, x):
    """A function view of a one-parameter-a-class model: log-probabilities of logits x w."""
    return (x[:, None] * draws["w"][:, None, :]).log_softmax(-1)


def space(kind="categorical"):
    return FunctionSpace(logits_of, LAYOUT, kind)


def test_views_are_log_probabilities_and_probabilities():
    theta_SD, x = torch.randn(4, 3), torch.tensor([0.5, 2.0])
    log_probs, probs = space().views(theta_SD, (x,))
    assert log_probs.shape == (2, 4, 3)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4))
    assert len(space("normal").views(theta_SD, (x,))) == 1


def test_bernoulli_views_are_two_probabilities():
    view = FunctionSpace(lambda draws, x: draws["w"][:, None, :1] * x[:, None], LAYOUT, "bernoulli")
    _, probs = view.views(torch.randn(4, 3), (torch.tensor([1.0, 2.0]),))
    assert probs.shape == (2, 4, 2)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4))


def test_distance_does_not_depend_on_the_unit_of_the_function():
    views = [torch.randn(5, 40, 2)], [1.7 * torch.randn(5, 40, 2)]
    scaled = [100 * views[0][0]], [100 * views[1][0]]
    torch.testing.assert_close(space().distance(*views), space().distance(*scaled), rtol=1e-3, atol=1e-4)


def learn(objective, steps=300):
    """Fits mean and sd of a Gaussian generator."""
    location, log_scale = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.Adam([location, log_scale], lr=0.03)
    for _ in range(steps):
        optimiser.zero_grad()
        objective.backward(lambda count: location + log_scale.exp() * torch.randn(count, 3))
        optimiser.step()
    return location.detach(), log_scale.exp().detach()


@pytest.mark.slow
def test_function_objective_finds_location_and_spread():
    theta_SD = torch.tensor([1.0, -1.0, 0.0]) + 0.4 * torch.randn(2000, 3)
    objective = FunctionObjective(space(), Probes([torch.linspace(-2, 2, 50)]), theta_SD)
    location, scale = learn(objective)
    # A constant added to all logits changes no probability, and so is not to be found.
    assert (location - location.mean() - torch.tensor([1.0, -1.0, 0.0])).abs().max() < 0.15
    assert scale.square().mean().sqrt().item() == pytest.approx(0.4, rel=0.25)


@pytest.mark.slow
def test_adversarial_objective_finds_location():
    theta_SD = torch.tensor([1.0, -1.0, 0.0]) + 0.4 * torch.randn(500, 3)
    location, _ = learn(AdversarialObjective(lambda theta: theta, theta_SD, 1e-3, batch_size=64), steps=200)
    assert (location - torch.tensor([1.0, -1.0, 0.0])).abs().max() < 0.35


def test_function_judge_prefers_the_right_spread():
    real, probes = torch.randn(100, 3), Probes([torch.linspace(-2, 2, 50)])
    judge = FunctionJudge(space(), probes, real)
    narrow, right, wide = (judge.figures(scale * torch.randn(100, 3)) for scale in (0.2, 1.0, 4.0))
    assert right["distance"] < min(narrow["distance"], wide["distance"])
    assert narrow["mi_ratio"] < 0.2 < 0.8 < right["mi_ratio"] < 1.25 < 1.5 < wide["mi_ratio"]
    assert narrow["spread_ratio"] < 0.5 < right["spread_ratio"]


def test_judge_reports_numbers_that_are_not_finite():
    judge = FunctionJudge(space(), Probes([torch.linspace(-2, 2, 50)]), torch.randn(50, 3))
    assert math.isnan(judge.figures(torch.full((20, 3), torch.nan))["distance"])


def test_weight_judge_prefers_the_right_spread():
    judge = WeightJudge(lambda theta: theta, torch.randn(200, 3))
    narrow, right = (judge.figures(scale * torch.randn(200, 3)) for scale in (0.1, 1.0))
    assert right["distance"] < narrow["distance"]
    assert narrow["spread_ratio"] == pytest.approx(0.1, rel=0.2)


def test_a_batch_made_in_parts_has_the_gradient_of_the_same_draws_made_at_once(monkeypatch):
    theta_SD = torch.randn(200, 3)
    weight = torch.nn.Parameter(torch.eye(3))

    def gradient(draw_bytes):
        monkeypatch.setattr(draw_blocks, "_DRAWS_BYTES", draw_bytes)
        counts = []

        def generate(count):
            counts.append(count)
            # Draws that do not depend on how they are made: the whole batch, or the part that is next.
            start = sum(counts[:-1]) % 64
            return fixed_SD[start : start + count] @ weight

        fixed_SD = torch.linspace(-1, 1, 192).reshape(64, 3)
        weight.grad = None
        torch.manual_seed(0)
        objective = FunctionObjective(space(), Probes([torch.linspace(-2, 2, 50)], as_they_are=True), theta_SD)
        torch.manual_seed(1)
        loss = objective.backward(generate)
        assert not loss.requires_grad
        return loss, weight.grad.clone(), counts

    whole, parts = gradient(2**20), gradient(12 * 20)
    assert whole[2] == [64]
    assert parts[2] == [20, 20, 20, 4] * 2  # once for the values, once for the gradient
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])


def test_a_part_that_is_made_again_is_made_of_the_same_random_numbers(monkeypatch):
    monkeypatch.setattr(draw_blocks, "_DRAWS_BYTES", 12 * 20)
    scale, made = torch.nn.Parameter(torch.ones(3)), []

    def generate(count):
        made.append(torch.randn(count, 3))
        return made[-1] * scale

    FunctionObjective(space(), Probes([torch.linspace(-2, 2, 50)]), torch.randn(200, 3)).backward(generate)
    first, again = made[:4], made[4:]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert len(torch.cat(first).unique(dim=0)) == 64  # and each part of its own
