# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which generator to train, and for how long, by the size of the network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from pyro_apd.runtime.dispatch import dispatch_mode
from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")

# Weights, or multiplications per prediction, from which a training computes less.
_LARGE = 1_000_000


@dataclass(frozen=True)
class TrainingBudget:
    """How much a training computes.

    :ivar int num_steps: generator steps.
    :ivar int batch_size: draws of the generator, and as many of the chain, per step.
    :ivar int num_probes: inputs at which they are compared.
    :ivar int num_evaluation_draws: draws of the generator, and held-out draws at most, per evaluation.
    :ivar int num_evaluations: how many states of the generator are evaluated.
    """

    num_steps: int = 500
    batch_size: int = 64
    num_probes: int = 96
    num_evaluation_draws: int = 200
    num_evaluations: int = 20

    @classmethod
    def of(cls, num_weights: int, num_products: int = 0) -> TrainingBudget:
        """The defaults. Large networks get less of everything, so that no training takes longer than that of a fully
        connected network of a million weights.

        :param int num_weights: numbers of a draw.
        :param int num_products: multiplications per prediction for one input. They are many times the weights where
            these are shared, as in convolutions.
        """
        ratio = max(num_weights, num_products) / _LARGE
        if ratio <= 1:
            return cls()
        return cls(
            num_steps=max(50, round(500 / ratio)),
            batch_size=max(16, round(64 / ratio**0.5)),
            num_evaluation_draws=max(40, round(200 / ratio**0.5)),
            num_evaluations=max(5, round(20 / ratio**0.5)),
        )


@dataclass(frozen=True)
class PredictionCost:
    """Cost of a prediction with one draw.

    :ivar int num_products: multiplications, in matrix products and convolutions.
    :ivar int num_bytes: size of all intermediate results, which a gradient keeps.
    """

    num_products: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, function: Callable[[], object]) -> PredictionCost:
        """Measured by calling the function once; zero where torch cannot count an operation."""
        try:
            with torch.no_grad(), _counter() as counter:
                function()
        except Exception as error:
            logger.debug("The cost of a prediction is not known: %s.", error)
            return cls()
        return cls(counter.num_products, counter.num_bytes)


def _counter() -> Any:
    """A dispatch mode that adds up the multiplications of operations, and the sizes of their results, except views of
    their arguments.

    :raises ImportError: see :func:`dispatch_mode`.
    """

    class Counter(dispatch_mode()):  # type: ignore[misc]
        num_products = 0
        num_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            arguments = {_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            results = func(*args, **kwargs)
            operations = flop_registry.get(func.overloadpacket)
            if operations is not None:
                self.num_products += int(operations(*args, **kwargs, out_val=results)) // 2
            for value in tree_leaves(results):
                if isinstance(value, Tensor) and _address(value) not in arguments:
                    self.num_bytes += value.numel() * value.element_size()
            return results

    return Counter()


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
