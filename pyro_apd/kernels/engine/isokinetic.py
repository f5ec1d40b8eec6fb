# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Motion at a constant speed, of which the potential changes only the direction; and trajectories of it that are
accepted or rejected, so that they have no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_apd.kernels.engine.step import Step

# Keeps divisions by a zero gradient finite.
_TINY = 1e-30
# Step sizes of successive trajectories, as shares of epsilon, so that no period of the target fits all of them: in a
# sequence of low discrepancy by the golden ratio.
_SHORTEST, _LONGEST, _GOLDEN = 0.7, 1.3, 0.6180339887498949
# Error of the energy beyond which nothing is accepted; larger ones, and those that are not finite, count as this.
_MAX_ERROR = 1e3


def pointing_down(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of steepest descent, a unit vector ``(..., D)``, and the norm of the gradient ``(..., 1)``."""
    norm = gradient.norm(dim=-1, keepdim=True)
    return -gradient / norm.clamp_min(_TINY), norm


def kicked(velocity: Tensor, downhill: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of motion after a push downhill, and log(cosh delta + (e u) sinh delta).

    Numerator and denominator are multiplied by 2 exp(-delta), so that nothing overflows.

    :param velocity: u, unit vectors ``(D,)`` or ``(C, D)``, and ``downhill``, e.
    :param delta: ``(1,)`` or ``(C, 1)``, at least 0.
    """
    cosine = (velocity * downhill).sum(-1, keepdim=True).clamp(-1.0, 1.0)
    root, lost = torch.exp(-delta), torch.expm1(-2 * delta)
    numerator = 2 * root * velocity + downhill * (cosine * (1 - root).square() - lost)
    half = (1 + 0.5 * lost * (1 - cosine)).clamp_min(_TINY)
    return numerator / (2 * half), delta + torch.log(half)


def adjusted_trajectory(step: Step, num_leaps: int, temperature: float) -> None:
    """A trajectory from a random direction of motion, accepted with the probability min(1, exp(-error)).

    The Metropolis-adjusted microcanonical sampler of Robnik, Cohn-Gordon & Seljak (arXiv 2503.01707) with full
    refreshment. The error is that of the energy over the whole trajectory. Where it is rejected, the state stays.

    The noise's direction is the direction of motion. The norm of a Gaussian vector is independent of its direction:
    its distribution function gives the number that decides.

    :param step: of which ``auxiliary`` holds ``scale``; ``phase``, a number in [0, 1); and ``energy``: a tensor that is
        not used, the sum of squared errors, their number, and the sum of the probabilities.
    :param num_leaps: leapfrog steps, with as many gradients.
    :param temperature: T.
    """
    (scale,), (phase,) = step.auxiliary["scale"], step.auxiliary["phase"]
    _, total, count, accepted = step.auxiliary["energy"]
    sizes = [piece.shape[-1] for piece in step.theta]
    num = sum(sizes)
    phase.copy_((phase + _GOLDEN).frac())
    size = step.size * (_SHORTEST + (_LONGEST - _SHORTEST) * phase)

    noise = torch.cat(step.noise, -1)
    square = noise.square().sum(-1, keepdim=True)
    velocity, theta = noise / square.sqrt(), torch.cat(step.theta, -1)
    gradient, energy = step.gradient, step.energy
    downhill, norm = pointing_down(torch.cat(gradient, -1) * scale / temperature)
    kinetic = torch.zeros_like(square)
    for _ in range(num_leaps):
        velocity, gain = kicked(velocity, downhill, norm * size / (2 * (num - 1)))
        theta = theta + velocity * scale * size
        gradient, energy = step.evaluate(tuple(theta.split(sizes, -1)))
        downhill, norm = pointing_down(torch.cat(gradient, -1) * scale / temperature)
        velocity, gain_here = kicked(velocity, downhill, norm * size / (2 * (num - 1)))
        kinetic = kinetic + gain + gain_here

    error = (energy - step.energy).unsqueeze(-1) / temperature + (num - 1) * kinetic
    error = error.nan_to_num(_MAX_ERROR, _MAX_ERROR, -_MAX_ERROR).clamp(-_MAX_ERROR, _MAX_ERROR)
    probability = torch.exp(-error.clamp_min(0.0))
    level = torch.special.gammainc(torch.full_like(square, num / 2, dtype=torch.float64), square.double() / 2)
    is_accepted = level < probability
    for piece, end in zip(step.theta, theta.split(sizes, -1), strict=True):
        piece.copy_(torch.where(is_accepted, end, piece))
    total.add_(error.square())
    count.add_(1.0)
    accepted.add_(probability)
