# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Generators of files of format version 2, which are drawn from but no longer fitted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.generators.base import (
    LARGEST_LATENT,
    Generator,
    check_in_order,
    check_sizes,
    is_entry,
    linear_bound,
    peak,
    stratified,
)
from pyro_apd.generators.precision import SCALE_SUFFIX
from pyro_apd.runtime import checks

# More chunks than these, on average so long, would make drawing slow.
_MAX_CHUNKS, _MIN_MEAN_CHUNK = 16384, 1024
# Latent entries from which all noise of a draw is made, where it is made with the draw.
_NOISE_LATENTS = 2
_SCALE, _INT8_PEAK = "basis" + SCALE_SUFFIX, 128.0


class MixtureGenerator(Generator):
    """A mixture of normal distributions in principal coordinates of weight space; subclasses map these to weights.

    The first latent entry, by its quantile, chooses the mode. The next R are multiplied by the root of a covariance
    that neighbouring modes share, added to the mode's mean, and corrected by a perceptron.

    :param int output_size: D, numbers of a draw.
    :param int rank: R, number of principal coordinates.
    :param int num_modes: M.
    :param noise: matrices of weights with noise, ``(start, rows, columns, rank)`` each.
    :param int num_scales: covariances, each shared by as many successive modes; by default one per mode.
    :param int bend: hidden units of the perceptron; 0 for none.
    :raises ValueError: if sizes are not positive, or matrices do not fit into a draw, overlap or are not in order.
    """

    def __init__(
        self,
        output_size: int,
        rank: int,
        num_modes: int,
        noise: Sequence[Sequence[int]],
        num_scales: int | None,
        bend: int,
    ) -> None:
        super().__init__()
        num_scales = num_modes if num_scales is None else num_scales
        check_sizes(output_size=output_size, rank=rank, num_modes=num_modes, num_scales=num_scales)
        width = checks.integer("Generator setting bend", bend, at_least=0)
        for entry in noise:
            if not is_entry(entry, smallest=(0, 1, 1, 1)) or entry[3] > entry[2]:
                raise ValueError(
                    f"A block of noise must be (start, rows, columns, rank), rank <= columns; got {entry!r:.80}."
                )
        self.output_size, self.rank, self.num_modes = output_size, rank, num_modes
        self.location = nn.Parameter(torch.zeros(output_size))
        self.mode_location = nn.Parameter(torch.zeros(num_modes, rank))
        self.mode_scale = nn.Parameter(torch.zeros(num_scales, rank, rank))
        self.bend = _perceptron(rank, width) if width else None
        self._width = width
        self.noise = nn.ModuleList(MatrixNoise(*entry) for entry in noise)
        modules = self.noise_modules()
        check_in_order([(module.span, module.entry) for module in modules], "Blocks")
        if modules and modules[-1].span.stop > output_size:
            raise ValueError(f"Block {modules[-1].entry} of noise reaches beyond the {output_size} numbers of a draw.")

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        noise = [list(module.entry) for module in self.noise_modules()]
        return {
            "output_size": self.output_size,
            "rank": self.rank,
            "num_modes": self.num_modes,
            "num_scales": len(self.mode_scale),
            "bend": self._width,
            **({"noise": noise} if noise else {}),
        }

    def latents(self, count: int, like: Tensor) -> Tensor:
        """See :class:`Generator`; evenly spread over modes and along chains, in random order."""
        return stratified(super().latents(count, like))

    def coordinates(self, latent_SL: Tensor) -> Tensor:
        """Principal coordinates ``(S, R)`` of the draws."""
        latent_SL = latent_SL[:, : 1 + self.rank]
        quantile_S = torch.special.ndtr(latent_SL[:, 0])
        mode_S = (quantile_S * self.num_modes).long().clamp(max=self.num_modes - 1)
        scale_S = (mode_S * len(self.mode_scale)).div(self.num_modes, rounding_mode="floor")
        # One product with all covariances, of which each draw takes its own: cheaper than a matrix per draw.
        gaussian_SKR = torch.einsum("krq,sq->skr", self.mode_scale, latent_SL[:, 1:])
        index_S1R = scale_S[:, None, None].expand(-1, 1, self.rank)
        coordinates_SR = self.mode_location[mode_S] + gaussian_SKR.gather(1, index_S1R).squeeze(1)
        return coordinates_SR if self.bend is None else coordinates_SR + self.bend(coordinates_SR)

    def bound(self) -> float:
        """See :class:`Generator`."""
        coordinate = peak(self.mode_location) + LARGEST_LATENT * self.rank * peak(self.mode_scale)
        correction = coordinate if self.bend is not None else 0.0
        for layer in self.bend or ():
            if isinstance(layer, nn.Linear):
                correction = linear_bound(layer, correction)
        noise = max((module.bound() for module in self.noise_modules()), default=0.0)
        return peak(self.location) + self.rank * (coordinate + correction) * self.basis_peak() + noise

    @abstractmethod
    def basis_peak(self) -> float:
        """The largest absolute value in the basis."""

    def noise_modules(self) -> list[MatrixNoise]:
        """Those of the matrices of weights, in order."""
        return [module for module in self.noise if isinstance(module, MatrixNoise)]


