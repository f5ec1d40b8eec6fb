# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Learned critics, and the games that generators have been made to play against them."""

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
    """What WGAN-GP's critic minimises: E[critic(fake)] - E[critic(real)] + weight x penalty."""
    penalty = gradient_penalty(critic, real_SD, fake_SD)
    return critic(fake_SD).mean() - critic(real_SD).mean() + penalty_weight * penalty


@dataclass(frozen=True)
class Game:
    """What critic and generator each make small.

    :ivar of_critic: from critic, real ``(S, D)`` and fake ``(S, D)`` to a loss.
    :ivar of_generator: from the critic's scores ``(S, 1)`` of what was generated to a loss.
    :ivar float clip: bound on the critic's weights, or None.
    :ivar float learning_rate: of both, as published; None leaves it to the caller.
    :ivar int critic_steps: steps of the critic for one of the generator.
    """

    of_critic: Callable[[Critic, Tensor, Tensor], Tensor]
    of_generator: Callable[[Tensor], Tensor]
    clip: float | None = None
    learning_rate: float | None = None
    critic_steps: int = 5

    def optimiser(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """RMSprop where weights are clipped, as published; Adam elsewhere."""
        rate = self.learning_rate or learning_rate
        if self.clip is not None:
            return torch.optim.RMSprop(parameters, lr=rate)
        return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.9))

    @torch.no_grad()
    def constrain(self, critic: nn.Module) -> None:
        """What is done to the critic after each of its steps."""
        if self.clip is not None:
            for parameter in critic.parameters():
                parameter.clamp_(-self.clip, self.clip)


def _mean_of_generator(score_S1: Tensor) -> Tensor:
    return -score_S1.mean()


#: Games by the name that ``distill(objective=...)`` takes: Gulrajani et al. 2017 (the paper's choice); Arjovsky et al.
#: 2017; Mao et al. 2017; Goodfellow et al. 2014, with the generator's loss that does not saturate.
GAMES = {
    "wgan-gp": Game(critic_loss, _mean_of_generator),
    "wgan": Game(
        lambda critic, real, fake: critic(fake).mean() - critic(real).mean(),
        _mean_of_generator,
        clip=0.01,
        learning_rate=5e-5,
    ),
    "lsgan": Game(
        lambda critic, real, fake: 0.5 * (critic(real) - 1).square().mean() + 0.5 * critic(fake).square().mean(),
        lambda score: 0.5 * (score - 1).square().mean(),
        critic_steps=1,
    ),
    "non-saturating": Game(
        lambda critic, real, fake: softplus(-critic(real)).mean() + softplus(critic(fake)).mean(),
        lambda score: softplus(-score).mean(),
        critic_steps=1,
    ),
}
