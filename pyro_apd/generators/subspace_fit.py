# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Fits the default generator to draws in closed form: two passes over them, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_apd.generators.base import peak
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.frames import LARGEST_INT16, fitted_frame, num_pinned, scale_exponents, short
from pyro_apd.generators.moments import Moments, NullMoments, gram_of_functions, moments_of_block
from pyro_apd.generators.rounding import rounded, row_blocks, scaled_bases, with_left_inverse
from pyro_apd.generators.subspace import (
    MEAN_STEPS,
    EntriesPart,
    MatrixPart,
    Part,
    SubspaceGenerator,
    reduced,
)
from pyro_apd.generators.weight_matrices import WeightMatrix
from pyro_apd.runtime.memory import give_back_freed

# Draws of a chain by which the size of a null part is found.
_NUM_NULL_DRAWS = 64
# Steps of null parts while they are fitted, relative to the root mean square: much finer than any of a file, since
# numbers are rounded twice.
_FINE = 2.0**-6
# Offsets have this step, relative to the step of null parts, and so many bits at most.
_OFFSET_STEP, _OFFSET_BITS = 1 / 8, {torch.float32: 24, torch.float64: 30}
_LARGEST_INT32 = 2.0e9
# Draws of a chain that tell how far coordinates vary, by which frames are chosen.
_NUM_FRAME_DRAWS = 32
# Units are at least this, relative to the largest of a matrix.
_SMALLEST_UNIT = 1e-5
# Deviations of numbers without a matrix are at least this, relative to the numbers.
_SMALLEST_DEVIATION = 2e-6
_NO_CAP = 1e6
# Rounds in which the scales of columns are adjusted to the projection.
_COLUMN_ROUNDS = 10


@dataclass(frozen=True)
class SubspaceSettings:
    """How coarse the generator is.

    :ivar int pinned: K, largest number of pinned directions of a matrix.
    :ivar int rank: R, coordinates per chain.
    :ivar int path_rank: R0, of which the null part follows.
    :ivar float step: of pinned coordinates; those of a layer have a variance of one in all.
    :ivar float null_step: of null parts, relative to the root mean square of their deviations.
    :ivar int segment_length: successive draws of a chain that make a mode.
    :ivar bool is_dithered: round bases at random, up or down, so that what is smaller than a step is kept on average.
    :ivar bool has_null_noise: whether null parts have noise beside mean and path. In a convolution few directions of
        patches are pinned, so that functions depend on the others, too, and noise there blurs them.
    :ivar float frame_step: of frames, relative to the root mean square of their entries.
    """

    pinned: int = 96
    rank: int = 96
    path_rank: int = 8
    step: float = 0.8e-3
    null_step: float = 0.3
    frame_step: float = 0.4
    segment_length: int = 4
    is_dithered: bool = False
    has_null_noise: bool = True


