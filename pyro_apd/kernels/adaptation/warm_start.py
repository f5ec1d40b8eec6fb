# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``warm_start=``: each chain is optimised to a mode before it warms up.

A network started at a draw from its prior spends its warm-up on learning, at the step sizes of a sampler. An optimiser
reaches a mode sooner. Several chains, each with a start and mini-batches of its own, then form a deep ensemble, and the
chains sample around its members (as in Sommer et al., ICLR 2025).

A step of Adam moves each weight by about the learning rate, whatever its gradient. A rate that suits wide weights
destroys a network whose weights are a twentieth of that, as those of a trained convolutional network are. So the
learning rate is relative to the size of the weights at the start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_apd.runtime.checks import integer
from pyro_apd.runtime.rates import share_of_rate

#: Learning rate of Adam at its highest, as a share of the weights' root mean square, and within what bounds.
RELATIVE_RATE, LOWEST_RATE, HIGHEST_RATE = 0.025, 0.001, 0.01
#: Factors that a start is tried at.
SHRINKAGES = (1.0, 0.5, 0.25, 0.125, 0.0625)
# Decay of the averages of gradients and of their squares, and what keeps their ratio finite: Kingma & Ba (2015).
_DECAY, _SQUARE_DECAY, _STABILITY = 0.9, 0.999, 1e-8


def optimised(
    gradient: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]],
    draw: Callable[[], tuple[Tensor, ...]],
    theta: Tensor,
    num_steps: int,
) -> Tensor:
    """Near a mode of exp(-U), by Adam on mini-batches; never waits for the device.

    :param gradient: gradient of U ``(..., D)`` and U ``(...)``, at ``(..., D)`` on a batch.
    :param draw: the next batch.
    :param theta: where to start, ``(D,)``, or ``(C, D)`` for C independent chains.
    :returns: the optimised state, as ``theta``; a chain whose entries are no longer finite stays at its start.
    """
    position, highest = theta.clone(), highest_rate(theta)
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    for i in range(num_steps):
        slope = gradient(position, draw())[0]
        mean.mul_(_DECAY).add_(slope, alpha=1 - _DECAY)
        square.mul_(_SQUARE_DECAY).addcmul_(slope, slope, value=1 - _SQUARE_DECAY)
        scale = (square / (1 - _SQUARE_DECAY ** (i + 1))).sqrt_().add_(_STABILITY)
        share = share_of_rate((i + 0.5) / num_steps)
        position.addcdiv_(mean * highest, scale, value=-share / (1 - _DECAY ** (i + 1)))
    is_finite = torch.isfinite(position).all(-1, keepdim=True)
    return torch.where(is_finite, position, theta)


def shrunk(
    gradient: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]],
    draw: Callable[[], tuple[Tensor, ...]],
    theta: Tensor,
) -> Tensor:
    """Each chain's start times the factor of :data:`SHRINKAGES` at which U is lowest.

    A draw from the wide prior of a network has outputs that no data have: saturated logits, or noise scales of 1e-7 of
    the residuals. Adam would take thousands of steps from there to where the likelihood says anything, or not arrive.
    On the way to the origin networks become as small as those that one trains from. Where U rises on that way, as for a
    trained network, the start stays as it is.

    :param gradient: as of :func:`optimised`, as are ``draw`` and ``theta``.
    """
    batch = draw()
    energies_F1 = torch.stack([gradient(factor * theta, batch)[1] for factor in SHRINKAGES]).unsqueeze(-1)
    energies_F1 = torch.where(torch.isfinite(energies_F1), energies_F1, torch.inf)
    factors = energies_F1.new_tensor(SHRINKAGES)[energies_F1.argmin(0)]
    return factors.to(theta) * theta


def highest_rate(theta: Tensor) -> Tensor:
    """The highest learning rate of each chain, ``(..., 1)``, from where it starts, ``(..., D)``."""
    size = theta.square().mean(-1, keepdim=True).sqrt()
    # At zero there is nothing that a high rate could destroy.
    return torch.where(size > 0, (RELATIVE_RATE * size).clamp(LOWEST_RATE, HIGHEST_RATE), HIGHEST_RATE)


def checked_warm_start(warm_start: int | None) -> int:
    """Steps of optimisation; 0 for None.

    :raises ValueError: if it is neither None nor a non-negative integer.
    """
    hint = "It is the number of optimisation steps that each chain takes before it warms up, such as 2000; or None."
    return 0 if warm_start is None else integer("warm_start", warm_start, at_least=0, hint=hint)
