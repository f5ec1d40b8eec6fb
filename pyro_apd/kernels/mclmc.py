# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Microcanonical Langevin Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_apd.errors import ModelError
from pyro_apd.kernels.adaptation.microcanonical import MicrocanonicalWarmUp
from pyro_apd.kernels.adaptation.microcanonical_settings import MicrocanonicalSettings
from pyro_apd.kernels.adaptation.warmup import WarmUp
from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.kernels.engine.chain import Chain
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.schedules import Schedule
from pyro_apd.kernels.engine.step import Step
from pyro_apd.runtime.checks import flag, number
from pyro_apd.runtime.seeds import derived_generator

# Keeps divisions by a zero gradient finite.
_TINY = 1e-30
# Exponent from which on a refreshment is complete.
_MAX_EXPONENT = 60.0


class MCLMC(StochasticGradientKernel):
    r"""Microcanonical Langevin Monte Carlo, Robnik & Seljak (AABI 2024); for networks, Sommer et al. (ICLR 2025).

    The speed is constant, and the potential changes only the direction of motion u, with :math:`|u| = 1`. For d weights
    :math:`x = \theta / \sigma`, :math:`g = \nabla_x U / T` and :math:`e = -g / |g|`, a step is

    .. math::

        u &\leftarrow \frac{u + e\,(\sinh \delta + (e \cdot u)(\cosh \delta - 1))}
            {\cosh \delta + (e \cdot u) \sinh \delta}, \qquad \delta = \frac{\epsilon\, |g|}{2 (d - 1)} \\
        x &\leftarrow x + \epsilon\, u \\
        u &\leftarrow \text{the first line again, at the new } x \\
        u &\leftarrow \frac{u + \nu z}{|u + \nu z|}, \qquad \nu^2 = \frac{e^{2 \epsilon / L} - 1}{d},
            \quad z \sim \mathcal{N}(0, I)

    The target is :math:`\exp(-U / T)` as epsilon goes to 0: there is no accept step. The error of the energy,
    :math:`\Delta U / T + (d - 1) \log(\cosh \delta + (e \cdot u) \sinh \delta)`, which is 0 for exact dynamics,
    measures the bias. With ``step_size="auto"`` its variance is :math:`5 \cdot 10^{-4}` per weight; variances of
    Gaussian targets then were 2 to 3 % too large.

    Gradients of **all the data** are the default, and what this kernel is for: a step costs a pass over the data, and
    few steps are needed. Noise of mini-batches that is not the same in all directions biases the draws
    (:mod:`~pyro_apd.kernels.adaptation.gradient_noise` has the theory). It is measured, and L and epsilon are lowered
    until the theory predicts variances at most ``max_inflation`` too large, which costs most of the speed. That
    prediction is not exact, so for mini-batches take SGLD or SGHMC. Where L and epsilon are given, a run warns.

    :param step_size: epsilon, in units of the preconditioner :math:`\sigma`: ``"auto"``, or as for other kernels, with
        :math:`\sigma = 1`. With ``"auto"`` up to 500 steps of Adam come first, in addition to the warm-up's steps; so
        does a ``warm_start`` that is longer.
    :param length: L, the distance over which the direction of motion is forgotten, in the units of epsilon; ``"auto"``:
        from the autocorrelation that the warm-up shows.
    :param bool precondition: with ``step_size="auto"``, whether sigma is the sds of the warm-up's draws, by chain.

    Other parameters as for :class:`~pyro_apd.kernels.base.StochasticGradientKernel`.

    :raises ValueError: if a number is out of range.

    Example::

        kernel = MCLMC(model, thinning=10)
        mcmc = apd.MCMC(kernel, num_samples=500, warmup_steps=300, num_chains=8)
        mcmc.run(x_train, y_train)
    """

    #: A chain that is put back to a checkpoint keeps what was adapted.
    _kept = ("scale", "length")

    def __init__(
        self,
        model: Callable[..., Any],
        step_size: float | str | Schedule = "auto",
        *,
        length: float | str = "auto",
        precondition: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(model, step_size, **settings)
        self.length = length if length == "auto" else number("length", length, above=0, hint="Or 'auto'.")
        self.precondition = flag("precondition", precondition)
        number("temperature", self.temperature, above=0, hint="For a mode, use SGLD.")

    def _warm_up(self, num_steps: int, num_latents: int, chains: ChainSet, run_seed: int) -> tuple[Schedule, WarmUp]:
        settings = MicrocanonicalSettings(
            adapts_step=self.schedule is None,
            adapts_length=self.length == "auto",
            preconditions=self.precondition and self.schedule is None,
            max_inflation=self.max_inflation,
            trial=lambda chain, size, num: self._trial(chain, size, num, run_seed),
        )
        warmup = MicrocanonicalWarmUp(num_steps, num_latents, self.temperature, chains, self.warm_start, settings)
        return self.schedule or warmup, warmup

    def _start_chain(self, chain: Chain) -> None:
        theta = chain.theta
        num = theta.shape[-1]
        if num == 1:
            raise ModelError(
                "MCLMC samples by directions of motion, and a model with one latent value has none to choose from. "
                "Use SGLD or SGHMC."
            )
        one = theta.new_zeros(*theta.shape[:-1], 1)
        length = math.sqrt(num) if self.length == "auto" else self.length
        # All but what is kept starts at zero, also where a chain is put back: then a new velocity is drawn.
        chain.auxiliary["velocity"] = (torch.zeros_like(theta),)
        chain.auxiliary["scale"] = (torch.ones_like(theta),)
        chain.auxiliary["length"] = (torch.full_like(one, float(length)),)
        # What the next error is measured from; the sum of squared errors; and their number.
        chain.auxiliary["energy"] = tuple(one.clone() for _ in range(3))

    def _update(self, step: Step) -> None:
        """The second half of one step and the first half of the next, which need the same gradient."""
        (velocity,), (scale,), (length,) = (step.auxiliary[name] for name in ("velocity", "scale", "length"))
        before, total, count = step.auxiliary["energy"]
        sizes = [piece.shape[-1] for piece in step.theta]
        num = sum(sizes)
        gradient = torch.cat(step.gradient, -1) * scale / self.temperature
        norm = gradient.norm(dim=-1, keepdim=True)
        downhill = -gradient / norm.clamp_min(_TINY)
        delta = norm * (step.size / (2 * (num - 1)))
        is_new = (velocity == 0).all(-1, keepdim=True)

        arrived, gain = kicked(velocity, downhill, delta)
        energy = step.energy.unsqueeze(-1) / self.temperature
        error = energy + (num - 1) * gain - before
        total.add_(torch.where(is_new, 0.0, error.square()))
        count.add_(torch.where(is_new, 0.0, 1.0))

        noise = torch.cat(step.noise, -1)
        variance = torch.expm1((2 * step.size / length).clamp_max(_MAX_EXPONENT)) / num
        refreshed = torch.where(is_new, noise, arrived + variance.sqrt() * noise)
        refreshed = refreshed / refreshed.norm(dim=-1, keepdim=True)

        leaving, gain = kicked(refreshed, downhill, delta)
        before.copy_(energy - (num - 1) * gain)
        velocity.copy_(leaving)
        for theta, move in zip(step.theta, (leaving * scale * step.size).split(sizes, -1), strict=True):
            theta.add_(move)

    def _trial(self, chain: Chain, size: float, num_steps: int, seed: int) -> Tensor:
        """Squared energy errors ``(C,)``, the mean over steps from each chain's state, on one batch.

        The direction of motion is random. The chain itself stays as it is.
        """
        theta = chain.theta
        auxiliary = {name: chain.auxiliary[name] for name in self._kept}
        auxiliary["velocity"] = (torch.zeros_like(theta),)
        auxiliary["energy"] = tuple(torch.zeros_like(piece) for piece in chain.auxiliary["energy"])
        inputs = chain.potential.source.draw()
        # Of each chain by its number, so that it does not depend on which chains are here.
        directions = [
            torch.randn(theta.shape[-1], generator=derived_generator(seed, "trial", number, chain.step))
            for number in chain.chains.numbers
        ]
        noise = torch.stack(directions).reshape(theta.shape).to(theta)
        epsilon = theta.new_full((), size)
        for _ in range(num_steps + 1):
            gradient, energy = chain.estimator.gradient(theta, inputs)
            self._update(Step((theta,), auxiliary, (gradient,), energy, (noise,), epsilon, lambda at: at, 1))
            noise = torch.zeros_like(noise)
        return (auxiliary["energy"][1] / num_steps).reshape(-1)


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
