# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Steps and coordinates of a default generator within a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from pyro_apd.distillation.subspace_settings import Case
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.generators.subspace_fit import SubspaceFit, SubspaceSettings

# Share of a budget that modes may take.
_SHARE_OF_MODES = 0.12
_LARGEST_FILE = 2**60
# To meet a budget, steps are halved or doubled up to so often, until the size is within this share of it, in so many
# trials. Doubling them takes about a bit from each integer: at first, sizes are taken to fall with this slope.
_MAX_HALVINGS, _MAX_DOUBLINGS, _TOLERANCE, _EVALUATIONS, _SLOPE = 8.0, 5.0, 0.03, 8, 0.4
# Coordinates, at least.
_LEAST_RANK = 2
# Of which there is this share, or where steps are nearly fine enough the second, in the next trial.
_FEWER, _SOMEWHAT_FEWER = 0.5, 0.7

# Bytes of a generator's file, and with always_coded=True those that fall with coarser steps.
_SizeOf = Callable[..., int]


class BudgetError(ValueError):
    """A budget is too small for any generator."""


class LastFit:
    """Fits with some settings, of which the last one is kept: it does for others that differ in steps alone."""

    def __init__(self, fit_with: Callable[[SubspaceSettings], SubspaceFit]) -> None:
        self._fit_with = fit_with
        self._kept: tuple[SubspaceSettings, SubspaceFit] | None = None

    def at(self, settings: SubspaceSettings) -> SubspaceFit:
        """The fit with these settings."""
        if self._kept is not None:
            fitted, fit = self._kept
            if replace(fitted, step=settings.step, null_step=settings.null_step) == settings:
                return fit
            del fit
        self._kept = None  # freed first, since each takes the memory of many networks
        self._kept = (settings, self._fit_with(settings))
        return self._kept[1]


def within_budget(
    budget: float,
    fits: LastFit,
    case: Case,
    relative: float,
    size_of: _SizeOf,
    keeps_rank: bool = False,
) -> SubspaceGenerator:
    """The generator with about the finest steps within a number of bytes, with fewer coordinates where these are too
    coarse.

    :param Case case: the draws, and which settings suit them.
    :param float relative: budget relative to what the default takes.
    :param callable size_of: bytes of a generator's file.
    :param bool keeps_rank: whether there are fewer coordinates only where any steps take too many bytes.
    :raises BudgetError: if no steps are coarse enough.
    """
    num_draws, settings, shortest = case.draws.shape[1], case.settings(relative), case.segment_length(relative)
    while True:
        settings = replace(settings, segment_length=case.segment_within(_SHARE_OF_MODES * budget, settings, shortest))
        generator, size = _with_finest_steps(fits.at(settings), settings, budget, partial(size_of, always_coded=True))
        if generator is not None and (size := size_of(generator)) > (1 + _TOLERANCE) * budget:
            generator = None  # too many integers for a code of so few bytes
        is_last = settings.rank <= _LEAST_RANK
        if generator is not None and (keeps_rank or is_last or generator.step.item() <= case.coarse_step(settings)):
            return generator
        if is_last and settings.segment_length == num_draws:
            raise BudgetError(
                f"byte_budget: {budget:,.0f} bytes are too few for this posterior; the least is about {size:,} bytes. "
                "Give more. An integer is a number of bytes, and a float one of networks: 2.0 is two networks."
            )
        if is_last:
            shortest = num_draws
        share = min(_FEWER, budget / size)
        if generator is not None:
            share = _share_for(generator.step.item(), case.coarse_step(settings))
        rank = min(settings.rank, max(_LEAST_RANK, round(settings.rank * share)))
        settings = replace(settings, rank=rank, path_rank=min(settings.path_rank, rank))


def _share_for(step: float, coarse: float) -> float:
    return _FEWER if step > 2 * coarse else _SOMEWHAT_FEWER


def _with_finest_steps(
    fit: SubspaceFit, settings: SubspaceSettings, budget: float, size_of: _SizeOf
) -> tuple[SubspaceGenerator | None, int]:
    """Bisection of the logarithm of the steps' factor, by secants where these stay within bounds.

    :returns: None where the coarsest steps take more bytes; and the bytes of the generator.
    """

    def at(place: float) -> tuple[SubspaceGenerator, int]:
        generator = fit.generator(settings.step * 2**place, settings.null_step * 2 ** (place / 2))
        return generator, size_of(generator)

    finest, coarsest, place, slope = -_MAX_HALVINGS, _MAX_DOUBLINGS, 0.0, _SLOPE
    known: list[tuple[float, float]] = []
    for _ in range(_EVALUATIONS):
        generator, size = at(place)
        excess = math.log(size / ((1 - _TOLERANCE / 2) * budget))
        is_finest = bool(known) and excess < 0 and excess == known[-1][1]  # integers have 16 bits
        if abs(excess) <= _TOLERANCE / 2 or is_finest:
            return generator, size
        finest, coarsest = (place, coarsest) if excess > 0 else (finest, place)
        known.append((place, excess))
        if len(known) > 1:
            (one, before), (other, after) = known[-2:]
            slope = max((before - after) / (other - one), _SLOPE / 20)
        place += excess / slope
        if not finest < place < coarsest:
            place = (finest + coarsest) / 2
    generator, size = at(coarsest)
    return (generator if size <= budget else None), size


def num_bytes_accepted(byte_budget: float | int | None, size: int, dtype: torch.dtype) -> float | None:
    """Bytes, from bytes (an integer) or networks (a float); a budget beyond any file is such a file's."""
    if byte_budget is None:
        return None
    network_bytes = 1 if isinstance(byte_budget, int) else size * dtype.itemsize
    return min(byte_budget * network_bytes, _LARGEST_FILE)
