# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The critic's loss, where it can be written down."""

import pytest
import torch
from torch import nn

from pyro_apd.distillation.critic import GAN_LOSSES, build_critic, critic_loss, gradient_penalty


def linear(slope):
    critic = nn.Linear(len(slope), 1, bias=False)
    critic.weight.data = torch.tensor([slope])
    return critic


@pytest.mark.parametrize(("slope", "penalty"), [([3.0, 4.0], 16.0), ([0.6, 0.8], 0.0), ([0.0, 0.0], 1.0)])
def test_penalty_of_a_linear_critic(slope, penalty):
    found = gradient_penalty(linear(slope), torch.randn(7, 2), torch.randn(7, 2))
    assert found.item() == pytest.approx(penalty, abs=1e-5)


def test_loss_of_a_linear_critic():
    real, fake = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    # scores: real 3 and 9, fake 4 and 8; penalty (5 - 1)^2
    assert critic_loss(linear([3.0, 4.0]), real, fake, 0.5).item() == pytest.approx(6.0 - 6.0 + 0.5 * 16.0)


def test_penalty_is_taken_between_the_samples():
    """A critic that is steep nowhere but between the two."""

    def critic(x):
        return 10 * torch.relu(x - 0.4) - 10 * torch.relu(x - 0.6)

    outside = gradient_penalty(critic, torch.full((50, 1), 2.0), torch.full((50, 1), 3.0))
    across = gradient_penalty(critic, torch.zeros(500, 1), torch.ones(500, 1))
    assert outside.item() == pytest.approx(1.0)
    assert across.item() == pytest.approx(0.8 * 1 + 0.2 * 81, rel=0.2)


def test_penalty_trains_the_critic_also_where_it_is_flat():
    critic = linear([0.0, 0.0])
    gradient_penalty(critic, torch.randn(5, 2), torch.randn(5, 2)).backward()
    assert torch.isfinite(critic.weight.grad).all()


def test_critic_scores_vectors():
    assert build_critic(6, width=3)(torch.randn(4, 6)).shape == (4, 1)


# For scores 2 of what is real and -1 of what is not; softplus(-2) + softplus(-1), softplus(1).
@pytest.mark.parametrize(
    ("name", "of_critic", "of_generator"),
    [("wgan", -3.0, 1.0), ("lsgan", 0.5 + 0.5, 2.0), ("non-saturating", 0.126928 + 0.313262, 1.313262)],
)
def test_gan_losses_by_hand(name, of_critic, of_generator):
    gan_loss, real, fake = GAN_LOSSES[name], torch.full((5, 1), 2.0), torch.full((7, 1), -1.0)
    assert gan_loss.of_critic(lambda values: values, real, fake).item() == pytest.approx(of_critic, abs=1e-5)
    assert gan_loss.of_generator(fake).item() == pytest.approx(of_generator, abs=1e-5)


@pytest.mark.parametrize("name", sorted(GAN_LOSSES))
def test_only_wgan_bounds_its_weights(name):
    critic = linear([3.0, -4.0])
    GAN_LOSSES[name].constrain(critic)
    expected = [0.01, -0.01] if name == "wgan" else [3.0, -4.0]
    assert critic.weight.flatten().tolist() == pytest.approx(expected)
    optimiser = GAN_LOSSES[name].optimiser(critic.parameters(), 1e-3)
    assert optimiser.param_groups[0]["lr"] == (5e-5 if name == "wgan" else 1e-3)
