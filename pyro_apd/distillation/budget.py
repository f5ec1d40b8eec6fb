# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which generator to train, and for how long, by the size of the network."""

from __future__ import annotations

from dataclasses import dataclass

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
