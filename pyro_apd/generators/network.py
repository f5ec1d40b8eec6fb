# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The generator of our own: from a latent to principal coordinates to weights, starting at the Gaussian fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_apd.generators.coordinates import principal_coordinates
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.residual import Block, MatrixNoise

# Draws, over all chains, whose residuals the noise is fitted to.
_NUM_RESIDUALS = 64


class Generator(nn.Module, ABC):
    """From standard normal latents ``(S, L)`` to unconstrained draws ``(S, D)``; one latent is one network.

    :ivar int latent_size: L.
    :ivar int output_size: D.
    """

    latent_size: int
    output_size: int

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What :func:`~pyro_apd.generators.build_generator` rebuilds the architecture from."""

    @abstractmethod
    def forward(self, latent_SL: Tensor) -> Tensor:
        """Draws ``(S, D)``."""

    def latents(self, count: int, like: Tensor) -> Tensor:
        """Standard normal latents ``(count, L)`` with dtype and device of ``like``, by torch's global generator.

        A batch for training: it may be evener than independent draws are.
        """
        return torch.randn(count, self.latent_size, dtype=like.dtype, device=like.device)


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless all are positive integers."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"Generator setting {name}={size!r} must be a positive integer.")


class CoordinateGenerator(Generator):
    """A mixture of Gaussians over chains in principal coordinates, bent by a small network, plus structured noise.

    The first latent entry, cut into quantiles, chooses the mode (one a chain), so that the choice is part of the
    latent. The next ``rank`` are coloured by that mode's covariance and moved to its mean. A perceptron of these and
    the mode adds what is not Gaussian; its last layer starts at zero, so that step 0 of training is the Gaussian fit.
    The others are noise on matrices of weights. Cost: about ``rank + 1`` networks.

    :param int output_size: D, numbers of a draw.
    :param int rank: R, number of principal coordinates.
    :param int num_modes: C.
    :param int width: hidden units of the perceptron.
    :param noise: blocks with noise of their own, ``(start, rows, columns, rank)`` each.
    """

    def __init__(
        self,
        output_size: int,
        rank: int,
        num_modes: int = 1,
        width: int = 64,
        noise: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        check_sizes(output_size=output_size, rank=rank, num_modes=num_modes, width=width)
        blocks = [Block.checked(entry, output_size) for entry in noise]
        self.output_size, self.rank, self.num_modes, self.width = output_size, rank, num_modes, width
        self.location = nn.Parameter(torch.zeros(output_size))
        self.basis = nn.Parameter(torch.zeros(rank, output_size))
        self.mode_location = nn.Parameter(torch.zeros(num_modes, rank))
        self.mode_scale = nn.Parameter(torch.zeros(num_modes, rank, rank))
        self.residual = nn.Sequential(
            nn.Linear(1 + rank + num_modes, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            last := nn.Linear(width, rank),
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.noise = nn.ModuleList(MatrixNoise(block) for block in blocks)
        self.latent_size = 1 + rank + sum(block.latent_size for block in blocks)
        self._unit_D: Tensor | None = None

    @classmethod
    def fit(
        cls, theta_CSD: Tensor | DrawBlocks, rank: int, width: int = 64, noise: Sequence[Block] = ()
    ) -> CoordinateGenerator:
        """The generator that draws from the Gaussian fit of each chain, in coordinates common to all.

        Directions are principal in units of each weight's standard deviation, and so are location and basis until
        :meth:`fold`: one learning rate then fits all weights. Mean and covariance of the draws in the span of the basis
        are those of all draws together; the noise has what the draws leave outside of that span.

        :param theta_CSD: draws by chain, as a tensor or in blocks.
        :param int rank: largest number of coordinates; fewer where the draws vary in fewer directions.
        :param noise: matrices of weights that are to have noise.
        :raises ValueError: if all draws are the same.
        """
        draws = theta_CSD if isinstance(theta_CSD, DrawBlocks) else DrawBlocks(theta_CSD)
        num_chains, num_draws, size = draws.shape
        shift_D, scale_D = draws.moments()
        divisor_D = scale_D.where(scale_D > 0, torch.ones_like(scale_D))
        principal = principal_coordinates(draws.standardised(shift_D, divisor_D), rank)
        coordinates_CSR = principal.coordinates_SR.unflatten(0, (num_chains, num_draws))
        generator = cls(size, coordinates_CSR.shape[-1], num_chains, width, [block.entry for block in noise])
        generator = generator.to(principal.basis_RD)
        with torch.no_grad():
            generator.location.copy_(principal.location_D + shift_D / divisor_D)
            generator.basis.copy_(principal.basis_RD)
            generator.mode_location.copy_(coordinates_CSR.mean(1))
            centred_CSR = coordinates_CSR - coordinates_CSR.mean(1, keepdim=True)
            generator.mode_scale.copy_(_square_root(centred_CSR.mT @ centred_CSR / num_draws))
            generator._unit_D = divisor_D
            generator._fit_noise(draws, principal.coordinates_SR)
        return generator

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        noise = [list(module.block.entry) for module in self._noise_modules()]
        return {
            "kind": "coordinates",
            "output_size": self.output_size,
            "rank": self.rank,
            "num_modes": self.num_modes,
            "width": self.width,
            **({"noise": noise} if noise else {}),
        }

    def mode(self, latent_SL: Tensor) -> Tensor:
        """Index ``(S,)`` of the mode that each latent belongs to; all modes are equally likely."""
        quantile_S = torch.special.ndtr(latent_SL[:, 0])
        mode_S: Tensor = (quantile_S * self.num_modes).long().clamp(max=self.num_modes - 1)
        return mode_S

    def latents(self, count: int, like: Tensor) -> Tensor:
        """See :class:`Generator`; each mode has as many as any other, up to one."""
        latent_SL = super().latents(count, like)
        first = torch.randint(self.num_modes, (), device=like.device)
        mode_S = (torch.arange(count, device=like.device) + first) % self.num_modes
        # Away from the ends of a mode's quantiles, which rounding might put into the next.
        within_S = torch.rand(count, dtype=like.dtype, device=like.device).clamp(1e-4, 1 - 1e-4)
        latent_SL[:, 0] = torch.special.ndtri((mode_S + within_S) / self.num_modes)
        return latent_SL

    def coordinates(self, latent_SL: Tensor) -> Tensor:
        """Principal coordinates ``(S, R)`` of the draws."""
        latent_SL = latent_SL[:, : 1 + self.rank]
        mode_S = self.mode(latent_SL)
        gaussian_SR = torch.einsum("srq,sq->sr", self.mode_scale[mode_S], latent_SL[:, 1:])
        one_hot_SC = functional.one_hot(mode_S, self.num_modes).to(latent_SL)
        coordinates_SR: Tensor = (
            self.mode_location[mode_S] + gaussian_SR + self.residual(torch.cat([latent_SL, one_hot_SC], dim=-1))
        )
        return coordinates_SR

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        theta_SD = torch.addmm(self.location, self.coordinates(latent_SL), self.basis)
        if self._unit_D is not None:
            theta_SD = theta_SD * self._unit_D
        start = 1 + self.rank
        for module in self._noise_modules():
            stop = start + module.block.latent_size
            theta_SD[:, module.block.span] += module(latent_SL[:, start:stop])
            start = stop
        return theta_SD

    @torch.no_grad()
    def fold(self) -> None:
        """Puts the units in which :meth:`fit` leaves location, basis and noise into these, for good."""
        if self._unit_D is not None:
            self.location.mul_(self._unit_D)
            self.basis.mul_(self._unit_D)
            self._unit_D = None
        for module in self._noise_modules():
            module.fold()

    def _fit_noise(self, draws: DrawBlocks, coordinates_SR: Tensor) -> None:
        if not self.noise or self._unit_D is None:
            return
        row_N = torch.arange(0, len(draws), max(1, len(draws) // _NUM_RESIDUALS), device=draws.device)
        theta_ND = draws[row_N]
        theta_ND -= (self.location + coordinates_SR[row_N] @ self.basis) * self._unit_D
        for module in self._noise_modules():
            module.fit(theta_ND[:, module.block.span])

    def _noise_modules(self) -> list[MatrixNoise]:
        return [module for module in self.noise if isinstance(module, MatrixNoise)]


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric root, which unlike Cholesky's also exists where a chain moved in fewer directions than R."""
    variance, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * variance.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
    return root