class CoordinateGenerator(MixtureGenerator):
    """Location plus coordinates times a basis, plus noise whose latents follow those of the coordinates.

    Parameters as of :class:`MixtureGenerator`; ``width`` is 0 in all files.
    """

    def __init__(
        self,
        output_size: int,
        rank: int,
        num_modes: int = 1,
        noise: Sequence[Sequence[int]] = (),
        num_scales: int | None = None,
        bend: int = 0,
        width: int = 0,
    ) -> None:
        if width != 0:
            raise ValueError("Generators with width > 0 are no longer supported; distil the posterior again.")
        super().__init__(output_size, rank, num_modes, noise, num_scales, bend)
        self.basis = nn.Parameter(torch.zeros(rank, output_size))
        self.latent_size = 1 + rank + sum(module.size for module in self.noise_modules())

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {"kind": "coordinates", **super().config}

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        theta_SD = torch.addmm(self.location, self.coordinates(latent_SL), self.basis)
        start = 1 + self.rank
        for module in self.noise_modules():
            theta_SD[:, module.span] += module(latent_SL[:, start : start + module.size])
            start += module.size
        return theta_SD

    def basis_peak(self) -> float:
        """See :class:`MixtureGenerator`."""
        return peak(self.basis)


class ChunkedGenerator(MixtureGenerator):
    """The same with a basis in ``int8``, a scale per row and chunk, and noise of which the last two latent entries are
    the seed. A draw is a smooth function of the other entries, but not of these two.

    Parameters as of :class:`MixtureGenerator`.

    :param chunks: lengths of the chunks, which add up to D. Each block of noise begins and ends where a chunk does.
    """

    basis: Tensor

    def __init__(
        self,
        output_size: int,
        rank: int,
        chunks: Sequence[int],
        num_modes: int = 1,
        noise: Sequence[Sequence[int]] = (),
        num_scales: int | None = None,
        bend: int = 0,
    ) -> None:
        super().__init__(output_size, rank, num_modes, noise, num_scales, bend)
        if len(chunks) > _MAX_CHUNKS + output_size // _MIN_MEAN_CHUNK:
            raise ValueError(
                f"Generator setting chunks has {len(chunks):,} entries, too many for {output_size:,} numbers."
            )
        for length in chunks:
            check_sizes(chunk=length)
        if sum(chunks) != output_size:
            raise ValueError(f"Generator setting chunks adds up to {sum(chunks)}, not to output_size={output_size}.")
        edges = list(accumulate(chunks, initial=0))
        self._chunks = [slice(start, stop) for start, stop in pairwise(edges)]
        for module in self.noise_modules():
            if not {module.span.start, module.span.stop} <= set(edges):
                raise ValueError(f"Block {module.entry} of noise does not begin and end with chunks.")
        self.latent_size = 1 + rank + (_NOISE_LATENTS if noise else 0)
        self.register_buffer("basis", torch.zeros(rank, output_size, dtype=torch.int8))
        self.register_buffer(_SCALE, torch.zeros(rank, len(self._chunks)))

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {"kind": "chunked", **super().config, "chunks": [chunk.stop - chunk.start for chunk in self._chunks]}

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        coordinates_SR, scale_RK = self.coordinates(latent_SL), self.get_buffer(_SCALE)
        theta_SD = coordinates_SR.new_empty(len(latent_SL), self.output_size)
        for k, chunk in enumerate(self._chunks):
            part_RW = self.basis[:, chunk].to(scale_RK.dtype) * scale_RK[:, k : k + 1]
            theta_SD[:, chunk] = torch.addmm(self.location[chunk], coordinates_SR, part_RW)
        for draw, seed in enumerate(_seeds(latent_SL[:, -_NOISE_LATENTS:]) if self.noise else ()):
            generator = torch.Generator(device=theta_SD.device).manual_seed(seed)
            for module in self.noise_modules():
                normal_1B = theta_SD.detach().new_empty(1, module.size).normal_(generator=generator)
                theta_SD[draw : draw + 1, module.span] += module(normal_1B)
        return theta_SD

    def basis_peak(self) -> float:
        """See :class:`MixtureGenerator`."""
        return _INT8_PEAK * peak(self.get_buffer(_SCALE))


