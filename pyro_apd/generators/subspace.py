# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The default generator: what the data determine about the weights exactly, the rest coarsely, in about the bytes of
one network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.generators.base import LARGEST_LATENT, Generator, check_sizes, peak, stratified
from pyro_apd.generators.weight_matrices import WeightMatrix, other_spans
from pyro_apd.runtime import checks

#: The step of means is finer than that of the basis by this factor.
MEAN_STEPS = 2
# Decoded numbers are kept for the next call up to this many per tensor.
_KEPT_NUMBERS = 2**23


class SubspaceGenerator(Generator):
    r"""Weights of each layer in the subspace of its inputs, and what is left.

    The rows of a matrix of weights meet the layer's inputs, and these lie near a subspace of few dimensions. Weights in
    that subspace are *pinned*: the data determine them, and functions depend on them. What is orthogonal to it, the
    *null part*, hardly changes a function near the data. For a matrix with frame :math:`F` ``(K, I)``, whose rows are
    the directions of the subspace, a draw is

    .. math:: W = U + (Z / u - U F^\top) F^{+\top}, \quad Z = m + z B + s \epsilon, \quad U = m_0 + z P + s_0 \epsilon_0

    with pinned coordinates :math:`Z` in units :math:`u` of the layer's outputs, and the null part of :math:`U`. Both
    follow the same coordinates :math:`z`, which have a mode for each segment of a chain, and are normally distributed
    around it. Everything large is held as integers, and all pinned coordinates have one step.

    A latent has the quantile that chooses chain and mode, then R normal numbers for :math:`z`, and those of the noise.

    :param int output_size: D, numbers of a draw.
    :param matrices: ``(start, units, inputs, bias, is_transposed, K)`` each, see :class:`WeightMatrix`; all inputs are
        pinned if K is the number of columns. A seventh integer of 1 gives it an offset, to which all else is added:
        for weights that are many times their deviation. An eighth of 1 gives its columns scales: for some that vary
        far less than others. Numbers outside of matrices are pinned, each in its own unit.
    :param int num_chains: C. Chains have frames in common, and means, bases and modes of their own.
    :param int num_modes: M, per chain.
    :param int rank: R, coordinates.
    :param int path_rank: R0, how many of these the null part follows.
    :raises ValueError: if sizes are not positive, or matrices do not fit into a draw.
    """

    def __init__(
        self,
        output_size: int,
        matrices: Sequence[Sequence[int]],
        num_chains: int,
        num_modes: int,
        rank: int,
        path_rank: int,
    ) -> None:
        super().__init__()
        check_sizes(output_size=output_size, num_chains=num_chains, num_modes=num_modes, rank=rank)
        self.path_rank = checks.integer("Generator setting path_rank", path_rank, at_least=0)
        if self.path_rank > rank:
            raise ValueError(f"Generator setting path_rank is {path_rank}, more than rank, which is {rank}.")
        self.output_size, self.rank = output_size, rank
        self.num_chains, self.num_modes = num_chains, num_modes
        self.step = nn.Parameter(torch.ones(()))
        self.noise_cap = nn.Parameter(torch.ones(()))
        self.modes = nn.Parameter(torch.zeros(num_chains * num_modes, rank))
        self.spread = nn.Parameter(torch.zeros(num_chains, rank))
        self.parts = nn.ModuleList()
        placed = []
        for entry in matrices:
            if len(entry) not in (6, 7, 8):
                raise ValueError(f"A matrix must have six integers, and up to two for its options; got {entry!r:.80}.")
            placed.append(WeightMatrix.checked(entry[:5], output_size))
            self.parts.append(MatrixPart(placed[-1], num_chains, rank, self.path_rank, *entry[5:]))
        for span in other_spans(placed, output_size):
            self.parts.append(EntriesPart(span, num_chains, rank))
        self.latent_size = 1 + rank + sum(part.latent_size for part in self.parts_in_order())

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {
            "kind": "subspace",
            "output_size": self.output_size,
            "matrices": [part.entry for part in self.parts_in_order() if isinstance(part, MatrixPart)],
            "num_chains": self.num_chains,
            "num_modes": self.num_modes,
            "rank": self.rank,
            "path_rank": self.path_rank,
        }

    def latents(self, count: int, like: Tensor) -> Tensor:
        """See :class:`Generator`; evenly spread over chains and along them, in random order."""
        return stratified(super().latents(count, like))

    def coordinates(self, latent_SL: Tensor) -> tuple[Tensor, Tensor]:
        """The chain of each latent as an indicator ``(S, C)``, and its coordinates ``(S, C, R)``: those of the other
        chains are zero, so that products with all of them need no index."""
        place_S = torch.special.ndtr(latent_SL[:, 0]) * (self.num_chains * self.num_modes)
        mode_S = place_S.long().clamp(max=self.num_chains * self.num_modes - 1)
        chain_S = mode_S.div(self.num_modes, rounding_mode="floor")
        coordinates_SR = self.modes[mode_S] + self.spread[chain_S] * latent_SL[:, 1 : 1 + self.rank]
        chain_C = torch.arange(self.num_chains, device=latent_SL.device)
        is_chain_SC = (chain_S.unsqueeze(1) == chain_C).to(coordinates_SR.dtype)
        return is_chain_SC, is_chain_SC.unsqueeze(-1) * coordinates_SR.unsqueeze(1)

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        drawn = self.coordinates(latent_SL)
        theta_SD = latent_SL.new_empty(len(latent_SL), self.output_size)
        start = 1 + self.rank
        for part in self.parts_in_order():
            stop = start + part.latent_size
            part.write(theta_SD, drawn, latent_SL[:, start:stop], self.step, self.noise_cap)
            start = stop
        return theta_SD

    def bound(self) -> float:
        """See :class:`Generator`."""
        coordinate = self.rank * (peak(self.modes) + LARGEST_LATENT * peak(self.spread))
        return max(part.bound(coordinate, self.step) for part in self.parts_in_order())

    def parts_in_order(self) -> list[Part]:
        """Matrices in the order of the settings, then what belongs to none."""
        return [part for part in self.parts if isinstance(part, Part)]


