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
from pyro_apd.kernels.adaptation.adjusted import TRAJECTORY_VARIANCE, AdjustedWarmUp
from pyro_apd.kernels.adaptation.microcanonical import MicrocanonicalWarmUp
from pyro_apd.kernels.adaptation.microcanonical_settings import ENERGY_VARIANCE, MicrocanonicalSettings
from pyro_apd.kernels.adaptation.warmup import WarmUp
from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.kernels.engine.chain import Chain
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.isokinetic import adjusted_trajectory, kicked, pointing_down
from pyro_apd.kernels.engine.schedules import Schedule
from pyro_apd.kernels.engine.step import Step
from pyro_apd.models.potential import Pieces
from pyro_apd.runtime.checks import flag, integer, number
from pyro_apd.runtime.seeds import derived_generator

# Energy errors from which on a step is taken back: so much, or so many times the sd that epsilon is chosen for. The
# first is a step that a Metropolis test would take back 99 times in 100.
_MAX_ERROR, _MAX_SDS = 5.0, 10.0
# Leapfrog steps of an adjusted trajectory: so many times the root of the number of weights, at most so many.
_LEAPS, _MAX_LEAPS = 2.0, 64
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
    Gaussian targets then were 2 to 3 % too large. A step with an error that is as good as impossible is taken back, as
    where a chain meets a region that is too narrow for epsilon; the next one has a new direction.

    Gradients of **all the data** are the default, and what this kernel is for: a step costs a pass over the data, and
    few steps are needed. Noise of mini-batches that is not the same in all directions biases the draws
    (:mod:`~pyro_apd.kernels.adaptation.gradient_noise` has the theory). So coordinates are scaled by that noise (SMILE,
    arXiv 2602.06500), and L and epsilon are lowered until the theory predicts variances at most ``max_inflation`` too
    large, which costs most of the speed, and asks for a warm-up of some thousand steps. Larger batches help: twice as
    many of 200 rows allowed three times epsilon L. The prediction is not exact for networks, so for mini-batches take
    PSGLD or SGHMC. ``diagnostics()["tuning"]`` has the inflation that is left, and the factor by which lower L and
    epsilon cost more steps. A run warns (``InflationWarning``) where that factor is more than the number of batches of
    an epoch, so that all rows are cheaper, and where L and epsilon are given and widen the draws by more than is
    allowed.

    ``adjusted=True`` accepts or rejects whole trajectories, each from a random direction of motion (Robnik, Cohn-Gordon
    & Seljak, arXiv 2503.01707). That has no bias at any step size, and is exact in tails too. A step then is a
    trajectory of ``leaps`` leapfrog steps, with as many gradients, so that ``thinning=1`` is right. It took
    about twice the gradients per effective draw on a network of 222 weights.

    :param step_size: epsilon, in units of the preconditioner :math:`\sigma`: ``"auto"``, or as for other kernels, with
        :math:`\sigma = 1`. With ``"auto"`` starts that are far too wide are shrunk towards the origin, and up to 500
        steps of Adam come first, in addition to the warm-up's steps; so does a ``warm_start`` that is longer.
    :param length: L, the distance over which the direction of motion is forgotten, in the units of epsilon; ``"auto"``:
        from the autocorrelation that the warm-up shows.
    :param bool adjusted: accept or reject trajectories; on all the data alone. Compiled with ``compile=True`` only.
    :param int leaps: leapfrog steps of an adjusted trajectory. None: twice the root of the number of weights, at most
        64. Epsilon differs by up to 30 % from trajectory to trajectory.
    :param bool precondition: with ``step_size="auto"``, whether sigma is the sds of the warm-up's draws, by chain;
        on mini-batches one over those of the gradient's noise.

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
        adjusted: bool = False,
        leaps: int | None = None,
        **settings: Any,
    ) -> None:
        self.adjusted = flag("adjusted", adjusted)
        self.leaps = None if leaps is None else integer("leaps", leaps, hint="Or None.")
        if adjusted:
            if length != "auto":
                raise ValueError(f"length={length!r} has no meaning with adjusted=True: leave it out, or set `leaps`.")
            settings = {"compile": False, **settings}
        elif leaps is not None:
            raise ValueError(f"leaps={leaps!r} is for adjusted trajectories: leave it out, or set adjusted=True.")
        super().__init__(model, step_size, **settings)
        self.length = length if length == "auto" else number("length", length, above=0, hint="Or 'auto'.")
        self.precondition = flag("precondition", precondition)
        number("temperature", self.temperature, above=0, hint="For a mode, use SGLD.")
        if self.noise != "normal":
            raise ValueError(f"noise={self.noise!r}: MCLMC needs normal noise. Leave noise out, or use SGLD or SGHMC.")

    def _warm_up(self, num_steps: int, num_latents: int, chains: ChainSet, run_seed: int) -> tuple[Schedule, WarmUp]:
        settings = MicrocanonicalSettings(
            adapts_step=self.schedule is None,
            adapts_length=self.length == "auto" and not self.adjusted,
            preconditions=self.precondition and self.schedule is None,
            max_inflation=self.max_inflation,
            trial=lambda chain, size, num: self._trial(chain, size, num, run_seed),
            energy_variance=TRAJECTORY_VARIANCE / num_latents if self.adjusted else ENERGY_VARIANCE,
        )
        kind = AdjustedWarmUp if self.adjusted else MicrocanonicalWarmUp
        warmup = kind(num_steps, num_latents, self.temperature, chains, self.warm_start, settings)
        return self.schedule or warmup, warmup

    def _start_chain(self, chain: Chain) -> None:
        theta = chain.theta
        num = theta.shape[-1]
        if num == 1:
            raise ModelError(
                "MCLMC samples by directions of motion, and a model with one latent value has none to choose from. "
                "Use SGLD or SGHMC."
            )
        if self.adjusted and chain.potential.source.epoch_length != 1:
            raise ModelError(
                "adjusted=True accepts trajectories by the potential of all the data, and this run has mini-batches. "
                "Leave out batch_size and subsampling, or adjusted=True."
            )
        one = theta.new_zeros(*theta.shape[:-1], 1)
        length = math.sqrt(num) if self.length == "auto" else self.length
        # All but what is kept starts at zero, also where a chain is put back: then a new velocity is drawn.
        chain.auxiliary["velocity"] = (torch.zeros_like(theta),)
        chain.auxiliary["scale"] = (torch.ones_like(theta),)
        chain.auxiliary["length"] = (torch.full_like(one, float(length)),)
        # What the next error is measured from; the sum of squared errors; their number; and, where trajectories are
        # accepted or not, the sum of the probabilities.
        chain.auxiliary["energy"] = tuple(one.clone() for _ in range(4 if self.adjusted else 3))
        if self.adjusted:
            chain.auxiliary["phase"] = (one.clone(),)

    def end(self, chain: Chain) -> None:
        """See :class:`~pyro_apd.kernels.base.StochasticGradientKernel`."""
        if isinstance(chain.warmup, AdjustedWarmUp):
            chain.warmup.end_kept(chain)
        super().end(chain)

    def _update(self, step: Step) -> None:
        if self.adjusted:
            num = sum(piece.shape[-1] for piece in step.theta)
            adjusted_trajectory(
                step, self.leaps or min(math.ceil(_LEAPS * math.sqrt(num)), _MAX_LEAPS), self.temperature
            )
        else:
            self._leap(step)

    def _leap(self, step: Step) -> None:
        """The second half of one step and the first half of the next, which need the same gradient."""
        (velocity,), (scale,), (length,) = (step.auxiliary[name] for name in ("velocity", "scale", "length"))
        before, total, count = step.auxiliary["energy"]
        sizes = [piece.shape[-1] for piece in step.theta]
        num = sum(sizes)
        downhill, norm = pointing_down(torch.cat(step.gradient, -1) * scale / self.temperature)
        delta = norm * (step.size / (2 * (num - 1)))
        is_new = (velocity == 0).all(-1, keepdim=True)

        arrived, gain = kicked(velocity, downhill, delta)
        energy = step.energy.unsqueeze(-1) / self.temperature
        error = energy + (num - 1) * gain - before
        limit = max(_MAX_ERROR, _MAX_SDS * math.sqrt(ENERGY_VARIANCE * num))
        is_lost = ~(is_new | (error < limit))
        error = error.nan_to_num(limit, limit, -limit).clamp(-limit, limit)
        total.add_(torch.where(is_new, 0.0, error.square()))
        count.add_(torch.where(is_new, 0.0, 1.0))

        noise = torch.cat(step.noise, -1)
        variance = torch.expm1((2 * step.size / length).clamp_max(_MAX_EXPONENT)) / num
        refreshed = torch.where(is_new, noise, arrived + variance.sqrt() * noise)
        refreshed = refreshed / refreshed.norm(dim=-1, keepdim=True)

        leaving, gain = kicked(refreshed, downhill, delta)
        before.copy_(energy - (num - 1) * gain)
        # A step that is lost is taken back, and the next one begins with a new direction, as its gradient is not here.
        move = torch.where(is_lost, -velocity, leaving) * scale * step.size
        velocity.copy_(torch.where(is_lost, 0.0, leaving))
        for theta, part in zip(step.theta, move.split(sizes, -1), strict=True):
            theta.add_(part)

    def _trial(self, chain: Chain, size: float, num_steps: int, seed: int) -> Tensor:
        """Squared energy errors ``(C,)``, the mean over steps from each chain's state, on one batch.

        The direction of motion is random. The chain itself stays as it is.
        """
        theta = chain.theta
        auxiliary = {
            name: pieces if name in self._kept else tuple(torch.zeros_like(piece) for piece in pieces)
            for name, pieces in chain.auxiliary.items()
        }
        inputs = chain.potential.source.draw()
        # Of each chain by its number, so that it does not depend on which chains are here.
        generators = [derived_generator(seed, "trial", number, chain.step) for number in chain.chains.numbers]

        def evaluate(at: Pieces) -> tuple[Pieces, Tensor]:
            gradient, energy = chain.estimator.gradient(at[0], inputs)
            return (gradient,), energy

        epsilon = theta.new_full((), size)
        for _ in range(num_steps + (not self.adjusted)):
            directions = [torch.randn(theta.shape[-1], generator=generator) for generator in generators]
            noise = torch.stack(directions).reshape(theta.shape).to(theta)
            self._update(Step((theta,), auxiliary, *evaluate((theta,)), (noise,), epsilon, evaluate, 1))
        return (auxiliary["energy"][1] / auxiliary["energy"][2]).reshape(-1)