class MatrixNoise(nn.Module):
    """Normal noise on a matrix of weights, ``rows * (E - damping * (E @ Q.T) @ Q) * columns``; E is standard normal.

    :param int start: first entry of the matrix in a draw.
    :param int rank: number of directions, the rows of Q.
    :ivar int size: its numbers.
    """

    def __init__(self, start: int, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.entry = (start, rows, columns, rank)
        self.size = rows * columns
        self.span = slice(start, start + self.size)
        self.row_scale = nn.Parameter(torch.ones(rows))
        self.column_scale = nn.Parameter(torch.zeros(columns))
        self.directions = nn.Parameter(torch.zeros(rank, columns))
        self.damping = nn.Parameter(torch.zeros(rank))

    def forward(self, latent_SB: Tensor) -> Tensor:
        """Noise ``(S, rows * columns)`` from latents of the same shape."""
        latent_SOI = latent_SB.unflatten(-1, (len(self.row_scale), len(self.column_scale)))
        along_SOK = latent_SOI @ self.directions.mT
        noise_SOI = (latent_SOI - (along_SOK * self.damping) @ self.directions) * self.column_scale
        noise_SB: Tensor = (noise_SOI * self.row_scale.unsqueeze(-1)).flatten(-2)
        return noise_SB

    def bound(self) -> float:
        """See :meth:`~pyro_apd.generators.base.Generator.bound`."""
        along = len(self.column_scale) * peak(self.directions)
        within = 1 + len(self.damping) * along * peak(self.damping) * peak(self.directions)
        return LARGEST_LATENT * within * peak(self.column_scale) * peak(self.row_scale)


def _perceptron(size: int, width: int) -> nn.Sequential:
    """A map from ``size`` numbers to as many."""
    return nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size))


def _seeds(latent_SN: Tensor) -> list[int]:
    """A seed per draw, from the bits of two numbers of its latent."""
    # Seeds are set on the host: two numbers per draw are copied, and a GPU is waited for once per call.
    bits_SN = latent_SN.detach().to("cpu", torch.float32).contiguous().view(torch.int32).to(torch.int64)
    # Mixed, since torch's generator takes the lower half of a seed.
    mixed_S = (bits_SN[:, 0] * 0x9E3779B1 + bits_SN[:, 1] * 0x85EBCA6B) & 0x7FFFFFFFFFFFFFFF
    return [int(seed) ^ int(seed) >> 32 for seed in mixed_S]
