# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Objectives that can be seen to work."""

import pytest
import torch

from pyro_apd.distillation.objective import AdversarialObjective, FunctionObjective, pick
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators import draw_blocks
from pyro_apd.generators.draw_blocks import DrawBlocks
from tests.support.function_spaces import space


def test_a_batch_has_every_chain_equally_often():
    draws = DrawBlocks(torch.arange(3.0).reshape(3, 1, 1).expand(3, 50, 2))
    counts = torch.bincount(pick(draws, 31)[:, 0].long())
    assert sorted(counts.tolist()) == [10, 10, 11]
    assert len({int(pick(draws, 1)[0, 0]) for _ in range(60)}) == 3


def learn(objective, steps=300):
    """Fits mean and sd of a Gaussian generator."""
    location, log_scale = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.Adam([location, log_scale], lr=0.03)
    for _ in range(steps):
        optimiser.zero_grad()
        objective.backward(lambda count: location + log_scale.exp() * torch.randn(count, 3))
        optimiser.step()
    return location.detach(), log_scale.exp().detach()


@pytest.mark.thorough
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

        # Without equal distances, where the gradient of the energy distance jumps.
        fixed_SD = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
        weight.grad = None
        torch.manual_seed(0)
        objective = FunctionObjective(space(), Probes([torch.linspace(-2, 2, 50)], unchanged=True), theta_SD)
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
