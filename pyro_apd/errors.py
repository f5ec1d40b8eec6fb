# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What can go wrong, by name. Each message says what came, what is accepted, and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class ModelError(ValueError):
    """The model, as written, has no potential that could be sampled as asked."""


class DataError(ValueError):
    """The data contain something that no posterior can be conditioned on, such as NaN."""


class ArtifactError(ValueError):
    """A file is not a distilled posterior that this version can read."""


class DivergenceError(ArithmeticError):
    """A chain left the region where its step size is stable.

    :param str message: what happened, where, and the mend.
    :param int step: Langevin step (warm-up included) at which it was noticed.
    :param str site: the latent site that moved furthest.
    :param float step_size: step size at that step.
    :param float suggested_step_size: a stable step size by the curvature met.
    :param dict draws: what the chain had drawn before, constrained, ``(S, ...)`` a site.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int,
        site: str,
        step_size: float,
        suggested_step_size: float,
        draws: Mapping[str, Tensor],
    ) -> None:
        super().__init__(message)
        self.step = step
        self.site = site
        self.step_size = step_size
        self.suggested_step_size = suggested_step_size
        self.draws = dict(draws)

    def __reduce__(self) -> tuple[object, ...]:
        # Pyro's parallel driver sends exceptions through a queue; keyword-only arguments need help.
        return (_rebuild_divergence, (str(self), self.__dict__.copy()))


def _rebuild_divergence(message: str, state: dict) -> DivergenceError:
    return DivergenceError(message, **state)
