# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Learned critics (discriminators), and the GAN losses that generators are trained by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_apd.generators.paper import he_perceptron

Critic = Callable[[Tensor], Tensor]


def build_critic(size: int, width: int = 100) -> nn.Sequential:
    """A perceptron from vectors ``(S, size)`` to scores ``(S, 1)``, with the paper's three hidden layers."""
    return he_perceptron([size, width, width, width, 1])


def gradient_penalty(critic: Critic, real_SD: Tensor, fake_SD: Tensor) -> Tensor:
    """E[(|grad critic| - 1)^2] at uniform points between real and fake (Gulrajani et al., NeurIPS 2017, equation 3).

    :param callable critic: from ``(S, D)`` to ``(S, 1)``.
    :param Tensor real_SD: draws of the chain.
    :param Tensor fake_SD: draws of the generator.
    """
    between_SD = torch.lerp(real_SD, fake_SD, torch.rand_like(real_SD[:, :1])).requires_grad_()
    (slope_SD,) = torch.autograd.grad(critic(between_SD).sum(), between_SD, create_graph=True)
    # sqrt has no derivative at zero, where a dead critic sits.
    norm_S = (slope_SD.square().sum(-1) + torch.finfo(slope_SD.dtype).tiny).sqrt()
    return (norm_S - 1).square().mean()


def critic_loss(critic: Critic, real_SD: Tensor, fake_SD: Tensor, penalty_weight: float = 10.0) -> Tensor:
    """Loss of WGAN-GP's critic: E[critic(fake)] - E[critic(real)] + weight x penalty."""
    penalty = gradient_penalty(critic, real_SD, fake_SD)
    return critic(fake_SD).mean() - critic(real_SD).mean() + penalty_weight * penalty


@dataclass(frozen=True)
class GANLoss:
    """Losses of critic and generator.

    :ivar of_critic: from the critic, real draws ``(S, D)`` and fake draws ``(S, D)`` to the critic's loss.
    :ivar of_generator: from the critic's scores ``(S, 1)`` of fake draws to the generator's loss.
    :ivar float clip: bound on the critic's weights, or None.
    :ivar float learning_rate: of both, as published; None leaves it to the caller.
    :ivar int critic_steps: steps of the critic per step of the generator.
    """

    of_critic: Callable[[Critic, Tensor, Tensor], Tensor]
    of_generator: Callable[[Tensor], Tensor]
    clip: float | None = None
    learning_rate: float | None = None
    critic_steps: int = 5

    def optimiser(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """RMSprop where weights are clipped, as published; Adam otherwise."""
        rate = self.learning_rate or learning_rate
        if self.clip is not None:
            return torch.optim.RMSprop(parameters, lr=rate)
        return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.9))

    @torch.no_grad()
    def constrain(self, critic: nn.Module) -> None:
        """Clips the critic's weights after one of its steps, where the loss asks for it."""
        if self.clip is not None:
            for parameter in critic.parameters():
                parameter.clamp_(-self.clip, self.clip)


def _mean_of_generator(score_S1: Tensor) -> Tensor:
    return -score_S1.mean()


#: GAN losses by the name that ``distill(objective=...)`` takes: Gulrajani et al. 2017 (the paper's choice); Arjovsky et
#: al. 2017; Mao et al. 2017; Goodfellow et al. 2014, with the non-saturating loss of the generator.
GAN_LOSSES = {
    "wgan-gp": GANLoss(critic_loss, _mean_of_generator),
    "wgan": GANLoss(
        lambda critic, real, fake: critic(fake).mean() - critic(real).mean(),
        _mean_of_generator,
        clip=0.01,
        learning_rate=5e-5,
    ),
    "lsgan": GANLoss(
        lambda critic, real, fake: 0.5 * (critic(real) - 1).square().mean() + 0.5 * critic(fake).square().mean(),
        lambda score: 0.5 * (score - 1).square().mean(),
        critic_steps=1,
    ),
    "non-saturating": GANLoss(
        lambda critic, real, fake: softplus(-critic(real)).mean() + softplus(critic(fake)).mean(),
        lambda score: softplus(-score).mean(),
        critic_steps=1,
    ),
}
