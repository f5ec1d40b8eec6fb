# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The potential around a point, as far as a step size depends on it: its curvatures and the noise of its gradient.

Models of up to 32 latents are measured direction by direction; larger ones by quadratures of their spectra, from random
vectors. :mod:`pyro_apd.kernels.adaptation.step_size` chooses a step size from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_apd.kernels.adaptation.curvature import dense_hessian, hessian_product, lanczos, largest_curvature
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.runtime.seeds import derived_generator

if TYPE_CHECKING:
    from pyro_apd.kernels.engine.chain_set import ChainSet

#: Models of up to so many latents are measured direction by direction.
MAX_DENSE = 32

# Products with the Hessian: for the largest curvature alone, and for a spectrum.
_NUM_LARGEST, _NUM_SPECTRUM = 8, 12
# Batches that the noise is measured by: where every direction counts by itself, and where only their sum does.
_NUM_NOISE_DENSE, _NUM_NOISE = 64, 8
# Batches that a whole Hessian is averaged over, at most.
_NUM_HESSIAN = 8

GradientAndEnergy = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LocalPotential:
    """A potential around the present state of a chain, or of C chains.

    :ivar gradient: gradient of U ``(..., D)`` and U, at ``(..., D)`` on a batch.
    :ivar draw: the next batch.
    :ivar Tensor theta: the state, ``(D,)`` or ``(C, D)``.
    :ivar Dynamics dynamics: of the sampler, there.
    :ivar float temperature: T.
    :ivar epoch_length: batches per epoch without replacement: 1 for full data, None where batches count as independent.
    :ivar is_active: of the chains of the whole run, ``(C,)``, which have not diverged; None for all.
    :ivar ChainSet chains: which chains of the run these are, and which processes have the others.
    """

    gradient: GradientAndEnergy
    draw: Callable[[], tuple[Tensor, ...]]
    theta: Tensor
    dynamics: Dynamics
    temperature: float
    epoch_length: int | None
    is_active: Tensor | None
    chains: ChainSet

    def active(self, values: Tensor) -> Tensor:
        """Values ``()`` or ``(C,)`` of the chains that have not diverged, from those of all chains of the run."""
        return values if self.is_active is None else values[self.is_active]

    def of_all_chains(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Values ``(C, ...)`` of all chains of the run, in their order, from those of the chains here.

        :raises RankError: if another process is gone.
        """
        peers = self.chains.peer_ranks
        if peers.size == 1:
            return values
        by_process = peers.gathered([value.cpu() for value in values])
        return tuple(torch.cat(parts) for parts in zip(*by_process, strict=True))

    def random(self, seed: int) -> Tensor:
        """A random vector per chain, as ``theta``; a chain's depends on the seed and the chain's number alone."""
        vectors = [
            torch.randn(self.theta.shape[-1], generator=derived_generator(seed, "probe", number))
            for number in self.chains.numbers
        ]
        return torch.stack(vectors).reshape(self.theta.shape).to(self.theta)

    def product(self, batches: list[tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
        """Products with the Hessian on these batches, in the sampler's metric."""

        def gradient(theta: Tensor) -> Tensor:
            total = self.gradient(theta, batches[0])[0].clone()
            for batch in batches[1:]:
                total += self.gradient(theta, batch)[0]
            return total / len(batches)

        return lambda v: self.scaled(hessian_product(gradient, self.theta, self.scaled(v)))

    def scaled(self, vector: Tensor) -> Tensor:
        """``vector`` times the square root of the preconditioner."""
        metric = self.dynamics.metric
        return vector if metric is None else vector * metric.sqrt()

    def largest_curvature(self, seed: int) -> Tensor:
        """Largest curvature ``(...)`` in the sampler's metric, on one batch."""
        return largest_curvature(self.product([self.draw()]), self.random(seed), _NUM_LARGEST)


@dataclass(frozen=True)
class CurvatureSpectrum:
    """Curvatures and gradient noise of a Gaussian, direction by direction or as a quadrature of their spectra.

    :ivar Tensor curvature: lambda ``(..., K)``, positive.
    :ivar Tensor weight: weight of T / lambda in the trace of the covariance, ``(..., K)``.
    :ivar Tensor noise: variance of the mini-batch gradient there, ``(..., K)``; of a quadrature, times the weight.
    :ivar Tensor largest: largest curvature, ``(...)``.
    :ivar bool is_dense: whether each is a direction of its own, to be held to the share by itself.
    """

    curvature: Tensor
    weight: Tensor
    noise: Tensor
    largest: Tensor
    is_dense: bool

    def of_all_chains(self, local: LocalPotential) -> CurvatureSpectrum:
        """Those of all chains of the run."""
        here = (self.curvature, self.weight, self.noise, self.largest)
        curvature, weight, noise, largest = local.of_all_chains(*here)
        return CurvatureSpectrum(curvature, weight, noise, largest, self.is_dense)

    def inflation(self, step_size: float, local: LocalPotential) -> Tensor:
        """Relative excess of the variance, ``(...)``: the largest over directions if dense, else that of the trace."""
        ratio = local.dynamics.variance_ratio
        settings = (local.temperature, local.epoch_length)
        if self.is_dense:
            return ratio(step_size, self.curvature, self.noise, *settings).amax(-1) - 1
        # Curvature and noise are quadratures with nodes of their own: the ratio is linear in the noise.
        quiet = ratio(step_size, self.curvature, torch.zeros_like(self.curvature), *settings)
        heat = ratio(step_size, self.curvature, torch.ones_like(self.curvature), *settings) - quiet
        widened = torch.where(self.weight > 0, self.weight * quiet, 0.0)
        heated = torch.where(self.noise > 0, self.noise * heat, 0.0)
        total = ((widened + heated) / self.curvature).sum(-1) / (self.weight / self.curvature).sum(-1)
        return total.nan_to_num(math.inf) - 1


def measure_spectrum(local: LocalPotential, seed: int) -> CurvatureSpectrum:
    """Curvature and gradient noise at a point: whole for small models, as quadratures of spectra for large ones."""
    return _measure_dense(local) if local.theta.shape[-1] <= MAX_DENSE else _measure_quadratures(local, seed)


def _measure_dense(local: LocalPotential) -> CurvatureSpectrum:
    length = local.epoch_length
    batches = [local.draw() for _ in range(min(length or _NUM_HESSIAN, _NUM_HESSIAN))]
    hessian = dense_hessian(local.product(batches), local.theta)
    values, vectors = torch.linalg.eigh(hessian.nan_to_num(0.0))
    noise_MD = _gradient_noise(local, _NUM_NOISE_DENSE)
    noise = torch.zeros_like(values)
    if noise_MD.dim() > 0:
        noise = torch.einsum("m...d,...dk->m...k", noise_MD, vectors).square().sum(0)
    curvature, largest = _positive(values, values.abs().amax(-1))
    return CurvatureSpectrum(curvature, torch.ones_like(curvature), noise, largest, is_dense=True)


def _measure_quadratures(local: LocalPotential, seed: int) -> CurvatureSpectrum:
    product = local.product([local.draw()])
    probe = local.scaled(local.random(seed))
    seen = lanczos(product, probe, _NUM_SPECTRUM)
    noise_MD = _gradient_noise(local, _NUM_NOISE)
    if noise_MD.dim() == 0:
        curvature, largest = _positive(seen.nodes, seen.largest)
        return CurvatureSpectrum(curvature, seen.weights, torch.zeros_like(curvature), largest, is_dense=False)
    # A random mixture of the batches' deviations has the covariance of their noise.
    mixture = torch.randn(len(noise_MD), generator=derived_generator(seed, "mixture"), dtype=torch.float64)
    vector = (noise_MD.movedim(0, -1) @ mixture).to(local.theta)
    vector = vector * (noise_MD.square().sum((0, -1)).sqrt().to(vector) / vector.norm(dim=-1)).unsqueeze(-1)
    # In the trace over theta, a preconditioner counts once more.
    noisy = lanczos(product, local.scaled(vector), _NUM_SPECTRUM)
    nodes = torch.cat([seen.nodes, noisy.nodes], -1)
    curvature, largest = _positive(nodes, torch.maximum(seen.largest, noisy.largest))
    none_seen, none_noisy = torch.zeros_like(noisy.weights), torch.zeros_like(seen.weights)
    return CurvatureSpectrum(
        curvature,
        torch.cat([seen.weights, none_seen], -1),
        torch.cat([none_noisy, noisy.weights], -1),
        largest,
        is_dense=False,
    )


def _gradient_noise(local: LocalPotential, num_batches: int) -> Tensor:
    """Deviations of batch gradients from their mean ``(M, ..., D)``, scaled so that their squares sum to the variance.

    A scalar 0 where every batch is all the data.
    """
    length = local.epoch_length
    if length == 1:
        return torch.zeros(())
    gradients = [local.scaled(local.gradient(local.theta, local.draw())[0]).double().cpu() for _ in range(num_batches)]
    stacked = torch.stack(gradients)
    # Of one epoch's batches, which cancel, the sample variance is too large by k / (k - 1).
    share = 1.0 if length is None or length < num_batches else (length - 1) / length
    return (stacked - stacked.mean(0)) * math.sqrt(share / (num_batches - 1))


def _positive(curvature: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute curvatures, at least a millionth of the largest: where U is concave, no Gaussian approximates it."""
    largest = torch.where(largest == 0, 1e-12, largest)  # nan stays
    return torch.maximum(curvature.abs(), 1e-6 * largest.unsqueeze(-1)), largest
