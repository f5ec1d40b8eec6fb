# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Scales the modes of a default generator in which each draw of the chain is one, so that its draws predict with as
much uncertainty as the chain's.

The coordinates that are left out take a share of the disagreement with them. A larger factor of the modes brings it
back, and blurs the averaged prediction, as rounding does. So the factor is chosen for both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_apd.distillation.chosen_inputs import ChosenInputs, values_at
from pyro_apd.distillation.function_space import FunctionSpace
from pyro_apd.generators.draw_blocks import DrawBlocks, blocks_of_draws
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.seeds import fresh_seed

# Bounds of the factor, and how much its square is changed to find out what follows from it.
_MIN_FACTOR, _MAX_FACTOR, _DIFFERENCE = 0.9, 1.3, 0.08
#: Relative numbers of inputs, by group. Far from the data, rounding makes draws disagree more, at any factor.
SHARES_OF_MODES = {"rows": 2.0, "near": 1.0}
# An error of the averaged prediction's entropy counts as much as one of the disagreement that is larger by this.
_WEIGHT_OF_ENTROPY = 2.5
_LEAST_SLOPE = 0.3


@torch.no_grad()
def scale_modes(
    generator: SubspaceGenerator, space: FunctionSpace, inputs: ChosenInputs, draws: DrawBlocks, count: int
) -> tuple[float, dict[str, float]]:
    """Multiplies the modes, and returns the factor, and logarithms of ratios of disagreements by group of inputs.

    Between two trials the latter are those of a line, as the factor is.

    With draws of the modes of the ``count`` draws of the chain that it is compared with, so that it matters less which
    these are; with torch's global random numbers.
    """
    unscaled, seed, device = generator.modes.clone(), fresh_seed(), generator.step.device
    chain = _uncertainty(space, inputs, draws.spaced(count))

    def errors(square: float) -> list[dict[str, Tensor]]:
        generator.modes.copy_(unscaled * square**0.5)
        with seeded(seed, device):
            own = _uncertainty(space, inputs, blocks_of_draws(generator, count, len(draws)))
        return [
            {name: (ours[name] / theirs[name]).log().double().nan_to_num(nan=10.0).clamp(-10, 10) for name in ours}
            for ours, theirs in zip(own, chain, strict=True)
        ]

    here, there = errors(1.0), errors(1.0 + _DIFFERENCE)
    square = _best_square(here, there)
    share = (square - 1.0) / _DIFFERENCE
    if 0.0 <= share <= 1.0:
        found = {name: torch.lerp(here[0][name], there[0][name], share) for name in here[0]}
    else:
        found = errors(square)[0]  # a line tells little beyond the trials
    generator.modes.copy_(unscaled * square**0.5)
    return square**0.5, {name: float(values_F.mean()) for name, values_F in found.items()}


def _uncertainty(space: FunctionSpace, inputs: ChosenInputs, blocks: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """Mean disagreement, and of a classifier the mean entropy of averaged predictions, by group of inputs."""
    views = values_at(space, blocks, inputs.rows)
    entropy_P1 = space.entropies(views)
    found = [inputs.means(space.disagreements(views))]
    return found if entropy_P1 is None else [*found, inputs.means(entropy_P1)]


def _best_square(here: list[dict[str, Tensor]], there: list[dict[str, Tensor]]) -> float:
    """Least squares of errors that are linear in the square of the factor, from those at one and at the second."""
    product, norm = 0.0, 0.0
    for weight, one, other in zip((1.0, _WEIGHT_OF_ENTROPY**2), here, there, strict=False):
        for name in one:
            error, slope = float(one[name].mean()), float((other[name] - one[name]).mean()) / _DIFFERENCE
            product, norm = product + weight * error * slope, norm + weight * slope**2
    change = -product / max(norm, _LEAST_SLOPE**2)
    return min(max(1.0 + change, _MIN_FACTOR**2), _MAX_FACTOR**2)
