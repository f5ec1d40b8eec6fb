# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Stochastic gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.kernels.engine.chain import Chain
from pyro_apd.kernels.engine.schedules import Schedule
from pyro_apd.kernels.engine.step import Step
from pyro_apd.models.potential import Pieces
from pyro_apd.runtime.checks import number


class SGHMC(StochasticGradientKernel):
    r"""Stochastic gradient Hamiltonian Monte Carlo, Chen, Fox & Guestrin (ICML 2014), equation 15.

    .. math::

        v &\leftarrow (1 - a)\, v - \eta \nabla U(\theta) + \mathcal{N}\bigl(0,\, 2 (a - \hat b)\, \eta T\bigr) \\
        \theta &\leftarrow \theta + v

    with :math:`\eta = \epsilon / 2`, so that at friction :math:`a = 1` the step is exactly that of
    :class:`~pyro_apd.kernels.sgld.SGLD` at the same epsilon. The target is :math:`\exp(-U / T)` as epsilon goes to 0.
    :math:`\hat b = \eta \hat V / (2 T)` is the part of the friction's noise that mini-batches already supply, V being
    the variance of the gradient's estimate; subtracting it corrects the temperature. That is for independent batches:
    those of an epoch without replacement, the default, add less, and the formula would make the temperature too low.

    :param float friction: a, between 0 and 1; 0.1 is momentum 0.9.
    :param float noise_estimate: b-hat, at least 0 and less than the friction; 0, the default, ignores the mini-batches'
        noise; the temperature is then a little too high.

    Other parameters as for :class:`~pyro_apd.kernels.base.StochasticGradientKernel`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        step_size: float | str | Schedule,
        *,
        friction: float = 0.1,
        noise_estimate: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(model, step_size, **settings)
        self.friction = number("friction", friction, above=0, at_most=1)
        hint = f"It must be less than friction={friction!r}."
        self.noise_estimate = number("noise_estimate", noise_estimate, at_least=0, below=self.friction, hint=hint)

    def _start_chain(self, chain: Chain) -> None:
        # Zero; the momentum reaches its temperature within some 1 / friction steps of warm-up.
        chain.auxiliary["momentum"] = chain.zeros()

    def _dynamics(self, chain: Chain) -> Dynamics:
        return Dynamics(self.friction, self.noise_estimate)

    def _update(self, step: Step) -> None:
        scale = ((self.friction - self.noise_estimate) * self.temperature * step.size).sqrt()
        states = zip(step.theta, step.auxiliary["momentum"], step.gradient, step.noise, strict=True)
        for theta, momentum, gradient, noise in states:
            momentum.mul_(1 - self.friction).addcmul_(gradient, step.size, value=-0.5).addcmul_(noise, scale)
            theta.add_(momentum)

    def _kinetic(self, auxiliary: Mapping[str, Pieces], step_size: float) -> Tensor:
        # Free momenta have the variance epsilon T / (2 - a).
        sums = [momentum.square().sum(-1) for momentum in auxiliary["momentum"]]
        return torch.stack(sums, -1) * ((2 - self.friction) / step_size)
