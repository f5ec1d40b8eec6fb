# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Calibrates two numbers of the default generator, so that its draws disagree as much as the chain's do.

A Gaussian distribution around the modes, and independent noise, leave the curved surface on which a chain moves. Near
the data both make draws disagree too much. So the spread around modes is multiplied by a factor, and the scale of noise
is capped: noise in directions that the data determine is cut, and in others, which give functions their spread far from
the data, kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.function_space import FunctionSpace, joined
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators.base import stratified
from pyro_apd.generators.draw_blocks import DrawBlocks, draws_per_block
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.seeds import fresh_seed

# Draws that are compared: as many as have these numbers in all, within bounds; of costly networks fewer.
_NUMBERS, _MIN_DRAWS, _MAX_DRAWS, _FEW_DRAWS = 4_000_000, 100, 200, 40
# Inputs of all groups: as many as take these multiplications for all draws, within bounds.
_PRODUCTS, _MIN_PROBES, _MAX_PROBES = 6_000_000_000, 60, 1000
# A network is costly from these multiplications per input on.
_COSTLY = 1_000_000
# Weights of inputs: rows of the data, mixtures of rows and rows with noise, and noise alone.
_WEIGHTS = {"rows": 1.0, "near": 1.0, "far": 0.5}
# The search starts at the best of these: squares of the factor, and caps in logarithms of the typical noise. Of small
# networks all are tried, of others those with the last square.
_SQUARES, _CAPS = (0.0, 0.25), (-3.0, -2.0, -1.0, 0.0, 1.0)
_SMALL = 20_000
# Rounds of Gauss-Newton; steps of its differences, and its largest steps, in squares of the factor and logs of the cap.
_ROUNDS = 2
_DIFFERENCES, _LARGEST = (0.2, 0.5), (0.4, 1.5)
_MAX_FACTOR = 1.1
_RIDGE = 1e-4


@dataclass(frozen=True)
class Calibration:
    """What was found.

    :ivar float spread: factor of the spread around modes.
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

    :param functions: how draws are compared, and the inputs.
    :param DrawBlocks draws: of the chain.
    :param int num_products: multiplications of a network per input.
    """
    space, probes = functions
    by_size = max(_MIN_DRAWS, min(_MAX_DRAWS, _NUMBERS // generator.output_size))
    count = min(_FEW_DRAWS if num_products > _COSTLY else by_size, len(draws))
    num_probes = max(_MIN_PROBES, min(_MAX_PROBES, _PRODUCTS // max(1, num_products * count)))
    groups = {name: inputs for name, inputs in probes.groups(2 * num_probes // 5).items() if name in _WEIGHTS}
    chain = _disagreements(space, groups, draws.spaced(count))
    seed, like = fresh_seed(), generator.step.detach()
    spread_CR, noise = generator.spread.clone(), _typical_noise(generator)
    found: list[_Tried] = []

    def residuals(square: float, log_cap: float) -> Tensor:
        _set(generator, spread_CR, square, log_cap)
        with seeded(seed, like.device):
            own = _disagreements(space, groups, _draws(generator, count, like))
        ratios = [(own[name] / chain[name]).log().double().cpu() for name in groups]
        ratios = [ratio.nan_to_num(nan=10.0, posinf=10.0, neginf=-10.0) for ratio in ratios]
        weighted = torch.cat([(_WEIGHTS[n] / len(r)) ** 0.5 * r for n, r in zip(groups, ratios, strict=True)])
        means = {name: float(ratio.mean()) for name, ratio in zip(groups, ratios, strict=True)}
        found.append(_Tried(float(weighted.square().sum()), square, log_cap, means))
        return weighted

    for square in _SQUARES if generator.output_size < _SMALL else _SQUARES[-1:]:
        for cap in _CAPS:
            residuals(square, float(noise.log()) + cap)
    point = torch.tensor(min(found).point, dtype=torch.float64)
    for _ in range(_ROUNDS):
        point = _improved(residuals, point)
    residuals(*point.tolist())
    best = min(found)
    _set(generator, spread_CR, *best.point)
    return Calibration(best.square**0.5, float(generator.noise_cap), best.means)


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


def _improved(residuals: Callable[[float, float], Tensor], point: Tensor) -> Tensor:
    """A step of Gauss-Newton, with differences for the derivatives."""
    here = residuals(*point.tolist())
    columns = []
    for i, (difference, bound) in enumerate(zip(_DIFFERENCES, (_MAX_FACTOR**2, torch.inf), strict=True)):
        difference = difference if point[i] + difference <= bound else -difference
        moved = point.clone()
        moved[i] += difference
        columns.append((residuals(*moved.tolist()) - here) / difference)
    slope = torch.stack(columns, 1)
    step = -torch.linalg.solve(slope.mT @ slope + _RIDGE * torch.eye(2, dtype=slope.dtype), slope.mT @ here)
    largest = torch.tensor(_LARGEST, dtype=step.dtype)
    point = point + step.clamp(-largest, largest)
    point[0] = point[0].clamp(0.0, _MAX_FACTOR**2)
    return point


def _set(generator: SubspaceGenerator, spread_CR: Tensor, square: float, log_cap: float) -> None:
    generator.spread.copy_(spread_CR * square**0.5)
    generator.noise_cap.fill_(min(max(log_cap, -20.0), 20.0)).exp_()  # so that squares of ratios to it are finite


def _draws(generator: SubspaceGenerator, count: int, like: Tensor) -> Iterator[Tensor]:
    """Draws in blocks, evenly spread over modes all together."""
    place_S1 = stratified(torch.empty(count, 1, dtype=like.dtype, device=like.device))
    for place_N1 in place_S1.split(draws_per_block(generator.latent_size * like.element_size())):
        noise_NL = torch.randn(len(place_N1), generator.latent_size - 1, dtype=like.dtype, device=like.device)
        yield generator(torch.cat([place_N1, noise_NL], 1))


def _typical_noise(generator: SubspaceGenerator) -> Tensor:
    scales = [
        (part.noise_rows.median() * part.noise_columns.median()).reshape(1) for part in generator.parts_in_order()
    ]
    return torch.cat(scales).median().clamp_min(1e-20)


def _disagreements(
    space: FunctionSpace, groups: dict[str, tuple[Tensor, ...]], blocks: Iterable[Tensor]
) -> dict[str, Tensor]:
    """By group of inputs, how far draws disagree on average."""
    inputs = tuple(torch.cat(rows) for rows in zip(*groups.values(), strict=True))
    views = joined(space.views(theta_SD, inputs) for theta_SD in blocks)
    lengths = [len(rows[0]) for rows in groups.values()] if inputs else [len(views[0])]
    parts = zip(*(view.split(lengths) for view in views), strict=True)
    tiny = 1e-30
    return {name: space.disagreement(list(part)).clamp_min(tiny) for name, part in zip(groups, parts, strict=True)}
