# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The learned critic of a Wasserstein GAN, and the penalty that keeps its slope near one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_apd.generators.paper import he_perceptron


def build_critic(size: int, width: int = 100) -> nn.Sequential:
    """A perceptron from vectors ``(S, size)`` to scores ``(S, 1)``, with the paper's three hidden layers."""
    return he_perceptron([size, width, width, width, 1])


def gradient_penalty(critic: Callable[[Tensor], Tensor], real_SD: Tensor, fake_SD: Tensor) -> Tensor:
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


def critic_loss(
    critic: Callable[[Tensor], Tensor], real_SD: Tensor, fake_SD: Tensor, penalty_weight: float = 10.0
) -> Tensor:
    """What the critic minimises: E[critic(fake)] - E[critic(real)] + weight x penalty."""
    penalty = gradient_penalty(critic, real_SD, fake_SD)
    return critic(fake_SD).mean() - critic(real_SD).mean() + penalty_weight * penalty