class SubspaceFit:
    """What two passes over the draws find.

    :param DrawBlocks draws: by chain.
    :param matrices: where weights are; other entries count as a layer of their own.
    :param moments: second moment ``(I, I)`` of the inputs of each matrix, the bias's constant input included.
    :param functions_CTF: what each draw predicts, which coordinates follow beside the weights; None for weights alone.
    """

    def __init__(
        self,
        draws: DrawBlocks,
        matrices: Sequence[WeightMatrix],
        moments: Sequence[Tensor],
        settings: SubspaceSettings,
        functions_CTF: Tensor | None = None,
    ) -> None:
        self._draws = draws
        self._functions_CTF = functions_CTF
        self._settings = settings
        num_chains, num_draws, size = draws.shape
        rank = max(1, min(settings.rank, num_draws - 1))
        num_modes = max(1, num_draws // settings.segment_length)
        counts = [num_pinned(len(moment), settings.pinned) for moment in moments]
        entries = [[*matrix.entry, count] for matrix, count in zip(matrices, counts, strict=True)]
        self._model = SubspaceGenerator(size, entries, num_chains, num_modes, rank, min(settings.path_rank, rank)).to(
            draws.device, draws.dtype
        )
        self._parts = self._model.parts_in_order()
        self._pinned_parts: list[Moments] = []
        self._null_parts: dict[Part, NullMoments] = {}
        self._null_units: dict[Part, Tensor] = {}
        self._centres: dict[Part, Tensor] = {}
        self._square_deviations: dict[Part, Tensor] = {}
        with torch.no_grad():
            for part, moment in zip(self._parts, moments, strict=False):
                assert isinstance(part, MatrixPart)
                moment, rows_CTOI = moment.double(), self._some_rows(part)
                exponents_I = scale_exponents(rows_CTOI)
                if exponents_I is not None:
                    part.add_scales(exponents_I)
                    rows_CTOI /= part.scales(rows_CTOI.dtype)
                    moment = moment * part.scales(moment.dtype).outer(part.scales(moment.dtype))
                frame, step = fitted_frame(moment, len(part.frame), settings.frame_step, rows_CTOI.flatten(0, 2))
                part.frame.copy_(frame)
                part.frame_step.fill_(step)
                frame_KI, _ = part.frames(torch.float64)
                unit_K = ((frame_KI @ moment) * frame_KI).sum(1).clamp_min(0).sqrt()
                # Inputs that are all zero have no units.
                largest = unit_K.amax() if bool(unit_K.amax() > 0) else torch.ones_like(unit_K[0])
                part.unit.copy_(unit_K.clamp_min(_SMALLEST_UNIT * largest))

    @torch.no_grad()
    def read(self) -> None:
        """Reads the draws, twice."""
        self._find_coordinates()
        self._find_bases()
        for part, found in zip(self._parts, self._pinned_parts, strict=True):
            if isinstance(part, MatrixPart) and self._takes_offset(part, found):
                part.add_offset()

    def _find_coordinates(self) -> None:
        """The first pass: units of layers, and the coordinates of the draws."""
        num_chains, num_draws, _ = self._draws.shape
        gram_CTT = torch.zeros(num_chains, num_draws, num_draws, dtype=torch.float64, device=self._draws.device)
        spaced_T = torch.linspace(0, num_draws - 1, min(num_draws, _NUM_NULL_DRAWS)).round().long()
        differs = torch.zeros((), dtype=torch.bool, device=self._draws.device)
        for part in self._parts:
            own_CTT = torch.zeros_like(gram_CTT)
            if isinstance(part, EntriesPart):
                part.unit.copy_(1 / self._deviation(part))
            null, count = self._draws[torch.zeros(1, dtype=torch.long)].new_zeros(()), 0
            largest = torch.zeros_like(null)
            for _, centre_COI, values_SOI in self._centred(part):
                differs |= (values_SOI != 0).any() | (centre_COI != centre_COI[0]).any()
                pinned_CTW = self._pinned(part, values_SOI).flatten(1).unflatten(0, (num_chains, num_draws))
                pinned_CTW = pinned_CTW - pinned_CTW.mean(1, keepdim=True)
                own_CTT += pinned_CTW @ pinned_CTW.mT
                if isinstance(part, MatrixPart) and not part.is_full:
                    some_CTOI = values_SOI.unflatten(0, (num_chains, num_draws))[:, spaced_T]
                    left_SOI = self._null(part, some_CTOI.flatten(0, 1))
                    largest = torch.maximum(largest, left_SOI.abs().amax())
                    null = null + left_SOI.unflatten(0, (num_chains, -1)).var(1).sum()
                    count += values_SOI[0].numel() * num_chains
            total = own_CTT.diagonal(dim1=1, dim2=2).sum() / (num_chains * num_draws)
            total = total.where(total > 0, 1.0)  # of weights that never move
            part.unit.copy_(short(part.unit / total.sqrt().to(part.unit.dtype)))
            gram_CTT += own_CTT / total
            if count and isinstance(part, MatrixPart):
                unit = (null / count).sqrt().clamp_min(torch.finfo(self._draws.dtype).tiny)
                unit = torch.maximum(unit, 1.1 * largest / (_FINE * LARGEST_INT16))  # some may be far larger
                self._null_units[part] = unit
                part.null_step.copy_(unit)
        if not bool(differs):
            raise ValueError("All draws are the same, so there is no posterior to distil. Check that the chain moved.")
        if self._functions_CTF is not None:
            gram_CTT += gram_of_functions(self._functions_CTF)
        vectors_CTR = torch.linalg.eigh(gram_CTT)[1][..., -self._model.rank :].flip(-1)
        largest = vectors_CTR.abs().argmax(1, keepdim=True)
        vectors_CTR = vectors_CTR * vectors_CTR.gather(1, largest).sign()
        coordinates_CTR = (vectors_CTR * num_draws**0.5).to(self._draws.dtype)
        loses_nothing = self._model.rank == num_draws - 1 and self._model.num_modes == num_draws
        self._coordinates_CTR, self._left_CRT = with_left_inverse(coordinates_CTR, loses_nothing)
        self._fit_modes()

    def _fit_modes(self) -> None:
        parts = self._coordinates_CTR.tensor_split(self._model.num_modes, dim=1)
        means_CMR = torch.stack([part.mean(1) for part in parts], 1)
        around = [part - part.mean(1, keepdim=True) for part in parts]
        self._model.modes.copy_(means_CMR.flatten(0, 1))
        self._model.spread.copy_(torch.cat(around, 1).square().mean(1).sqrt())

    def _find_bases(self) -> None:
        """The second pass: means, bases and paths in these coordinates."""
        left_CRT = self._left_CRT
        for part in self._parts:
            moments, null, squares = Moments.empty(part, left_CRT), [], []
            self._centres[part] = left_CRT.new_empty(len(left_CRT), *part.shape)
            for rows, centre_COI, values_SOI in self._centred(part):
                self._centres[part][:, rows] = centre_COI
                moments.set(rows, *moments_of_block(self._pinned(part, values_SOI), left_CRT))
                if isinstance(part, MatrixPart) and not part.is_full:
                    null.append(self._fine_null(part, rows, self._null(part, values_SOI), left_CRT))
                squares.append(values_SOI.square_().mean((0, 2)))
            self._square_deviations[part] = torch.cat(squares).mean()
            self._pinned_parts.append(moments)
            if null and isinstance(part, MatrixPart):
                sums_I = torch.stack([columns_I for _, columns_I in null]).sum(0)
                row_O = torch.cat([mean_O for mean_O, _ in null])
                self._null_parts[part] = NullMoments(part.null, row_O, sums_I / len(row_O))

    def _fine_null(self, part: MatrixPart, rows: slice, null_SOI: Tensor, left_CRT: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps mean and path of some rows in fine integers, and returns means of the variance by row ``(O,)`` and
        sums by column ``(I,)``."""
        mean_COI, path_CROI, variance_OI = moments_of_block(null_SOI, left_CRT[:, : part.path_rank])
        path_CPOI = torch.cat([mean_COI.unsqueeze(1), path_CROI], 1)
        integers = (path_CPOI / (_FINE * part.null_step)).round().clamp(-LARGEST_INT16, LARGEST_INT16)
        part.null[:, rows] = integers.to(torch.int16).flatten(0, 1)
        return variance_OI.mean(1), variance_OI.sum(0)

    @torch.no_grad()
    def generator(
        self, step: float | None = None, null_step: float | None = None, is_last: bool = False
    ) -> SubspaceGenerator:
        """The generator at these steps, see :class:`SubspaceSettings`; it shares its tensors with that of the last
        call.

        :param bool is_last: no other steps will be asked for: the fine integers of null parts need not be kept.
        """
        null_step = max(self._settings.null_step if null_step is None else null_step, _FINE)  # of which integers are
        give_back_freed()
        for part in self._parts:
            if isinstance(part, MatrixPart) and part.has_offset:
                self._round_offset(part, null_step)
        self._round_pinned(self._settings.step if step is None else step)
        for part, null in self._null_parts.items():
            assert isinstance(part, MatrixPart)
            if part.null is null.integers and not is_last:
                part.null = torch.empty_like(null.integers)
            self._round_null(part, null, null_step)
        self._model.noise_cap.fill_(_NO_CAP)
        return self._model

    def _takes_offset(self, part: MatrixPart, found: Moments) -> bool:
        """Whether means are so many times the deviation that they would make all steps coarser, or exceed 16 bits; or
        nothing moves, by which a step is chosen."""
        square, largest = float(self._square_deviations[part]), peak(self._centres[part])
        if square == 0:
            return largest > 0
        pinned = MEAN_STEPS * peak(self._mean(part, found)) / self._settings.step
        null = 0.0 if part.is_full else largest / (float(self._null_units[part]) * _FINE)
        return max(pinned, null) > LARGEST_INT16

    def _round_offset(self, part: MatrixPart, null_step: float) -> None:
        centre_COI = self._centres[part]
        finest = peak(centre_COI) / 2 ** _OFFSET_BITS[self._draws.dtype]
        step = max(float(self._square_deviations[part]) ** 0.5 * null_step * _OFFSET_STEP, finest)
        step = 2.0 ** math.ceil(math.log2(step))
        part.offset_step.fill_(step)
        for rows in row_blocks(centre_COI):
            part.set_offset(rows, (centre_COI[:, rows].double() / step).round().to(torch.int32))

    def _mean(self, part: Part, found: Moments) -> Tensor:
        """Mean pinned coordinates ``(C, O, K)`` in double precision, less what the offset has."""
        mean_COK = torch.empty_like(found.mean_COK, dtype=torch.float64)
        for rows in row_blocks(self._centres[part]):
            mean_COK[:, rows] = self._pinned(part, self._without_offset(part, rows)) + found.mean_COK[:, rows]
        return mean_COK

    def _without_offset(self, part: Part, rows: slice) -> Tensor:
        """What means of some rows ``(C, O, I)`` are beside deviations and offset, in double precision."""
        centre_COI = self._centres[part][:, rows].double()
        if isinstance(part, MatrixPart) and part.has_offset:
            centre_COI = centre_COI - part.offsets(rows, centre_COI.dtype)
        return centre_COI

    def _round_pinned(self, step: float) -> None:
        means = [self._mean(part, found) for part, found in zip(self._parts, self._pinned_parts, strict=True)]
        for part, found, mean_COK in zip(self._parts, self._pinned_parts, means, strict=True):
            largest = LARGEST_INT16 if isinstance(part, MatrixPart) else _LARGEST_INT32
            step = max(step, MEAN_STEPS * peak(mean_COK) / largest, peak(found.basis_CROK) / LARGEST_INT16)
        step = float(short(torch.tensor(step, dtype=torch.float64)))
        self._model.step.fill_(step)
        for part, found, mean_COK in zip(self._parts, self._pinned_parts, means, strict=True):
            part.mean.copy_((mean_COK * (MEAN_STEPS / step)).round())
            scaled = partial(scaled_bases, found.basis_CROK, step)
            part.reduction.copy_(rounded(part.basis, scaled, self._settings.is_dithered))
            left_OK = torch.empty_like(found.variance_OK)
            for rows in row_blocks(part.basis):
                decoded_ROK = reduced(part.basis[:, rows].to(left_OK.dtype), part.reduction) * step
                square_OK = decoded_ROK.square().sum(0) / self._model.num_chains
                left_OK[rows] = (found.variance_OK[rows] - square_OK).clamp_min(0)
            tiny = torch.finfo(left_OK.dtype).tiny
            part.noise_rows.copy_((left_OK.mean(1) / left_OK.mean().clamp_min(tiny)).sqrt())
            part.noise_columns.copy_(left_OK.mean(0).sqrt())
            part.forget()

    def _round_null(self, part: MatrixPart, null: NullMoments, null_step: float) -> None:
        dtype = null.row_O.dtype
        mean_step = self._null_units[part].double() * null_step

        def scaled(rows: slice) -> Tensor:
            scaled_ROI = null.integers[:, rows].to(dtype) * (_FINE / null_step)
            mean_COI = self._null(part, self._without_offset(part, rows)) / mean_step
            scaled_ROI.unflatten(0, (self._model.num_chains, -1))[:, 0] += mean_COI
            return scaled_ROI

        part.null_reduction.copy_(rounded(part.null, scaled))
        part.null_step.copy_(self._null_units[part] * null_step)
        if not self._settings.has_null_noise:
            part.forget()
            return
        square_O, square_I = torch.empty_like(null.row_O), torch.zeros_like(null.column_I)
        for rows in row_blocks(part.null):
            decoded_ROI = reduced(part.null[:, rows].to(dtype), part.null_reduction) * part.null_step
            path_ROI = decoded_ROI.unflatten(0, (self._model.num_chains, -1))[:, 1:].flatten(0, 1)
            square_OI = path_ROI.square().sum(0) / self._model.num_chains
            square_O[rows] = square_OI.mean(1)
            square_I += square_OI.sum(0)
        part.forget()
        square_I /= len(square_O)
        self._fit_null_noise(part, (null.row_O - square_O).clamp_min(0), (null.column_I - square_I).clamp_min(0))

    def _fit_null_noise(self, part: MatrixPart, row_O: Tensor, wanted_I: Tensor) -> None:
        """Scales of noise such that its variance by row and by column is right after the projection."""
        mean = wanted_I.mean().clamp_min(torch.finfo(wanted_I.dtype).tiny)
        wanted_I = wanted_I.clamp_min(0.02 * mean)
        frame_KI, dual_KI = part.frames(wanted_I.dtype)
        column_I = wanted_I.clone()
        largest = 4 * wanted_I.amax()
        for _ in range(_COLUMN_ROUNDS):
            found_I = torch.zeros_like(column_I)
            for span_B in torch.arange(len(column_I), device=column_I.device).split(1024):
                projector_BI = -frame_KI[:, span_B].mT @ dual_KI
                projector_BI[torch.arange(len(span_B), device=span_B.device), span_B] += 1
                found_I += column_I[span_B] @ projector_BI.square()
            column_I = torch.minimum(column_I * wanted_I / found_I.clamp_min(torch.finfo(found_I.dtype).tiny), largest)
        part.null_columns.copy_(column_I.sqrt())
        part.null_rows.copy_((row_O / mean).clamp_min(0.01).sqrt())

    def _pinned(self, part: Part, values_SOI: Tensor) -> Tensor:
        if isinstance(part, MatrixPart):
            frame_KI, _ = part.frames(values_SOI.dtype)
            return (values_SOI @ frame_KI.mT).mul_(part.unit)
        return values_SOI * part.unit

    def _null(self, part: MatrixPart, values_SOI: Tensor) -> Tensor:
        frame_KI, dual_KI = part.frames(values_SOI.dtype)
        found_SOI = (values_SOI @ frame_KI.mT) @ dual_KI
        return torch.sub(values_SOI, found_SOI, out=found_SOI)

    def _some_rows(self, part: MatrixPart) -> Tensor:
        """Rows of a few draws, ``(C, T, O, I)``, as deviations from their means."""
        num_chains, num_draws, _ = self._draws.shape
        spaced_T = torch.linspace(0, num_draws - 1, min(num_draws, _NUM_FRAME_DRAWS)).round().long()
        _, values_SOI = next(self._blocks(part))
        values_CTOI = values_SOI.unflatten(0, (num_chains, num_draws))[:, spaced_T]
        deviations_CTOI: Tensor = values_CTOI - values_CTOI.mean(1, keepdim=True)
        return deviations_CTOI

    def _deviation(self, part: EntriesPart) -> Tensor:
        """Of each entry; at least a few units in the last place of its mean, since some entries never move."""
        num_chains, num_draws, _ = self._draws.shape
        found = []
        for _, values_SOI in self._blocks(part):
            values_CTI = values_SOI.flatten(1).unflatten(0, (num_chains, num_draws))
            deviation_I = values_CTI.var(1, correction=0).mean(0).sqrt()
            found.append(deviation_I.maximum(_SMALLEST_DEVIATION * values_CTI.abs().amax((0, 1))))
        return torch.cat(found).clamp_min(1e-30)

    def _centred(self, part: Part) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of a part, centres ``(C, O, I)`` near the means of chains, and deviations from these ``(S, O, I)``,
        which may be changed in place."""
        for rows, values_SOI in self._blocks(part):
            values_CTOI = values_SOI.unflatten(0, self._draws.shape[:2])
            first_C1OI = values_CTOI[:, :1].clone()
            centre_C1OI = (values_CTOI - first_C1OI).mean(1, keepdim=True).add_(first_C1OI)
            values_CTOI -= centre_C1OI
            yield rows, centre_C1OI.squeeze(1), values_SOI

    def _blocks(self, part: Part) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a part, with their values in all draws ``(S, O, I)``, which may be changed in place."""
        give_back_freed()
        if isinstance(part, EntriesPart):
            for _, values_SW in self._draws.columns([part.span]):
                yield slice(None), values_SW.unsqueeze(1)
            return
        assert isinstance(part, MatrixPart)
        matrix = part.matrix
        length = matrix.units if matrix.is_transposed else max(1, self._draws.width // matrix.columns)
        for start in range(0, matrix.units, length):
            rows = slice(start, min(start + length, matrix.units))
            # Without a name, so that nothing but what is yielded stays in memory.
            yield (
                rows,
                self._scaled(
                    part, matrix.gather(*(next(self._draws.columns([span]))[1] for span in matrix.row_spans(rows)))
                ),
            )

    @staticmethod
    def _scaled(part: MatrixPart, values_SOI: Tensor) -> Tensor:
        return values_SOI.div_(part.scales(values_SOI.dtype)) if part.has_scales else values_SOI
