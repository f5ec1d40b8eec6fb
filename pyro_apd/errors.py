# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of the package. Each message says what was given, what is accepted, and how to fix it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Longer messages are shortened, since what they quote may come from a hostile file.
_MAX_MESSAGE = 900


def shortened(message: str) -> str:
    """A message without its middle, where it is long, and on one line for characters that cannot be printed."""
    text = message
    if len(text) > _MAX_MESSAGE:
        text = f"{text[: _MAX_MESSAGE * 2 // 3]} [...] {text[-_MAX_MESSAGE // 3 :]}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class ModelError(ValueError):
    """The model has no potential that can be sampled as requested."""


class DataError(ValueError):
    """The data contain something that no posterior can be conditioned on, such as NaN."""


class ArtifactError(ValueError):
    """A file is no distilled posterior that this version can read, or a posterior is not of the model given."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class ExportError(ValueError):
    """A posterior cannot be written as a program."""


class DivergenceError(ArithmeticError):
    """A chain left the region where its step size is stable.

    :param str message: what happened, where, and how to fix it.
    :param int step: Langevin step (warm-up included) at which it was noticed.
    :param str site: the latent site that moved furthest.
    :param float step_size: step size at that step.
    :param float suggested_step_size: a stable step size, estimated from the curvature.
    :param dict draws: the chain's earlier draws, constrained, ``(S, ...)`` by site.
    :param int chain: index of the chain, among those that advance together.
    :param int last_good_step: Langevin step of the last check that the chain passed.
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
        chain: int = 0,
        last_good_step: int = 0,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.site = site
        self.step_size = step_size
        self.suggested_step_size = suggested_step_size
        self.draws = dict(draws)
        self.chain = chain
        self.last_good_step = last_good_step

    def to_json(self) -> dict[str, Any]:
        """All but the draws, for a checkpoint."""
        return {"message": str(self), **{name: value for name, value in self.__dict__.items() if name != "draws"}}

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> DivergenceError:
        """Inverse of :meth:`to_json`, without draws."""
        return cls(**description, draws={})

    def __reduce__(self) -> tuple[object, ...]:
        # Pyro's parallel driver sends exceptions through a queue; keyword-only arguments need help.
        return (_rebuild_divergence, (str(self), self.__dict__.copy()))


def _rebuild_divergence(message: str, state: dict[str, Any]) -> DivergenceError:
    return DivergenceError(message, **state)
