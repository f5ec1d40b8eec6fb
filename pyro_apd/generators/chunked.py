# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The generator for large networks: the same distribution, with the basis in eight bits and decoded in chunks.

Two things grow with the network: the basis, which has one number per coordinate and weight, and the noise of a draw,
which has one number per weight. The basis is kept in memory as in the file, and decoded a few thousand columns at a
time. The noise is made with the draw, from two numbers of its latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_apd.generators import precision
from pyro_apd.generators.base import Generator, check_sizes, peak
from pyro_apd.generators.draw_blocks import DrawBlocks, draws_per_block
from pyro_apd.generators.network import GaussianFit, MixtureGenerator
from pyro_apd.generators.residual import Block, MatrixNoise

# Columns of a chunk, at most: decoded, a chunk fits into the caches of a CPU.
_CHUNK = 16384
# More chunks than these, on average so long, would make drawing slow. Sites of a few numbers have a chunk each.
_MAX_CHUNKS, _MIN_MEAN_CHUNK = 16384, 1024
# Draws to whose residuals noise is fitted: enough for this many rows per column, within these bounds.
_ROWS_PER_COLUMN, _MIN_RESIDUALS, _MAX_RESIDUALS = 16, 16, 64
# Latent entries from which all noise of a draw is made.
_NOISE_LATENTS = 2


