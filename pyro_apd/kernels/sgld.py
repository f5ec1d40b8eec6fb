# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.kernels.engine.step import Step


class SGLD(StochasticGradientKernel):
    r"""Stochastic gradient Langevin dynamics, Welling & Teh (ICML 2011), equation 4.

    .. math::

        \theta \leftarrow \theta - \frac{\epsilon}{2} \nabla U(\theta) + \mathcal{N}(0, \epsilon T)

    with U the potential of the **full** data, estimated on a mini-batch. The target is :math:`\exp(-U / T)`,
    approached as epsilon goes to 0: there is no accept step. At a constant step the variance along a direction of
    curvature :math:`\lambda` is too large by the factor :math:`1 / (1 - \epsilon \lambda / 4)` from discretisation and
    by up to about :math:`1 + \epsilon V / (4 T)` from mini-batches, V being the variance of the gradient's estimate.
    That is for independent batches; those of an epoch without replacement cancel most of it in slow directions.

    The paper's own setting for MNIST (Wang et al. 2018) is ``step_size=1e-6``, batches of 100 and ``thinning=20``.

    Parameters as for :class:`~pyro_apd.kernels.base.StochasticGradientKernel`.

    Example::

        kernel = SGLD(model, step_size=1e-6, batch_size=100, thinning=20)
        mcmc = MCMC(kernel, num_samples=1000, warmup_steps=2000)
        mcmc.run(x_train, y_train)
    """

    def _update(self, step: Step) -> None:
        scale = (step.size * self.temperature).sqrt()
        for theta, gradient, noise in zip(step.theta, step.gradient, step.noise, strict=True):
            theta.addcmul_(gradient, step.size, value=-0.5).addcmul_(noise, scale)
