# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Weights of rows and of classes: by what the log-likelihood of each row is multiplied."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.likelihoods import Bernoulli, Categorical, Likelihood, Ordinal


def checked_class_weight(class_weight: Any, likelihood: Likelihood) -> Tensor | None:
    """Weights of classes as a tensor ``(K,)``.

    :raises ValueError: if they are not positive finite numbers, or the targets of the likelihood are no classes.
    """
    if class_weight is None:
        return None
    if not isinstance(likelihood, (Categorical, Bernoulli, Ordinal)):
        raise ValueError(
            f"class_weight belongs to likelihood='categorical', 'bernoulli' or 'ordinal'; this one is "
            f"{likelihood.name!r}. Give rows weights of their own: bnn(x, y, weights)."
        )
    weights = torch.as_tensor(class_weight)
    if weights.dim() != 1 or not all(math.isfinite(w) and w > 0 for w in weights.tolist()):
        raise ValueError(f"class_weight={class_weight!r} must be one positive finite number for each class.")
    return weights


def row_scale(
    likelihood: Likelihood, class_weight: Tensor | None, y: Tensor, weights: Any, output: Tensor
) -> Tensor | None:
    """By what the log-likelihood of each row is multiplied, ``(N,)``; None where all rows count once.

    :param class_weight: ``(K,)``.
    :param y: targets.
    :param weights: of rows, ``(N,)``.
    :raises DataError: if the weights of rows do not have this shape, or some are negative or not finite.
    :raises ModelError: if there are not as many weights of classes as classes.
    """
    scale = None if weights is None else _checked_weights(weights, output)
    if class_weight is not None:
        num_classes = likelihood.num_classes(output)
        if num_classes != len(class_weight):
            classes = "no single class for each row" if num_classes is None else f"{num_classes} classes"
            raise ModelError(
                f"class_weight has {len(class_weight)} numbers, but the network gives {classes}. Give one for each."
            )
        of_class = class_weight[y.long()]
        scale = of_class if scale is None else scale * of_class
    # Pyro refuses a scale of 0. A factor so small adds nothing to the sum of the other rows.
    return None if scale is None else scale.clamp(min=torch.finfo(scale.dtype).tiny)


def _checked_weights(weights: Any, output: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or weights.shape != (len(output),):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise DataError(f"weights must be a tensor of shape ({len(output)},), one for each row; got {got}.")
    # Reading values waits for the device, so they are checked only where Pyro would check them, too.
    if dist.is_validation_enabled() and not ((weights >= 0) & weights.isfinite()).all():
        raise DataError("weights must be finite and not negative; got others. A weight of 0 leaves a row out.")
    return weights.to(output.dtype)
