# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Calibrates two numbers of the default generator, so that its draws disagree as much as the chain's do.

A Gaussian distribution around the modes, and independent noise, leave the curved surface on which a chain moves. Near
the data both make draws disagree too much. So the spread around modes is multiplied by a factor, and the scale of noise
is capped: noise in directions that the data determine is cut, and in others, which give functions their spread far from
the data, kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.chosen_inputs import NUM_CHOOSING, ChosenInputs
from pyro_apd.distillation.function_space import FunctionSpace
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators.draw_blocks import DrawBlocks, draws_per_block
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.seeds import fresh_seed

# Draws that are compared: as many as have these numbers in all, within bounds; of costly networks fewer.
_NUMBERS, _MIN_DRAWS, _MAX_DRAWS, _FEW_DRAWS = 4_000_000, 100, 200, 40
# Inputs of all groups: as many as take these multiplications for all draws, within bounds. They are chosen among so
# many times as many at most, by how far these draws of the chain disagree there.
_PRODUCTS, _MIN_PROBES, _MIN_PROBES_OF_MODES, _MAX_PROBES = 24_000_000_000, 60, 100, 1000
_CANDIDATES = 4
# A network is costly from these multiplications per input on.
_COSTLY = 1_000_000
# Weights of inputs: rows of the data, mixtures of rows and rows with noise, and noise alone. With four times the weight
# of those near the data, draws of small networks disagree up to 20 % too much on the data.
_WEIGHTS = {"rows": 1.0, "near": 1.0, "far": 0.5}
# The search starts at the best of these, found by this share of the draws: squares of the factor, and caps in
# logarithms of the typical noise. Of small networks all are tried, of others those with the last square.
_SQUARES, _CAPS = (0.0, 0.25), (-3.0, -2.0, -1.0, 0.0, 1.0)
_SHARE_AT_START = 0.3
_SMALL = 20_000
# Rounds of Gauss-Newton; steps of its differences, and its largest steps, in squares of the factor and logs of the cap.
_ROUNDS = 2
_DIFFERENCES, _DIFFERENCES_OF_GAIN, _LARGEST = (0.2, 0.5), (0.05,), (0.4, 1.5)
_MAX_FACTOR, _MIN_GAIN, _MAX_GAIN = 1.1, 0.9, 1.3
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
) -> Calibration:
    """Sets spread and cap of noise by the draws of the chain, with torch's global random numbers.

    Where each draw is a mode there is no spread, and the modes are multiplied instead: the directions that are left out
    take a share of the disagreement with them, which noise does not bring back.

    :param functions: how draws are compared, and the inputs.
    :param DrawBlocks draws: of the chain.
    :param int num_products: multiplications of a network per input.
    """
    space, probes = functions
    scale, noise = _Scale.of(generator), _typical_noise(generator)
    by_size = max(_MIN_DRAWS, min(_MAX_DRAWS, _NUMBERS // generator.output_size))
    count = min(_FEW_DRAWS if num_products > _COSTLY else by_size, len(draws))
    fewest = _MIN_PROBES if scale.is_of_spread else _MIN_PROBES_OF_MODES
    num_probes = max(fewest, min(_MAX_PROBES, _PRODUCTS // max(1, num_products * count)))
    num_candidates = min(_CANDIDATES * num_probes, _PRODUCTS // max(1, num_products * NUM_CHOOSING))
    inputs = ChosenInputs.chosen(space, probes, draws, num_probes, max(num_probes, num_candidates))
    seed, device = fresh_seed(), generator.step.device

    def search(count: int) -> tuple[Callable[[float, float], Tensor], list[_Tried]]:
        """A function from a point to residuals, with so many draws, and what it has tried."""
        chain = inputs.disagreements(space, draws.spaced(count))
        found: list[_Tried] = []

        def residuals(square: float, log_cap: float) -> Tensor:
            _set(generator, scale, square, log_cap)
            with seeded(seed, device):
                own = inputs.disagreements(space, blocks_of_draws(generator, count, len(draws)))
            ratios = {name: (own[name] / chain[name]).log().double().cpu() for name in own}
            ratios = {name: ratio.nan_to_num(nan=10.0, posinf=10.0, neginf=-10.0) for name, ratio in ratios.items()}
            weighted = torch.cat([(_WEIGHTS[name] / len(ratio)) ** 0.5 * ratio for name, ratio in ratios.items()])
            means = {name: float(ratio.mean()) for name, ratio in ratios.items()}
            found.append(_Tried(float(weighted.square().sum()), square, log_cap, means))
            return weighted

        return residuals, found

    residuals, found = search(max(2, round(_SHARE_AT_START * count)))
    for square in scale.squares(generator.output_size):
        for cap in scale.caps:
            residuals(square, float(noise.log()) + cap)
    point = torch.tensor(min(found).point, dtype=torch.float64)
    residuals, found = search(count)
    for _ in range(scale.num_rounds):
        point = _improved(residuals, point, scale)
    residuals(*point.tolist())
    best = min(found)
    _set(generator, scale, *best.point)
    return Calibration(best.square**0.5, float(generator.noise_cap), best.means)


@dataclass(frozen=True)
class _Scale:
    """What the first number is a factor of: the spread, or the modes where there is none.

    :ivar Tensor unscaled: what it was.
    :ivar tuple bounds: of the square of the factor.
    :ivar tuple differences: for derivatives: of the square, and of the logarithm of the cap unless noise has no effect.
    """

    unscaled: Tensor
    is_of_spread: bool
    bounds: tuple[float, float]
    differences: tuple[float, ...]

    @classmethod
    def of(cls, generator: SubspaceGenerator) -> _Scale:
        if bool(generator.spread.any()):
            return cls(generator.spread.clone(), True, (0.0, _MAX_FACTOR**2), _DIFFERENCES)
        return cls(generator.modes.clone(), False, (_MIN_GAIN**2, _MAX_GAIN**2), _DIFFERENCES_OF_GAIN)

    @property
    def caps(self) -> tuple[float, ...]:
        """With which the search starts: one where noise has no effect."""
        return _CAPS if self.is_of_spread else (0.0,)

    @property
    def num_rounds(self) -> int:
        """The disagreement is nearly linear in the square of a factor of the modes."""
        return _ROUNDS if self.is_of_spread else 1

    def squares(self, size: int) -> tuple[float, ...]:
        """With which the search starts."""
        if not self.is_of_spread:
            return (1.0,)
        return _SQUARES if size < _SMALL else _SQUARES[-1:]


@dataclass(frozen=True, order=True)
class _Tried:
    """A spread and a cap, and how well they do."""

    loss: float
    square: float
    log_cap: float
    means: dict[str, float] = field(compare=False)

    @property
    def point(self) -> tuple[float, float]:
        return (self.square, self.log_cap)


def _improved(residuals: Callable[[float, float], Tensor], point: Tensor, scale: _Scale) -> Tensor:
    """A step of Gauss-Newton, with differences for the derivatives."""
    here = residuals(*point.tolist())
    columns = []
    for i, (difference, bound) in enumerate(zip(scale.differences, (scale.bounds[1], torch.inf), strict=False)):
        difference = difference if point[i] + difference <= bound else -difference
        moved = point.clone()
        moved[i] += difference
        columns.append((residuals(*moved.tolist()) - here) / difference)
    slope = torch.stack(columns, 1)
    ridge = _RIDGE * torch.eye(len(columns), dtype=slope.dtype)
    step = -torch.linalg.solve(slope.mT @ slope + ridge, slope.mT @ here)
    largest = torch.tensor(_LARGEST[: len(columns)], dtype=torch.float64)
    point = point.clone()
    point[: len(columns)] += step.clamp(-largest, largest)
    point[0] = point[0].clamp(*scale.bounds)
    return point


def _set(generator: SubspaceGenerator, scale: _Scale, square: float, log_cap: float) -> None:
    scaled = generator.spread if scale.is_of_spread else generator.modes
    scaled.copy_(scale.unscaled * square**0.5)
    generator.noise_cap.fill_(min(max(log_cap, -20.0), 20.0)).exp_()  # so that squares of ratios to it are finite


@torch.no_grad()
def blocks_of_draws(generator: SubspaceGenerator, count: int, num_draws: int) -> Iterator[Tensor]:
    """Draws in blocks, of the modes of the chain's draws that they are compared with, with global random numbers.

    Which of the chain's draws are taken then matters less: the same are on both sides.

    :param int num_draws: of the chain, of which ``count`` are taken, evenly spaced.
    """
    like = generator.step
    row_S = torch.linspace(0, num_draws - 1, count, dtype=torch.float64).round()  # as DrawBlocks.spaced
    place_S1 = torch.special.ndtri((row_S + 0.5) / num_draws).to(like).unsqueeze(1)
    for place_N1 in place_S1.split(draws_per_block(generator.latent_size * like.element_size())):
        latent_NL = place_N1.new_empty(len(place_N1), generator.latent_size)
        latent_NL[:, :1] = place_N1
        for latent_L in latent_NL:
            # One at a time: random numbers of a tensor depend on its shape, and blocks must not change the result.
            latent_L[1:] = torch.randn(generator.latent_size - 1, dtype=like.dtype, device=like.device)
        yield generator(latent_NL)


def _typical_noise(generator: SubspaceGenerator) -> Tensor:
    scales = [
        (part.noise_rows.median() * part.noise_columns.median()).reshape(1) for part in generator.parts_in_order()
    ]
    return torch.cat(scales).median().clamp_min(1e-20)
