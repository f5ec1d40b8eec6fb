# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a site is a sum over rows, by gradients, where its terms are too large to show it.

Of a target of 100,000 with unit noise, a term is 5e9, and an effect of other rows on it is lost in the rounding. Its
gradient has no part that is the same for all latents, and differences of gradients have none that is linear in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pyro_apd.models.row_terms import ModelRun, RowProbe, relative_rounding

#: Runs on the two sides of an equation.
Sides = tuple[Sequence[ModelRun], Sequence[ModelRun]]


def rounding_hides(one: Tensor, other: Tensor) -> bool:
    """Whether terms at two values of the latents differ by so little that parts of the difference are not seen."""
    if len(one) != len(other):
        return False
    size, change = (float(terms.double().square().mean()) ** 0.5 for terms in (one, one.double() - other.double()))
    is_lost: bool = relative_rounding(one) * size > 0.01 * change
    return is_lost


def gradients_differ(probe: RowProbe, name: str, points: Sequence[Sides], factor: Callable[[int], float]) -> bool:
    """Whether sums of gradients that should be equal are not, beyond rounding.

    :param name: an observed site.
    :param points: the runs of both sides of an equation, at each of some values of the latents.
    :param factor: what is multiplied, by number of rows.
    """

    def gradients(side: Sequence[ModelRun]) -> list[Tensor]:
        by_run = [[factor(run.num_rows) * g.double() for g in probe.gradients(run, name)] for run in side]
        return [torch.stack(by_latent) for by_latent in zip(*by_run, strict=True)]

    rtol = 50 * relative_rounding(points[0][0][0].site(name).terms)
    if rtol > 0.1:  # of a coarse dtype
        return False
    found = [(gradients(left), gradients(right)) for left, right in points]
    changes = [
        tuple([one - other for one, other in zip(*sides, strict=True)] for sides in zip(first, second, strict=True))
        for first, second in pairwise(found)
    ]
    size = max((_size(*sides) for sides in zip(*found[0], strict=True)), default=0.0)
    return any(
        float((one.sum(0) - other.sum(0)).norm()) > rtol * _size(one, other) + floor * size
        for sums, floor in ((found, 0.01 * rtol), (changes, 2e-4 * rtol))
        for left, right in sums
        for one, other in zip(left, right, strict=True)
    )


def _size(one: Tensor, other: Tensor) -> float:
    return float(one.norm() + other.norm())