class ChunkedGenerator(MixtureGenerator):
    """:class:`CoordinateGenerator` for networks of a million weights and more.

    Coordinates, noise and trained parameters are those of :class:`CoordinateGenerator`. The basis is an ``int8`` matrix
    with a scale per row and chunk, so that layers whose weights vary by different amounts do not share a scale. It is
    decoded chunk by chunk, for draws and for gradients, so that neither memory nor file ever hold it in ``float32``.
    Noise comes from a random number generator that the last two latent entries seed: a latent has ``rank + 3`` numbers
    for any size of the network. A draw is a smooth function of the other entries, but not of these two. Cost: about
    ``rank / 4 + 1`` networks in ``float32``.

    :param int output_size: D, numbers of a draw.
    :param int rank: R, number of principal coordinates.
    :param chunks: lengths of the chunks, which add up to D.
    :param int num_modes: M.
    :param noise: blocks with noise of their own, ``(start, rows, columns, rank)`` each; each begins and ends where a
        chunk does.
    :param int num_scales: covariances, each shared by as many successive modes; by default one per mode.
    :param int mlp_width: hidden units of the perceptron; 0 for none.
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
        mlp_width: int = 0,
    ) -> None:
        super().__init__(output_size, rank, num_modes, num_scales, mlp_width)
        if len(chunks) > _MAX_CHUNKS + output_size // _MIN_MEAN_CHUNK:
            raise ValueError(
                f"Generator setting chunks has {len(chunks):,} entries, too many for {output_size:,} numbers."
            )
        for length in chunks:
            check_sizes(chunk=length)
        if sum(chunks) != output_size:
            raise ValueError(f"Generator setting chunks adds up to {sum(chunks)}, not to output_size={output_size}.")
        self._chunks = _spans(chunks)
        blocks = Block.all_checked(noise, output_size)
        edges = {span.start for span in self._chunks} | {output_size}
        for block in blocks:
            if not {block.span.start, block.span.stop} <= edges:
                raise ValueError(f"Block {block.entry} of noise does not begin and end with chunks.")
        self.noise.extend(MatrixNoise(block) for block in blocks)
        self.latent_size = 1 + rank + (_NOISE_LATENTS if blocks else 0)
        self.register_buffer("basis", torch.zeros(rank, output_size, dtype=torch.int8))
        self.register_buffer(_SCALE, torch.zeros(rank, len(self._chunks)))

    @classmethod
    def fit(
        cls,
        theta_CSD: Tensor | DrawBlocks,
        rank: int,
        segment_length: int | None = None,
        noise: Sequence[Block] = (),
        mlp_width: int = 32,
        sizes: Sequence[int] | None = None,
    ) -> ChunkedGenerator:
        """As :meth:`CoordinateGenerator.fit`, in the weights' own units from the start.

        :param sizes: numbers of each site of a draw, in order; no chunk reaches from one site into the next.
        """
        draws = theta_CSD if isinstance(theta_CSD, DrawBlocks) else DrawBlocks(theta_CSD)
        fit = GaussianFit.of(draws, rank, segment_length)
        num_chains, num_segments, rank = fit.means_CMR.shape
        size = draws.shape[2]
        chunks = _lengths((size,) if sizes is None else sizes, min(_CHUNK, draws.width))
        entries = [block.entry for block in noise]
        generator = cls(size, rank, chunks, num_chains * num_segments, entries, num_chains, mlp_width)
        generator = generator.to(fit.means_CMR)
        with torch.no_grad():
            generator.location.copy_(fit.principal.location_D * fit.divisor_D + fit.shift_D)
            scale_RK = generator.get_buffer(_SCALE)
            for k, (span, part_RW) in enumerate(fit.principal.basis_parts(generator._chunks)):
                generator.basis[:, span], scale_RK[:, k] = precision.to_int8(part_RW * fit.divisor_D[span])
            generator._fit_modes(fit)
            generator._fit_noise(draws, fit.principal.coordinates_SR)
            for module in generator._noise_modules():
                module.fold()
        return generator

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        chunks = [span.stop - span.start for span in self._chunks]
        return {"kind": "chunked", **self._mixture_config, "chunks": chunks}

    def expanded(self, coordinates_SR: Tensor, span: slice) -> Tensor:
        """See :class:`MixtureGenerator`; ``span`` begins and ends with chunks."""
        part_SW: Tensor = _Expansion.apply(coordinates_SR, self, span)  # type: ignore[no-untyped-call]
        return part_SW

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        theta_SD = self.expanded(self.coordinates(latent_SL), slice(0, self.output_size))
        if not self.noise:
            return theta_SD
        seeds = _seeds(latent_SL[:, -_NOISE_LATENTS:])
        # With gradients the caller asks for few draws at a time; without them it may ask for all at once.
        length = len(seeds) if torch.is_grad_enabled() else draws_per_block(self.output_size * theta_SD.element_size())
        for start in range(0, len(seeds), length):
            block = slice(start, min(start + length, len(seeds)))
            generators = [torch.Generator(device=theta_SD.device).manual_seed(seed) for seed in seeds[block]]
            for module in self._noise_modules():
                size = module.block.latent_size
                noise_SB = torch.stack([_normal(size, theta_SD, generator) for generator in generators])
                theta_SD[block, module.block.span] += module(noise_SB)
        return theta_SD

    @torch.no_grad()
    def projected(self, theta_SD: Tensor) -> Tensor:
        """Coordinates ``(S, R)`` whose expansion is nearest to draws ``(S, D)``."""
        gram_RR = torch.zeros(self.rank, self.rank, dtype=torch.float64, device=theta_SD.device)
        product_SR = gram_RR.new_zeros(len(theta_SD), self.rank)
        for k, span in enumerate(self._chunks):
            part_RW = self._decoded(k)
            gram_RR += part_RW @ part_RW.mT
            product_SR += (theta_SD[:, span] - self.location[span]) @ part_RW.mT
        coordinates_SR: Tensor = product_SR @ torch.linalg.pinv(gram_RR, hermitian=True)
        return coordinates_SR.to(theta_SD)

    def _basis_peak(self) -> float:
        return _INT8_PEAK * peak(self.get_buffer(_SCALE))

    def _num_residuals(self, block: Block) -> int:
        """See :class:`MixtureGenerator`; with many rows, few draws suffice to estimate the scales of columns."""
        return min(_MAX_RESIDUALS, max(_MIN_RESIDUALS, _ROWS_PER_COLUMN * block.columns // block.rows))

    def _decoded(self, k: int) -> Tensor:
        """Chunk ``k`` of the basis, ``(R, W)``."""
        scale_RK = self.get_buffer(_SCALE)
        part_RW: Tensor = self.basis[:, self._chunks[k]].to(scale_RK.dtype) * scale_RK[:, k : k + 1]
        return part_RW

    def _within(self, span: slice) -> range:
        """Indices of the chunks that make up ``span``."""
        inside = [k for k, chunk in enumerate(self._chunks) if span.start <= chunk.start and chunk.stop <= span.stop]
        return range(inside[0], inside[-1] + 1)


class CoordinatesAlone(Generator):
    """Gives the coordinates of a generator in place of its draws. It shares its parameters, so that training one trains
    both."""

    def __init__(self, generator: MixtureGenerator) -> None:
        super().__init__()
        self.generator = generator
        self.latent_size = generator.latent_size
        self.output_size = generator.rank

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return self.generator.config

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        return self.generator.coordinates(latent_SL)

    def latents(self, count: int, like: Tensor) -> Tensor:
        """See :class:`Generator`."""
        return self.generator.latents(count, like)


_INT8_PEAK = 128.0
_SCALE = "basis" + precision.SCALE_SUFFIX


class _Expansion(torch.autograd.Function):
    """Location plus coordinates times the basis, chunk by chunk; only the coordinates have a gradient."""

    @staticmethod
    def forward(ctx: Any, coordinates_SR: Tensor, generator: ChunkedGenerator, span: slice) -> Tensor:
        ctx.generator, ctx.span = generator, span
        part_SW = coordinates_SR.new_empty(len(coordinates_SR), span.stop - span.start)
        for k in generator._within(span):
            chunk = generator._chunks[k]
            inner = slice(chunk.start - span.start, chunk.stop - span.start)
            # With out=, the product is not copied.
            torch.addmm(generator.location[chunk], coordinates_SR, generator._decoded(k), out=part_SW[:, inner])
        return part_SW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer_SW: Tensor) -> tuple[Tensor, None, None]:
        generator, span = ctx.generator, ctx.span
        gradient_SR = outer_SW.new_zeros(len(outer_SW), generator.rank)
        for k in generator._within(span):
            chunk = generator._chunks[k]
            inner = slice(chunk.start - span.start, chunk.stop - span.start)
            gradient_SR.addmm_(outer_SW[:, inner], generator._decoded(k).mT)
        return gradient_SR, None, None


def _spans(lengths: Sequence[int]) -> list[slice]:
    spans, start = [], 0
    for length in lengths:
        spans.append(slice(start, start + length))
        start += length
    return spans


def _lengths(sizes: Sequence[int], longest: int) -> list[int]:
    """Lengths of chunks of at most ``longest``, none of which reaches from one of ``sizes`` into the next."""
    lengths = []
    for size in sizes:
        count = -(-size // longest)
        lengths += [size // count + (i < size % count) for i in range(count)]
    return lengths


def _seeds(latent_SN: Tensor) -> list[int]:
    """A seed per draw, from the bits of two numbers of its latent."""
    # Seeds are set on the host: two numbers per draw are copied, and a GPU is waited for once per call.
    bits_SN = latent_SN.detach().to("cpu", torch.float32).contiguous().view(torch.int32).to(torch.int64)
    # Mixed, since torch's generator takes the lower half of a seed.
    mixed_S = (bits_SN[:, 0] * 0x9E3779B1 + bits_SN[:, 1] * 0x85EBCA6B) & 0x7FFFFFFFFFFFFFFF
    return [int(seed) ^ int(seed) >> 32 for seed in mixed_S]


def _normal(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device).normal_(generator=generator)
