# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How much the noise of mini-batch gradients biases microcanonical dynamics.

The velocity u of d weights has the length 1. A step of size epsilon adds to it noise of two kinds: refreshment, of
variance s = (exp(2 epsilon / L) - 1) / d in every direction, and that of the gradient, of variance q V with
q = epsilon^2 / (d - 1)^2 where the gradient's estimate has the variance V. Since the length is kept, noise that is the
same in all directions only forgets the direction of motion sooner. Where it differs, the mean of u^2 along a direction,
which is its temperature, becomes

    (s + q V) / (s + q mean(V))    of what it should be,

and so does the variance of the draws there. More refreshment, by a shorter L, makes that smaller; so do smaller steps
and larger batches. A full refreshment has s = 1 / d here, as no more noise than that can be added to a unit vector.

That holds for small kicks. A kick of rms size delta = sqrt(d q mean(V)) turns the direction of motion by tanh(delta),
and its systematic part by as much less, which widens all directions by delta^2 / 3.

With up to 32 weights V is that of the noisiest direction. With more it is the mean over directions, each weighted by
its own noise, tr(C^2) / tr(C) for a noise of covariance C: those are the directions that the data determine. Batches
count as independent. Those of an epoch without replacement cancel a part of their noise in slow directions, so that
the bias is smaller than stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Weights up to which the noisiest direction counts.
_MAX_DENSE = 32
# Batches that the noise is measured by: where every direction counts, and where their mean does.
_NUM_DENSE, _NUM_BATCHES = 64, 16
# What is aimed at, as a part of the inflation that is allowed: measures have errors.
_MARGIN = 0.9


class InflationWarning(UserWarning):
    """Draws are wider than the posterior by more than ``max_inflation``, or a kernel pays too much for its batches."""


@dataclass(frozen=True)
class GradientNoise:
    """The noise of the gradient in the sampler's metric.

    :ivar float hottest: V where the noise matters; see this module.
    :ivar float mean: V, mean over all directions.
    :ivar int num: number of weights, d.
    """

    hottest: float
    mean: float
    num: int

    def inflation(self, step_size: float, length: float) -> float:
        """Share by which variances come out too large, where the noise matters."""
        refreshed = min(math.expm1(min(2 * step_size / length, 60.0)), 1.0) / self.num
        share = (step_size / (self.num - 1)) ** 2
        return share * (self.hottest - self.mean) / (refreshed + share * self.mean) + self._kick(step_size)

    def limited(self, step_size: float, length: float, allowed: float) -> tuple[float, float]:
        """The largest step size and L, up to those given, at which variances are no more than ``allowed`` too large."""
        if self.inflation(step_size, length) <= allowed:
            return step_size, length
        # Half of it for each of the two effects.
        half = 0.5 * _MARGIN * allowed
        step_size *= min(1.0, math.sqrt(half / max(self._kick(step_size), 1e-300)))
        needed = (step_size / (self.num - 1)) ** 2 * (self.hottest - (1 + half) * self.mean) / half
        if needed * self.num > 1:
            # Both sides are proportional to epsilon squared: a full refreshment, and a smaller step.
            step_size /= math.sqrt(needed * self.num)
            needed = 1 / self.num
        if needed <= 0:
            return step_size, length
        return step_size, min(length, 2 * step_size / math.log1p(needed * self.num))

    def _kick(self, step_size: float) -> float:
        """Share by which the size of kicks widens all directions."""
        return self.num * (step_size / (self.num - 1)) ** 2 * self.mean / 3


def batch_noise(gradient: Callable[[], Tensor], epoch_length: int | None, num: int) -> tuple[Tensor, Tensor]:
    """V where the noise matters, and its mean over directions: ``()`` or ``(C,)`` each, see this module.

    :param gradient: the gradient on the next batch, ``(D,)`` or ``(C, D)``.
    :param epoch_length: batches per epoch without replacement; None where batches are independent.
    :param int num: number of weights, D.
    """
    is_dense = num <= _MAX_DENSE
    # Differences of two batches have no mean: nothing is to be subtracted, and they are independent of each other.
    count = (_NUM_DENSE if is_dense else _NUM_BATCHES) // 2
    differences = torch.stack([(gradient() - gradient()).double().cpu() for _ in range(count)], -2) / math.sqrt(2)
    if epoch_length is not None and epoch_length > 1:
        differences *= math.sqrt((epoch_length - 1) / epoch_length)
    mean = differences.square().sum(-1).mean(-1) / num
    if is_dense:
        covariance = (differences.mT @ differences / count).nan_to_num()  # LAPACK raises where entries are not finite
        return torch.linalg.eigvalsh(covariance)[..., -1], mean
    products = (differences @ differences.mT).square()
    apart = products.sum((-1, -2)) - products.diagonal(dim1=-2, dim2=-1).sum(-1)
    return apart / (count * (count - 1)) / (num * mean).clamp_min(1e-300), mean


def noise_message(inflation: float, allowed: float) -> str:
    """Says that mini-batches widen the draws by more than is allowed."""
    return (
        f"Mini-batches widen variances by up to {inflation:.0%} in the directions that the data determine; "
        f"max_inflation={allowed:g}. Use all the data (batch_size=None), or SGHMC or PSGLD, which are made for "
        "mini-batches; or larger batches, a smaller step_size, or step_size='auto' and length='auto' with a warm-up."
    )


def slowdown(wanted: float, step_size: float, length: float, num: int) -> float:
    """By what factor the number of steps for the same way grows, as step size and L are held down.

    Over more than L a chain of steps epsilon diffuses: the square of its distance grows by epsilon L per step.

    :param wanted: step size without noise; L without is the size of the target, the root of the number of weights.
    """
    return wanted * math.sqrt(num) / (step_size * length)


def slowdown_message(factor: float, epoch_length: int) -> str:
    """Says that mini-batches cost more steps than they save."""
    return (
        f"To keep the noise of mini-batches from widening the draws, this chain takes about {factor:.2g} times the "
        f"steps that it would take with all the data, and a batch is 1/{epoch_length} of them: draws hardly move. Use "
        "all the data (batch_size=None), larger batches, or SGHMC or PSGLD, which are made for mini-batches."
    )


def energy_message(variance: float, wanted: float, step_size: float, is_automatic: bool) -> str:
    """Says that steps are too long, by the variance of the energy error per weight; it grows as their sixth power.

    :param wanted: the variance that is aimed at.
    :param is_automatic: whether the warm-up chose the step size: what is on is not advised.
    """
    size = step_size * (wanted / variance) ** (1 / 6)
    advice = "Give more warmup_steps" if is_automatic else f"Try step_size={size:.2g}, or 'auto'"
    return (
        f"The variance of the energy error is {variance:.2g} per weight at step_size={step_size:.3g}, so that draws "
        f"are too wide. {advice}."
    )
