# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Calibrates two numbers of the default generator, so that its draws disagree as much as the chain's do.

A Gaussian distribution around the modes, and independent noise, leave the curved surface on which a chain moves. Near
the data both make draws disagree too much. So the spread around modes is multiplied by a factor, and the scale of noise
is capped: noise in directions that the data determine is cut, and in others, which give functions their spread far from
the data, kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.chosen_inputs import NUM_CHOOSING, SHARES, ChosenInputs
from pyro_apd.distillation.function_space import FunctionSpace
from pyro_apd.distillation.probes import Probes
from pyro_apd.distillation.scaled_modes import SHARES_OF_MODES, scale_modes
from pyro_apd.generators.draw_blocks import DrawBlocks, blocks_of_draws
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.seeds import fresh_seed

# Draws that are compared: as many as have these numbers in all, within bounds; of costly networks fewer.
_NUMBERS, _MIN_DRAWS, _MAX_DRAWS, _FEW_DRAWS = 4_000_000, 100, 200, 40
# Inputs of all groups: as many as take these multiplications for all draws, within bounds. They are chosen among so
# many times as many at most, by how far these draws of the chain disagree there.
_PRODUCTS, _MIN_PROBES, _MAX_PROBES = 24_000_000_000, 60, 1000
_CANDIDATES = 4
# The same where each draw is a mode. All of them are compared, since a few draws have much of the disagreement: with 40
# of 320 draws of a convolutional network, its ratio is off by 6 to 9 %.
_PRODUCTS_OF_MODES, _MIN_PROBES_OF_MODES = 500_000_000_000, 50
# A network is costly from these multiplications per input on.
_COSTLY = 1_000_000
# Weights of inputs: rows of the data, mixtures of rows and rows with noise, and noise alone. New rows lie between the
# first two: with equal weights, draws disagree a little too little there (by 0.4 % on validation rows of MNIST), and
# with four times the weight of those near the data, draws of small networks disagree up to 20 % too much on the data.
_WEIGHTS = {"rows": 1.0, "near": 2.0, "far": 0.5}
# The search starts at the best of these, found by this share of the draws: squares of the factor, and caps in
# logarithms of the typical noise. Of small networks all are tried, of others those with the last square.
_SQUARES, _CAPS = (0.0, 0.25), (-3.0, -2.0, -1.0, 0.0, 1.0)
_SHARE_AT_START = 0.3
_SMALL = 20_000
# Rounds of Levenberg and Marquardt, of small networks and of others, in squares of the factor and relative caps:
# disagreements are nearly linear in these, and not in the cap's logarithm. Differences, that of the cap relative to it;
# the largest change of the cap's logarithm; and dampings, of which the second is taken where the first is worse: both
# numbers may change functions alike.
_SMALL_ROUNDS, _ROUNDS = 3, 2
_DIFFERENCES = (0.2, 0.65)
_LARGEST_LOG = 1.5
_DAMPINGS = (0.01, 1.0)
_MAX_FACTOR = 1.1
_RIDGE = 1e-4


@dataclass(frozen=True)
class Calibration:
    """What was found.

    :ivar float spread: factor of the spread around modes; of the modes where each draw is one.
    :ivar float noise_cap: cap of noise, in units of the pinned coordinates.
    :ivar dict residuals: logarithm of the ratio of the generator's disagreement to the chain's, by group of inputs.
    """

    spread: float
    noise_cap: float
    residuals: dict[str, float]

    @property
    def ratio(self) -> float:
        """Disagreement of the generator's draws on the data relative to the chain's."""
        return math.exp(self.residuals.get("rows", 0.0))

    @torch.no_grad()
    def of_trained(
        self,
        generator: SubspaceGenerator,
        functions: tuple[FunctionSpace, Probes],
        draws: DrawBlocks,
        num_products: int,
    ) -> Calibration:
        """The same with the residuals of a generator that was trained since; parameters as for :func:`calibrate`."""
        count = min(_draws_compared(generator, num_products), len(draws))
        inputs = _chosen_inputs(functions, draws, count, num_products)
        chain = inputs.disagreements(functions[0], draws.spaced(count))
        own = inputs.disagreements(functions[0], blocks_of_draws(generator, count))
        return replace(self, residuals={name: float(_ratios(own, chain)[name].mean()) for name in own})

    def to_json(self) -> dict[str, Any]:
        """For the metadata of a posterior, rounded."""
        residuals = {name: round(value, 4) for name, value in self.residuals.items()}
        return {"spread": round(self.spread, 4), "noise_cap": float(f"{self.noise_cap:.4g}"), "residuals": residuals}


