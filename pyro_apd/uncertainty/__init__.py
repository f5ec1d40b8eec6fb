# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How unsure a posterior is about each datum: scores from what many draws predict.

**Classification.** Functions take ``probs_SNK``, probabilities of ``K`` classes for ``N`` data under each of ``S``
draws, and return one score a datum, ``(N,)``. Entropies are in nats. Half-precision input is computed in ``float32``.
Each raises :exc:`ValueError` if ``probs_SNK`` is not a floating-point tensor of three dimensions with at least one
draw and one class, holds NaN or negative entries, or has classes that do not sum to one.

**Regression.** Functions take ``mean_SN`` and ``variance_SN``, the mean and variance of each observation given the
weights of each draw, and return variances ``(N,)`` in the squared unit of the targets, by the law of total variance:
the *aleatoric* variance, of noise, plus the *epistemic* variance, of weights. Each raises
:exc:`ValueError` if a tensor is not floating-point, two-dimensional and finite, with at least one draw, or a variance
is negative.

**Streams.** :class:`ClassificationStream` and :class:`RegressionStream` take draws some at a time and give the same
scores at the end. For a model and its draws there is :func:`pyro_apd.reduce_outputs`, which also makes the predictions.
"""

from pyro_apd.uncertainty.scores import (
    ClassificationStream,
    RegressionStream,
    aleatoric_variance,
    epistemic_variance,
    expected_entropy,
    max_probability,
    model_variance,
    mutual_information,
    predictive_entropy,
    total_variance,
    variation_ratio,
)

__all__ = [
    "ClassificationStream",
    "RegressionStream",
    "aleatoric_variance",
    "epistemic_variance",
    "expected_entropy",
    "max_probability",
    "model_variance",
    "mutual_information",
    "predictive_entropy",
    "total_variance",
    "variation_ratio",
]
