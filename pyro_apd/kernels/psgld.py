# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SGLD with a preconditioner that is adapted as in RMSprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.kernels.engine.chain import Chain
from pyro_apd.kernels.engine.schedules import Schedule
from pyro_apd.kernels.engine.step import Step
from pyro_apd.runtime.checks import number

# V is held fixed from this share of the warm-up on: an automatic step size is decided by what is measured after it.
_ADAPTED = 0.75
# Where its memory exceeds 1 / (1 - decay) steps, V remembers this share of the steps so far: the fewer independent
# gradients it averages, the more directions happen to be taken for flat.
_REMEMBERED = 0.25


class PSGLD(StochasticGradientKernel):
    r"""Preconditioned SGLD, after Li, Chen, Carlson & Carin (AAAI 2016), algorithm 1, with G fixed after warm-up.

    .. math::

        V &\leftarrow \alpha_t V + (1 - \alpha_t)\, \bar g \odot \bar g,
                \qquad \bar g = \nabla U(\theta) / N \\
        G &= 1 / (\lambda + \sqrt V) \\
        \theta &\leftarrow \theta - \frac{\epsilon}{2} G \odot \nabla U(\theta) + \mathcal{N}(0, \epsilon T G)

    Each direction moves at a rate of its own, so badly scaled posteriors mix sooner. V is adapted over the first three
    quarters of the warm-up, with :math:`\alpha_t = \max(\alpha, 1 - 4 / t)` at Langevin step t, and is then held fixed.
    With a fixed G the target is :math:`\exp(-U / T)` as epsilon goes to 0, and the error at a given epsilon is that of
    :class:`~pyro_apd.kernels.sgld.SGLD` in the coordinates :math:`\theta / \sqrt G`. The paper changes G at every step;
    that needs a term :math:`\Gamma_i = \partial G_{ii} / \partial \theta_i`, which its experiments leave out. Variances
    in slow directions are then too large: by 28 % on a Gaussian of condition number 100, at alpha = 0.99.

    V starts at the first squared gradient. It averages 1 / (1 - alpha) gradients at least, also where that is longer
    than three quarters of the warm-up. Epsilon multiplies G, so step sizes are not those of SGLD.

    :param float decay: alpha.
    :param float stability: lambda, which bounds G by its inverse.

    Other parameters as for :class:`~pyro_apd.kernels.base.StochasticGradientKernel`.

    Example::

        kernel = PSGLD(model, "auto", batch_size=100, thinning=20)
        mcmc = MCMC(kernel, num_samples=1000, warmup_steps=500)
        mcmc.run(x_train, y_train)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        step_size: float | str | Schedule,
        *,
        decay: float = 0.99,
        stability: float = 1e-5,
        **settings: Any,
    ) -> None:
        super().__init__(model, step_size, **settings)
        self.decay = number("decay", decay, above=0, below=1)
        self.stability = number("stability", stability, above=0)

    _kept, _restored = ("steps",), ("second_moment",)

    def _start_chain(self, chain: Chain) -> None:
        chain.auxiliary["second_moment"] = chain.zeros()
        taken = torch.zeros((*chain.theta.shape[:-1], 1), dtype=torch.int64, device=chain.theta.device)
        # In tensors, since steps may be compiled. The second is the number of steps that V is adapted for; the third
        # counts those since V started.
        num_adapted = max(int(_ADAPTED * chain.warmup.num_steps), round(1 / (1 - self.decay)))
        averaged = taken.to(chain.theta.dtype)
        chain.auxiliary["steps"] = (taken, torch.full_like(taken, num_adapted), averaged)

    def _dynamics(self, chain: Chain) -> Dynamics:
        """As of SGLD with the present preconditioner."""
        second = torch.cat(chain.auxiliary["second_moment"], -1)
        if chain.step == 0:
            gradient = chain.estimator.gradient(chain.theta, chain.potential.source.draw())[0]
            second = (gradient / (chain.estimator.num_data or 1)).square()
        return Dynamics(metric=(second.sqrt() + self.stability).reciprocal())

    def _update(self, step: Step) -> None:
        taken, num_adapted, averaged = step.auxiliary["steps"]
        taken.add_(1)
        averaged.add_(1)
        weight = torch.where(taken <= num_adapted, (1 / (_REMEMBERED * averaged)).clamp_max(1 - self.decay), 0.0)
        seconds = step.auxiliary["second_moment"]
        for theta, second, gradient, noise in zip(step.theta, seconds, step.gradient, step.noise, strict=True):
            square = (gradient / step.num_data).square()
            # It starts at zero, where there is nothing to average yet.
            second.copy_(torch.where(second == 0, square, torch.lerp(second, square, weight)))
            scale = (second.sqrt() + self.stability).reciprocal()
            theta.addcmul_(scale * gradient, step.size, value=-0.5)
            theta.addcmul_(noise, (scale * (step.size * self.temperature)).sqrt())