@torch.no_grad()
def calibrate(
    generator: SubspaceGenerator,
    functions: tuple[FunctionSpace, Probes],
    draws: DrawBlocks,
    num_products: int = 0,
    scales_modes: bool = True,
) -> Calibration:
    """Sets spread and cap of noise by the draws of the chain, with torch's global random numbers.

    Where each draw is a mode there is no spread, and the modes are multiplied instead: the directions that are left out
    take a share of the disagreement with them, which noise does not bring back.

    :param functions: how draws are compared, and the inputs.
    :param DrawBlocks draws: of the chain.
    :param int num_products: multiplications of a network per input.
    :param bool scales_modes: whether to do so. In small networks whose draws are all modes, noise makes draws disagree
        too much, and its cap alone is set.
    """
    space, _ = functions
    if bool(generator.spread.any()) or not scales_modes:
        count = min(_draws_compared(generator, num_products), len(draws))
        inputs = _chosen_inputs(functions, draws, count, num_products)
        return _calibrate_spread(generator, space, inputs, draws, count)
    count = min(len(generator.modes), len(draws))
    limits = _PRODUCTS_OF_MODES, _MIN_PROBES_OF_MODES
    inputs = _chosen_inputs(functions, draws, count, num_products, *limits, SHARES_OF_MODES)
    noise = _typical_noise(generator)
    generator.noise_cap.copy_(noise)
    factor, residuals = scale_modes(generator, space, inputs, draws, count)
    return Calibration(factor, float(noise), residuals)


