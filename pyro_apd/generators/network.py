# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The generator of our own: from a latent to principal coordinates to weights, starting at the Gaussian fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_apd.generators.coordinates import principal_coordinates
from pyro_apd.generators.draw_blocks import DrawBlocks


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


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless all are positive integers."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"Generator setting {name}={size!r} must be a positive integer.")


class CoordinateGenerator(Generator):
    """A mixture of Gaussians over chains in principal coordinates, bent by a small network.

    The first latent entry, cut into quantiles, chooses the mode (one a chain), so that the choice is part of the
    latent. The others are coloured by that mode's covariance and moved to its mean. A perceptron of the latent and the
    mode adds what is not Gaussian; its last layer starts at zero, so that step 0 of training is the Gaussian fit.
    Cost: about ``rank + 1`` networks.

    :param int output_size: D, numbers of a draw.
    :param int rank: R, number of principal coordinates.
    :param int num_modes: C.
    :param int width: hidden units of the perceptron.
    """

    def __init__(self, output_size: int, rank: int, num_modes: int = 1, width: int = 64) -> None:
        super().__init__()
        check_sizes(output_size=output_size, rank=rank, num_modes=num_modes, width=width)
        self.output_size, self.rank, self.num_modes, self.width = output_size, rank, num_modes, width
        self.latent_size = 1 + rank
        self.location = nn.Parameter(torch.zeros(output_size))
        self.basis = nn.Parameter(torch.zeros(rank, output_size))
        self.mode_location = nn.Parameter(torch.zeros(num_modes, rank))
        self.mode_scale = nn.Parameter(torch.zeros(num_modes, rank, rank))
        self.residual = nn.Sequential(
            nn.Linear(self.latent_size + num_modes, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            last := nn.Linear(width, rank),
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @classmethod
    def fit(cls, theta_CSD: Tensor | DrawBlocks, rank: int, width: int = 64) -> CoordinateGenerator:
        """The generator that draws from the Gaussian fit of each chain, in coordinates common to all.

        Mean and covariance of its draws in the span of the basis are those of all draws together.

        :param theta_CSD: draws by chain, as a tensor or in blocks.
        :param int rank: largest number of coordinates; fewer where the draws vary in fewer directions.
        :raises ValueError: if all draws are the same.
        """
        draws = theta_CSD if isinstance(theta_CSD, DrawBlocks) else DrawBlocks(theta_CSD)
        num_chains, num_draws, size = draws.shape
        principal = principal_coordinates(draws, rank)
        coordinates_CSR = principal.coordinates_SR.unflatten(0, (num_chains, num_draws))
        generator = cls(size, coordinates_CSR.shape[-1], num_chains, width).to(principal.basis_RD)
        with torch.no_grad():
            generator.location.copy_(principal.location_D)
            generator.basis.copy_(principal.basis_RD)
            generator.mode_location.copy_(coordinates_CSR.mean(1))
            centred_CSR = coordinates_CSR - coordinates_CSR.mean(1, keepdim=True)
            generator.mode_scale.copy_(_square_root(centred_CSR.mT @ centred_CSR / num_draws))
        return generator

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {
            "kind": "coordinates",
            "output_size": self.output_size,
            "rank": self.rank,
            "num_modes": self.num_modes,
            "width": self.width,
        }

    def mode(self, latent_SL: Tensor) -> Tensor:
        """Index ``(S,)`` of the mode that each latent belongs to; all modes are equally likely."""
        quantile_S = torch.special.ndtr(latent_SL[:, 0])
        return (quantile_S * self.num_modes).long().clamp(max=self.num_modes - 1)

    def coordinates(self, latent_SL: Tensor) -> Tensor:
        """Principal coordinates ``(S, R)`` of the draws."""
        mode_S = self.mode(latent_SL)
        gaussian_SR = torch.einsum("srq,sq->sr", self.mode_scale[mode_S], latent_SL[:, 1:])
        one_hot_SC = functional.one_hot(mode_S, self.num_modes).to(latent_SL)
        return self.mode_location[mode_S] + gaussian_SR + self.residual(torch.cat([latent_SL, one_hot_SC], dim=-1))

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        return self.location + self.coordinates(latent_SL) @ self.basis

    @torch.no_grad()
    def rescale(self, shift_D: Tensor, scale_D: Tensor) -> None:
        """Makes ``shift + scale * theta`` of what was drawn so far: takes back a standardisation, at no cost."""
        self.location.mul_(scale_D).add_(shift_D)
        self.basis.mul_(scale_D)


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric root, which unlike Cholesky's also exists where a chain moved in fewer directions than R."""
    variance, vectors = torch.linalg.eigh(covariance)
    return vectors * variance.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
