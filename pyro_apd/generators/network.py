# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The default generator: from a latent to principal coordinates to weights, starting at the Gaussian fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.generators.base import LARGEST_LATENT, Generator, check_sizes, linear_bound, peak
from pyro_apd.generators.coordinates import PrincipalCoordinates, principal_coordinates
from pyro_apd.generators.draw_blocks import DrawBlocks, draws_per_block
from pyro_apd.generators.residual import Block, MatrixNoise
from pyro_apd.runtime import checks

# Draws, of all chains together, to whose residuals the noise is fitted.
_NUM_RESIDUALS = 64


class MixtureGenerator(Generator):
    """A mixture of Gaussians along chains in principal coordinates; subclasses map these to weights.

    The first latent entry, by its quantile, chooses the mode, so that the choice is part of the latent. The next
    ``rank`` entries are multiplied by the root of a covariance that neighbouring modes share, added to the mode's mean,
    and corrected by a perceptron (MLP) that starts at zero. The draws of a network's chain lie along a path, which one
    Gaussian in many coordinates cannot represent; each mode represents one segment of a chain.

    Parameters as of :class:`CoordinateGenerator`.
    """

    def __init__(self, output_size: int, rank: int, num_modes: int, num_scales: int | None, mlp_width: int) -> None:
        super().__init__()
        num_scales = num_modes if num_scales is None else num_scales
        check_sizes(output_size=output_size, rank=rank, num_modes=num_modes, num_scales=num_scales)
        self.output_size = output_size
        self.rank = rank
        self.num_modes = num_modes
        self.mlp_width = checks.integer("Generator setting mlp_width", mlp_width, at_least=0)
        self.location = nn.Parameter(torch.zeros(output_size))
        self.mode_location = nn.Parameter(torch.zeros(num_modes, rank))
        self.mode_scale = nn.Parameter(torch.zeros(num_scales, rank, rank))
        # Files name its tensors after this attribute.
        self.bend = _perceptron(rank, mlp_width) if mlp_width else None
        self.noise = nn.ModuleList()
        self._unit_D: Tensor | None = None

    @property
    def _mixture_config(self) -> dict[str, Any]:
        noise = [list(module.block.entry) for module in self._noise_modules()]
        return {
            "output_size": self.output_size,
            "rank": self.rank,
            "num_modes": self.num_modes,
            "num_scales": len(self.mode_scale),
            "bend": self.mlp_width,  # the name in files
            **({"noise": noise} if noise else {}),
        }

    def mode(self, latent_SL: Tensor) -> Tensor:
        """Index ``(S,)`` of the mode that each latent belongs to; all modes are equally likely."""
        quantile_S = torch.special.ndtr(latent_SL[:, 0])
        mode_S: Tensor = (quantile_S * self.num_modes).long().clamp(max=self.num_modes - 1)
        return mode_S

    def latents(self, count: int, like: Tensor) -> Tensor:
        """See :class:`Generator`; evenly spread over modes and along chains, in random order."""
        latent_SL = super().latents(count, like)
        order_S = torch.randperm(count, device=like.device)
        place_S = order_S + torch.rand(count, dtype=like.dtype, device=like.device)
        quantile_S = (place_S / count + torch.rand((), dtype=like.dtype, device=like.device)) % 1.0
        # Without the ends, whose quantiles are infinite.
        latent_SL[:, 0] = torch.special.ndtri(quantile_S.clamp(1e-6, 1 - 1e-6))
        return latent_SL

    def coordinates(self, latent_SL: Tensor) -> Tensor:
        """Principal coordinates ``(S, R)`` of the draws."""
        latent_SL = latent_SL[:, : 1 + self.rank]
        mode_S = self.mode(latent_SL)
        scale_S = (mode_S * len(self.mode_scale)).div(self.num_modes, rounding_mode="floor")
        # One product with all covariances, of which each draw takes its own: cheaper than a matrix per draw.
        gaussian_SKR = torch.einsum("krq,sq->skr", self.mode_scale, latent_SL[:, 1:])
        index_S1R = scale_S[:, None, None].expand(-1, 1, self.rank)
        coordinates_SR = self.mode_location[mode_S] + gaussian_SKR.gather(1, index_S1R).squeeze(1)
        if self.bend is not None:
            coordinates_SR = coordinates_SR + self.bend(coordinates_SR)
        return coordinates_SR

    def bound(self) -> float:
        """See :class:`Generator`."""
        coordinate = peak(self.mode_location) + LARGEST_LATENT * self.rank * peak(self.mode_scale)
        if self.bend is not None:
            correction = coordinate
            for layer in self.bend:
                if isinstance(layer, nn.Linear):
                    correction = linear_bound(layer, correction)
            coordinate += correction
        unit = 1.0 if self._unit_D is None else peak(self._unit_D)
        noise = max((module.bound() for module in self._noise_modules()), default=0.0)
        return unit * (peak(self.location) + self.rank * coordinate * self._basis_peak()) + noise

    @abstractmethod
    def _basis_peak(self) -> float:
        """The largest absolute value in the basis."""

    @abstractmethod
    def expanded(self, coordinates_SR: Tensor, span: slice) -> Tensor:
        """Entries ``span`` of the draws without noise, ``(S, W)``."""

    @torch.no_grad()
    def _fit_modes(self, fit: GaussianFit) -> None:
        self.mode_location.copy_(fit.means_CMR.flatten(0, 1))
        self.mode_scale.copy_(_square_root(fit.deviations_CSR.mT @ fit.deviations_CSR / fit.deviations_CSR.shape[1]))

    @torch.no_grad()
    def _fit_noise(self, draws: DrawBlocks, coordinates_SR: Tensor) -> None:
        if not self.noise:
            return
        length = draws_per_block(self.output_size * draws.dtype.itemsize)
        for module in self._noise_modules():
            span = module.block.span
            step = max(1, len(draws) // self._num_residuals(module.block))
            row_N = torch.arange(0, len(draws), step, device=draws.device)

            def residuals(span: slice = span, row_N: Tensor = row_N) -> Iterator[Tensor]:
                for part_N in row_N.split(length):
                    yield draws.part(part_N, span) - self.expanded(coordinates_SR[part_N], span)

            module.fit(residuals)

    def _num_residuals(self, block: Block) -> int:
        """Number of draws to whose residuals the noise of a block is fitted."""
        return _NUM_RESIDUALS

    @torch.no_grad()
    def scale_noise(self, factor: float) -> None:
        """Multiplies the scale of all noise by ``factor``."""
        for module in self._noise_modules():
            module.row_scale.mul_(factor)

    def _noise_modules(self) -> list[MatrixNoise]:
        return [module for module in self.noise if isinstance(module, MatrixNoise)]


class CoordinateGenerator(MixtureGenerator):
    """A mixture of Gaussians along chains in principal coordinates, plus structured noise on matrices of weights.

    Latents are those of the mixture (see :class:`MixtureGenerator`), then standard normal noise. Cost: about
    ``rank + 1`` networks.

    :param int output_size: D, numbers of a draw.
    :param int rank: R, number of principal coordinates.
    :param int num_modes: M.
    :param noise: blocks with noise of their own, ``(start, rows, columns, rank)`` each.
    :param int num_scales: covariances, each shared by as many successive modes; by default one per mode.
    :param int mlp_width: hidden units of the perceptron; 0 for none.
    """

    def __init__(
        self,
        output_size: int,
        rank: int,
        num_modes: int = 1,
        noise: Sequence[Sequence[int]] = (),
        num_scales: int | None = None,
        mlp_width: int = 0,
    ) -> None:
        super().__init__(output_size, rank, num_modes, num_scales, mlp_width)
        blocks = Block.all_checked(noise, output_size)
        self.basis = nn.Parameter(torch.zeros(rank, output_size))
        self.noise.extend(MatrixNoise(block) for block in blocks)
        self.latent_size = 1 + rank + sum(block.latent_size for block in blocks)

    @classmethod
    def fit(
        cls,
        theta_CSD: Tensor | DrawBlocks,
        rank: int,
        segment_length: int | None = None,
        noise: Sequence[Block] = (),
        mlp_width: int = 32,
    ) -> CoordinateGenerator:
        """The generator that draws from the Gaussian fit of each segment of each chain, in coordinates common to all.

        Directions are principal in units of each weight's standard deviation, and so are location and basis until
        :meth:`fold`: one learning rate then suits all weights. In the span of the basis, mean and covariance are those
        of all draws; the noise represents what the draws have outside of that span.

        :param theta_CSD: draws by chain, as a tensor or in blocks.
        :param int rank: largest number of coordinates; fewer where the draws vary in fewer directions.
        :param int segment_length: successive draws that make a segment, which is one mode; by default a whole chain.
            The covariance is that of the draws of a chain around the means of their segments.
        :param noise: matrices of weights with noise.
        :raises ValueError: if all draws are the same.
        """
        draws = theta_CSD if isinstance(theta_CSD, DrawBlocks) else DrawBlocks(theta_CSD)
        fit = GaussianFit.of(draws, rank, segment_length)
        basis_RD = fit.principal.basis_RD
        num_chains, num_segments, rank = fit.means_CMR.shape
        entries = [block.entry for block in noise]
        num_modes = num_chains * num_segments
        generator = cls(draws.shape[2], rank, num_modes, entries, num_chains, mlp_width).to(basis_RD)
        with torch.no_grad():
            generator.location.copy_(fit.principal.location_D + fit.shift_D / fit.divisor_D)
            generator.basis = nn.Parameter(basis_RD)
            generator._unit_D = fit.divisor_D
            generator._fit_modes(fit)
            generator._fit_noise(draws, fit.principal.coordinates_SR)
        return generator

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {"kind": "coordinates", **self._mixture_config}

    def expanded(self, coordinates_SR: Tensor, span: slice) -> Tensor:
        """See :class:`MixtureGenerator`."""
        part_SW = torch.addmm(self.location[span], coordinates_SR, self.basis[:, span])
        return part_SW if self._unit_D is None else part_SW * self._unit_D[span]

    def _basis_peak(self) -> float:
        return peak(self.basis)

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        theta_SD = self.expanded(self.coordinates(latent_SL), slice(None))
        start = 1 + self.rank
        for module in self._noise_modules():
            stop = start + module.block.latent_size
            theta_SD[:, module.block.span] += module(latent_SL[:, start:stop])
            start = stop
        return theta_SD

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies the units that :meth:`fit` keeps apart into location, basis and noise."""
        if self._unit_D is not None:
            self.location.mul_(self._unit_D)
            self.basis.mul_(self._unit_D)
            self._unit_D = None
        for module in self._noise_modules():
            module.fold()


@dataclass(frozen=True)
class GaussianFit:
    """Draws in principal coordinates, in units of each weight's standard deviation, and their segments.

    :ivar PrincipalCoordinates principal: of the draws less ``shift_D``, divided by ``divisor_D``.
    :ivar Tensor means_CMR: means of the segments of each chain.
    :ivar Tensor deviations_CSR: draws less the means of their segments.
    """

    principal: PrincipalCoordinates
    shift_D: Tensor
    divisor_D: Tensor
    means_CMR: Tensor
    deviations_CSR: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, draws: DrawBlocks, rank: int, segment_length: int | None) -> GaussianFit:
        """Parameters and errors as of :meth:`CoordinateGenerator.fit`."""
        num_chains, num_draws, _ = draws.shape
        num_segments = 1 if segment_length is None else max(1, num_draws // segment_length)
        shift_D, scale_D = draws.moments()
        divisor_D = scale_D.where(scale_D > 0, torch.ones_like(scale_D))
        principal = principal_coordinates(draws.standardised(shift_D, divisor_D), rank)
        coordinates_CSR = principal.coordinates_SR.unflatten(0, (num_chains, num_draws))
        return cls(principal, shift_D, divisor_D, *_segments(coordinates_CSR, num_segments))


def _perceptron(size: int, width: int) -> nn.Sequential:
    """A map from ``size`` numbers to as many, which is zero at the start."""
    last = nn.Linear(width, size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)


def _segments(coordinates_CSR: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means ``(C, count, R)`` of successive segments of each chain, of nearly equal length, and the deviations
    ``(C, S, R)`` of the draws from them."""
    parts = coordinates_CSR.tensor_split(count, dim=1)
    means = [part.mean(1) for part in parts]
    deviations_CSR = torch.cat([part - mean.unsqueeze(1) for part, mean in zip(parts, means, strict=True)], dim=1)
    return torch.stack(means, dim=1), deviations_CSR


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric root, which unlike Cholesky's also exists where a chain moved in fewer directions than R."""
    variance, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * variance.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
    return root