def _draws_compared(generator: SubspaceGenerator, num_products: int) -> int:
    by_size = max(_MIN_DRAWS, min(_MAX_DRAWS, _NUMBERS // generator.output_size))
    return _FEW_DRAWS if num_products > _COSTLY else by_size


def _chosen_inputs(
    functions: tuple[FunctionSpace, Probes],
    draws: DrawBlocks,
    count: int,
    num_products: int,
    products: int = _PRODUCTS,
    fewest: int = _MIN_PROBES,
    shares: Mapping[str, float] = SHARES,
) -> ChosenInputs:
    """At which so many draws are compared."""
    num_probes = max(fewest, min(_MAX_PROBES, products // max(1, num_products * count)))
    num_candidates = min(_CANDIDATES * num_probes, products // max(1, num_products * NUM_CHOOSING))
    return ChosenInputs.chosen(*functions, draws, num_probes, max(num_probes, num_candidates), shares)


def _ratios(own: Mapping[str, Tensor], chain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logarithms of ratios of disagreements, by group."""
    ratios = {name: (own[name] / chain[name]).log().double().cpu() for name in own}
    return {name: ratio.nan_to_num(nan=10.0, posinf=10.0, neginf=-10.0) for name, ratio in ratios.items()}


def _calibrate_spread(
    generator: SubspaceGenerator, space: FunctionSpace, inputs: ChosenInputs, draws: DrawBlocks, count: int
) -> Calibration:
    seed, device = fresh_seed(), generator.step.device
    unscaled, noise = generator.spread.clone(), _typical_noise(generator)

    def search(count: int) -> _Search:
        """A function from a point to residuals, with so many draws, and what it has tried."""
        chain = inputs.disagreements(space, draws.spaced(count))
        found: list[_Tried] = []

        def residuals(square: float, log_cap: float) -> Tensor:
            _set(generator, unscaled, square, log_cap)
            with seeded(seed, device):
                own = inputs.disagreements(space, blocks_of_draws(generator, count))
            ratios = _ratios(own, chain)
            weighted = torch.cat([(_WEIGHTS[name] / len(ratio)) ** 0.5 * ratio for name, ratio in ratios.items()])
            means = {name: float(ratio.mean()) for name, ratio in ratios.items()}
            found.append(_Tried(float(weighted.square().sum()), square, log_cap, means, weighted))
            return weighted

        return residuals, found

    best = _best_of_spread(search, count, float(noise.log()), generator.output_size)
    _set(generator, unscaled, *best.point)
    return Calibration(best.square**0.5, float(generator.noise_cap), best.means)


@dataclass(frozen=True, order=True)
class _Tried:
    """A spread and a cap, and how well they do."""

    loss: float
    square: float
    log_cap: float
    means: dict[str, float] = field(compare=False)
    residuals: Tensor = field(compare=False)

    @property
    def point(self) -> tuple[float, float]:
        return (self.square, self.log_cap)


#: From a number of draws to a function from a point to residuals, and what it has tried.
_Search = tuple[Callable[[float, float], Tensor], list[_Tried]]


def _best_of_spread(search: Callable[[int], _Search], count: int, log_noise: float, size: int) -> _Tried:
    """From the best of a few points on."""
    residuals, found = search(max(2, round(_SHARE_AT_START * count)))
    for square in _SQUARES if size < _SMALL else _SQUARES[-1:]:
        for cap in _CAPS:
            residuals(square, log_noise + cap)
    start = min(found).point
    residuals, found = search(count)
    residuals(*start)
    for _ in range(_SMALL_ROUNDS if size < _SMALL else _ROUNDS):
        best = min(found)
        slope = _slope(residuals, best)
        for damping in _DAMPINGS:
            residuals(*_moved(best, slope, damping))
            if min(found) is not best:
                break
        if min(found) is best:
            break
    return min(found)


def _slope(residuals: Callable[[float, float], Tensor], here: _Tried) -> Tensor:
    """Derivatives ``(R, 2)`` by the square of the factor and by the cap relative to what it is, from differences."""
    difference, times = _DIFFERENCES
    if here.square + difference > _MAX_FACTOR**2:
        difference = -difference
    by_square = (residuals(here.square + difference, here.log_cap) - here.residuals) / difference
    by_cap = (residuals(here.square, here.log_cap + math.log1p(times)) - here.residuals) / times
    return torch.stack([by_square, by_cap], 1)


def _moved(here: _Tried, slope: Tensor, damping: float) -> tuple[float, float]:
    """The point after a step of Levenberg and Marquardt."""
    product = slope.mT @ slope
    ridge = damping * product.diagonal() + _RIDGE
    square, cap = (-torch.linalg.solve(product + ridge.diag(), slope.mT @ here.residuals)).tolist()
    inside = min(max(here.square + square, 0.0), _MAX_FACTOR**2) - here.square
    if inside != square:  # at a bound, the cap alone is free
        left = here.residuals + inside * slope[:, 0]
        cap = -float(slope[:, 1] @ left / (product[1, 1] + ridge[1]))
    log = math.log(max(1 + cap, math.exp(-_LARGEST_LOG)))
    return here.square + inside, here.log_cap + min(log, _LARGEST_LOG)


def _set(generator: SubspaceGenerator, unscaled: Tensor, square: float, log_cap: float) -> None:
    generator.spread.copy_(unscaled * square**0.5)
    generator.noise_cap.fill_(min(max(log_cap, -20.0), 20.0)).exp_()  # so that squares of ratios to it are finite


def _typical_noise(generator: SubspaceGenerator) -> Tensor:
    scales = [
        (part.noise_rows.median() * part.noise_columns.median()).reshape(1) for part in generator.parts_in_order()
    ]
    return torch.cat(scales).median().clamp_min(1e-20)