class Part(nn.Module, ABC):
    """Pinned coordinates of some entries of a draw, ``(O, K)`` in units of their effect.

    ``mean`` and ``basis`` are integers; ``reduction`` is what their magnitudes lose, see :mod:`.rounding`.

    :ivar int latent_size: normal numbers that its noise takes.
    :ivar tuple shape: of its weights, ``(O, I)``.
    """

    latent_size: int
    shape: tuple[int, int]
    mean: Tensor
    basis: Tensor

    def __init__(self, num_chains: int, rank: int, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_chains, rows, columns, dtype=torch.int16))
        self.register_buffer("basis", torch.zeros(num_chains * rank, rows, columns, dtype=torch.int16))
        self.reduction = nn.Parameter(torch.zeros(num_chains * rank))
        self.unit = nn.Parameter(torch.ones(columns))
        self.noise_rows = nn.Parameter(torch.zeros(rows))
        self.noise_columns = nn.Parameter(torch.zeros(columns))
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @abstractmethod
    def write(
        self, theta_SD: Tensor, drawn: tuple[Tensor, Tensor], latent_SL: Tensor, step: Tensor, noise_cap: Tensor
    ) -> None:
        """Writes the part's entries of draws.

        :param drawn: indicators of chains ``(S, C)``, and coordinates ``(S, C, R)``.
        :param latent_SL: normal numbers of the part.
        """

    @abstractmethod
    def bound(self, coordinate: float, step: Tensor) -> float:
        """See :meth:`Generator.bound`, for coordinates whose absolute values add up to ``coordinate``."""

    def pinned(
        self, drawn: tuple[Tensor, Tensor], latent_SOK: Tensor, rows: slice, step: Tensor, noise_cap: Tensor
    ) -> Tensor:
        """Pinned coordinates ``(S, O, K)`` of some rows, in units of the weights."""
        is_chain_SC, coordinates_SCR = drawn
        mean_CW = self.mean[:, rows].to(step.dtype).flatten(1) * (step / MEAN_STEPS)
        basis_RW = self.decoded("basis", "reduction", rows, step.dtype)
        values_SW = torch.addmm(is_chain_SC @ mean_CW, coordinates_SCR.flatten(1) * step, basis_RW)
        noise_OK = capped(self.noise_rows[rows].unsqueeze(-1) * self.noise_columns, noise_cap)
        return (values_SW.view_as(latent_SOK) + noise_OK * latent_SOK) / self.unit

    def decoded(self, name: str, reduction: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of integers without their step, ``(R, W)``; those of a small part are kept for the next call."""
        integers: Tensor = getattr(self, name)
        loss_R = getattr(self, reduction).detach().to(dtype)
        key = (name, dtype, integers.device)
        if integers.numel() > _KEPT_NUMBERS:
            return reduced(integers[:, rows].to(dtype), loss_R).flatten(1)
        if key not in self._kept:
            self._kept[key] = reduced(integers.to(dtype), loss_R)
        return self._kept[key][:, rows].flatten(1)

    def forget(self) -> None:
        """Drops decoded numbers, after integers have changed."""
        self._kept.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def _pinned_bound(self, coordinate: float, step: Tensor) -> float:
        value = peak(step) * (peak(self.mean) / MEAN_STEPS + coordinate * (peak(self.basis) + peak(self.reduction)))
        noise = LARGEST_LATENT * peak(self.noise_rows) * peak(self.noise_columns)
        return (value + noise) * peak(1 / self.unit)


class EntriesPart(Part):
    """Entries that belong to no matrix, each in a unit of its own."""

    def __init__(self, span: slice, num_chains: int, rank: int) -> None:
        super().__init__(num_chains, rank, 1, span.stop - span.start)
        # Numbers such as a year may be many times as large as their deviation.
        self.register_buffer("mean", self.mean.to(torch.int32))
        self.span = span
        self.latent_size = span.stop - span.start
        self.shape = (1, self.latent_size)

    def write(
        self, theta_SD: Tensor, drawn: tuple[Tensor, Tensor], latent_SL: Tensor, step: Tensor, noise_cap: Tensor
    ) -> None:
        """See :class:`Part`."""
        values_SOK = self.pinned(drawn, latent_SL.unsqueeze(1), slice(None), step, noise_cap)
        theta_SD[:, self.span] = values_SOK.squeeze(1)

    def bound(self, coordinate: float, step: Tensor) -> float:
        """See :class:`Part`."""
        return self._pinned_bound(coordinate, step)


class MatrixPart(Part):
    """A matrix of weights: pinned coordinates in a frame, and a null part, unless the frame has all directions.

    The frame ``(K, I)`` has integers of its own step; its rows need not be orthogonal. An offset, where there is one,
    has integers of 32 bits in two halves: the lower ones of all chains, then the higher ones.

    With scales, all of that is of a matrix whose columns were divided by powers of two, near their deviations. Pinned
    coordinates and null part are independent, so that their noise does not cancel where a direction of the frame mixes
    columns: without scales, a share of what the widest of these vary would be the least of what any does.
    """

    exponents: Tensor
    frame: Tensor
    null: Tensor
    offset: Tensor

    def __init__(
        self,
        matrix: WeightMatrix,
        num_chains: int,
        rank: int,
        path_rank: int,
        pinned: int,
        *options: int,
    ) -> None:
        checks.integer("Generator setting K of a matrix", pinned)
        has_offset, has_scales = (*options, 0, 0)[:2]
        for name, flag in {"offset": has_offset, "scales": has_scales}.items():
            if checks.integer(f"Generator setting {name} of a matrix", flag, at_least=0) > 1:
                raise ValueError(f"Generator setting {name} of a matrix must be 0 or 1; got {flag}.")
        if pinned > matrix.columns:
            raise ValueError(f"Matrix {matrix.entry} has {matrix.columns} columns, and {pinned} of them are pinned.")
        super().__init__(num_chains, rank, matrix.units, pinned)
        self.matrix = matrix
        self.shape = (matrix.units, matrix.columns)
        self.is_full = pinned == matrix.columns
        self.latent_size = matrix.units * (pinned if self.is_full else pinned + matrix.columns)
        self.path_rank = path_rank
        self.num_chains = num_chains
        self.register_buffer("frame", torch.zeros(pinned, matrix.columns, dtype=torch.int16))
        self.frame_step = nn.Parameter(torch.ones(()))
        if not self.is_full:
            null = 1 + path_rank
            shape = (num_chains * null, matrix.units, matrix.columns)
            self.register_buffer("null", torch.zeros(shape, dtype=torch.int16))
            self.null_step = nn.Parameter(torch.ones(()))
            self.null_reduction = nn.Parameter(torch.zeros(num_chains * null))
            self.null_rows = nn.Parameter(torch.zeros(matrix.units))
            self.null_columns = nn.Parameter(torch.zeros(matrix.columns))
        self.has_offset = self.has_scales = False
        if has_offset:
            self.add_offset()
        if has_scales:
            self.add_scales(torch.zeros(matrix.columns))

    def add_scales(self, exponents_I: Tensor) -> None:
        """Gives columns scales, powers of two with these exponents."""
        self.register_buffer("exponents", exponents_I.to(self.frame))
        self.has_scales = True

    def scales(self, dtype: torch.dtype) -> Tensor:
        """Scales of columns ``(I,)``."""
        return torch.exp2(self.exponents.to(dtype))

    def add_offset(self) -> None:
        """Gives the matrix an offset, of zeros."""
        shape = (2 * self.num_chains, self.matrix.units, self.matrix.columns)
        self.register_buffer("offset", torch.zeros(shape, dtype=torch.int16, device=self.frame.device))
        self.offset_step = nn.Parameter(torch.ones_like(self.frame_step))
        self.has_offset = True

    def set_offset(self, rows: slice, integers_COI: Tensor) -> None:
        """Sets the offset of some rows to integers of 32 bits, in units of ``offset_step``."""
        high_COI = (integers_COI + 2**15) >> 16
        self.offset[:, rows] = torch.cat([integers_COI - (high_COI << 16), high_COI]).to(torch.int16)

    def offsets(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Offsets ``(C, O, I)`` of some rows."""
        low_COI, high_COI = self.offset[:, rows].to(torch.int32).chunk(2)
        return ((high_COI << 16) + low_COI).to(dtype) * self.offset_step.detach().to(dtype)

    @property
    def entry(self) -> list[int]:
        """As in the settings of the generator."""
        options = [int(self.has_offset), 1] if self.has_scales else [1] if self.has_offset else []
        return [*self.matrix.entry, len(self.frame), *options]

    def frames(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The frame ``(K, I)``, and its dual ``(K, I)``, with which coordinates become rows."""
        key = ("dual", dtype, self.frame.device)
        frame_KI = self.frame.to(dtype) * self.frame_step.detach().to(dtype)
        if key not in self._kept:
            self._kept[key] = dual_frame(frame_KI.double()).to(dtype)
        return frame_KI, self._kept[key]

    def keep_dual(self, dual_KI: Tensor) -> None:
        """Sets the dual of the frame, for a program that finds it otherwise; :meth:`forget` drops it."""
        self._kept[("dual", dual_KI.dtype, dual_KI.device)] = dual_KI

    def write(
        self, theta_SD: Tensor, drawn: tuple[Tensor, Tensor], latent_SL: Tensor, step: Tensor, noise_cap: Tensor
    ) -> None:
        """See :class:`Part`."""
        frame_KI, dual_KI = self.frames(step.dtype)
        split = self.matrix.units * len(self.frame)
        pinned_SOK = latent_SL[:, :split].unflatten(1, (self.matrix.units, -1))
        null_SOI = None if self.is_full else latent_SL[:, split:].unflatten(1, (self.matrix.units, -1))
        for rows in self.matrix.row_blocks(max(len(theta_SD), self._decoded_draws())):
            coordinates_SOK = self.pinned(drawn, pinned_SOK[:, rows], rows, step, noise_cap)
            if null_SOI is None:
                rows_SOI = coordinates_SOK @ dual_KI
            else:
                left_SOI = self.left(drawn, null_SOI[:, rows], rows, step)
                rows_SOI = left_SOI + (coordinates_SOK - left_SOI @ frame_KI.mT) @ dual_KI
            if self.has_offset:
                rows_SOI = rows_SOI + (drawn[0] @ self.offsets(rows, step.dtype).flatten(1)).view_as(rows_SOI)
            if self.has_scales:
                rows_SOI = rows_SOI * self.scales(step.dtype)
            self.matrix.scatter(rows_SOI, rows, theta_SD)

    def _decoded_draws(self) -> int:
        """Draws whose rows have as many numbers as the integers of a row that are decoded for each call."""
        found = 0 if self.basis.numel() <= _KEPT_NUMBERS else self.basis[:, 0].numel() // self.matrix.columns
        if self.has_offset:
            found = max(found, self.num_chains)
        return found if self.is_full or self.null.numel() <= _KEPT_NUMBERS else max(found, len(self.null))

    def left(self, drawn: tuple[Tensor, Tensor], latent_SOI: Tensor, rows: slice, step: Tensor) -> Tensor:
        """What the null part is taken from, ``(S, O, I)``: mean, path and noise."""
        is_chain_SC, coordinates_SCR = drawn
        weights_SCR = torch.cat([is_chain_SC.unsqueeze(-1), coordinates_SCR[..., : self.path_rank]], -1)
        path_SW = (weights_SCR.flatten(1) * self.null_step) @ self.decoded("null", "null_reduction", rows, step.dtype)
        noise_SOI = latent_SOI * self.null_rows[rows].unsqueeze(-1) * self.null_columns
        return path_SW.view_as(noise_SOI) + noise_SOI

    def bound(self, coordinate: float, step: Tensor) -> float:
        """See :class:`Part`."""
        frame_KI, dual_KI = self.frames(step.dtype)
        across = len(self.frame) * peak(dual_KI)
        bound = across * self._pinned_bound(coordinate, step)
        if self.has_offset:
            rows = self.matrix.row_blocks(self.num_chains)
            bound += max(peak(self.offsets(block, self.offset_step.dtype)) for block in rows)
        if not self.is_full:
            left = peak(self.null_step) * (1 + coordinate) * (peak(self.null) + peak(self.null_reduction))
            left += LARGEST_LATENT * peak(self.null_rows) * peak(self.null_columns)
            bound += left * (1 + across * self.matrix.columns * peak(frame_KI))
        return bound * peak(self.scales(step.dtype)) if self.has_scales else bound


def dual_frame(frame_KI: Tensor) -> Tensor:
    """The dual ``(K, I)`` of a frame in double precision, with which coordinates become rows."""
    gram_KK = frame_KI @ frame_KI.mT
    gram_KK.diagonal().add_(1e-12 * gram_KK.diagonal().mean().clamp_min(1e-300))
    dual_KI: Tensor = torch.linalg.solve(gram_KK, frame_KI)
    return dual_KI


def capped(scale: Tensor, cap: Tensor) -> Tensor:
    """Scales of noise, of which none is larger than ``cap``."""
    return scale * torch.rsqrt(1 + (scale / cap).square())


def reduced(values_ROK: Tensor, reduction_R: Tensor) -> Tensor:
    """Integers with their magnitudes reduced, by one number for each first index."""
    reduction_R11 = reduction_R[:, None, None]
    return values_ROK - torch.clamp(values_ROK, -reduction_R11, reduction_R11)
