# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Metrics of a generator on held-out draws, by which training chooses the state that it keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyro_apd.distillation.distances import nearest_neighbour_distance, spread
from pyro_apd.distillation.function_space import FunctionSpace, joined
from pyro_apd.distillation.probes import Probes


class Evaluator(ABC):
    """Metrics of a generator on held-out draws. The state with the smallest ``distance`` is kept, never the best NLL.

    :cvar float tolerance: a later state replaces an earlier one whose distance is smaller by less than this.
    """

    tolerance = 0.0

    @abstractmethod
    def metrics(self, theta: Tensor | Iterable[Tensor]) -> dict[str, float]:
        """``distance``, ``spread_ratio`` and, for classification, ``mi_ratio`` of generated draws.

        :param theta: draws ``(S, D)``, or blocks of them.
        """


class FunctionEvaluator(Evaluator):
    """Compares in function space, at fixed probe inputs.

    Distances, in units of the chain's spread, have an error of about a hundredth.

    :param held_out: draws of the chain that are not trained on, ``(T, D)``, or blocks of them.
    """

    tolerance = 0.01

    def __init__(
        self, space: FunctionSpace, probes: Probes, held_out: Tensor | Iterable[Tensor], num_probes: int = 96
    ) -> None:
        self._space = space
        self._inputs = probes.draw(num_probes)
        self._real = self._views(held_out)

    @torch.no_grad()
    def _views(self, theta: Tensor | Iterable[Tensor]) -> list[Tensor]:
        return joined(self._space.views(block_ND, self._inputs) for block_ND in _blocks(theta))

    @torch.no_grad()
    def metrics(self, theta: Tensor | Iterable[Tensor]) -> dict[str, float]:
        """See :class:`Evaluator`."""
        fake = self._views(theta)
        real = self._real
        if not all(bool(value.isfinite().all()) for value in fake):
            return {"distance": math.nan, "spread_ratio": math.nan}
        metrics = {
            "distance": float(self._space.distance(fake, real)),
            "spread_ratio": _ratio(spread(fake[-1]).mean(), spread(real[-1]).mean()),
        }
        fake_mi = self._space.mutual_information(fake)
        real_mi = self._space.mutual_information(real)
        if fake_mi is not None and real_mi is not None:
            metrics["mi_ratio"] = _ratio(fake_mi, real_mi)
        return metrics


class WeightEvaluator(Evaluator):
    """Compares in weight space, where no functions are known.

    :param callable features: from draws ``(S, D)`` to the features that are compared, ``(S, F)``.
    :param held_out: draws of the chain that are not trained on, ``(T, D)``, or blocks of them.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], held_out: Tensor | Iterable[Tensor]) -> None:
        self._features = features
        self._real_TF = torch.cat([features(block_ND) for block_ND in _blocks(held_out)])

    @torch.no_grad()
    def metrics(self, theta: Tensor | Iterable[Tensor]) -> dict[str, float]:
        """See :class:`Evaluator`."""
        fake_SF = torch.cat([self._features(block_ND) for block_ND in _blocks(theta)])
        return {
            "distance": float(nearest_neighbour_distance(fake_SF, self._real_TF)),
            "spread_ratio": _ratio(spread(fake_SF[None])[0], spread(self._real_TF[None])[0]),
        }


def _blocks(theta: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return (theta,) if isinstance(theta, Tensor) else theta


def _ratio(fake: Tensor, real: Tensor) -> float:
    return float(fake / real.clamp(min=torch.finfo(real.dtype).eps))
