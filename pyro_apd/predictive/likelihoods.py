# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is kept of an observed site: functions of its distribution, and of its observations, datum by datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_apd.errors import ModelError
from pyro_apd.models.observations import scored
from pyro_apd.predictive.messengers import plain
from pyro_apd.predictive.observed_site import ObservedSite


def kind(fn: Any) -> str:
    """``"categorical"``, ``"bernoulli"``, ``"normal"`` or ``"other"``."""
    if isinstance(fn, (dist.Categorical, dist.OneHotCategorical)):
        return "categorical"
    if isinstance(fn, dist.Bernoulli):
        return "bernoulli"
    return "normal" if isinstance(fn, dist.Normal) else "other"


def has_moments(fn: Any) -> bool:
    """Whether a distribution has a finite mean and variance anywhere."""
    try:
        return bool((fn.mean.isfinite() & fn.variance.isfinite()).any())
    except NotImplementedError:
        return False


def function(site: Mapping[str, Any]) -> Tensor:
    """See :func:`pyro_apd.function_values`; ``batch_shape + event_shape + (F,)``."""
    fn = plain(site["fn"])
    what = kind(fn)
    if what == "categorical":
        # The distribution has normalised them, but for logits in the thousands to three digits only: it subtracts the
        # logarithm of their sum, which is as large. A second time they are near zero, and the sum is one.
        logits: Tensor = fn.logits.log_softmax(-1)
        return logits
    if what == "bernoulli":
        logits = fn.logits.unsqueeze(-1)
        return logits
    if what == "normal":
        return torch.stack([fn.loc, fn.scale.log()], dim=-1)
    mean, variance = moments(site).unbind(-1)
    return torch.stack([mean, 0.5 * variance.clamp(min=torch.finfo(variance.dtype).tiny).log()], dim=-1)


def moments(site: Mapping[str, Any]) -> Tensor:
    """Mean and variance of the observations, ``batch_shape + event_shape + (2,)``."""
    fn = plain(site["fn"])
    if isinstance(fn, dist.StudentT):  # whose own moments are filled in place, which vmap cannot do
        mean = torch.where(fn.df > 1, fn.loc, torch.nan)
        variance = torch.where(fn.df > 2, fn.scale**2 * fn.df / (fn.df - 2), torch.inf).where(fn.df > 1, torch.nan)
    else:
        mean, variance = torch.broadcast_tensors(fn.mean, fn.variance)
    return torch.stack([mean, variance], dim=-1)


def log_prob(site: Mapping[str, Any]) -> Tensor:
    """Log-density of the observations and whether they are possible, ``batch_shape + (2,)``.

    :raises ModelError: if observations and distribution differ in shape.
    """
    fn, mask = site["fn"], site["mask"]
    value = fn.log_prob(scored(fn, site["value"]))
    if value.shape != fn.batch_shape:
        raise ModelError(
            f"Site '{site['name']}' has observations of shape {tuple(site['value'].shape)}, but its distribution is "
            f"for {tuple(fn.batch_shape + fn.event_shape)}: every observation would count several times. Reshape the "
            "targets."
        )
    if mask is not None:
        value = torch.where(torch.as_tensor(mask, device=value.device), value, torch.zeros_like(value))
    try:
        in_support = fn.support.check(site["value"]).expand_as(value)
    except NotImplementedError:
        in_support = torch.ones_like(value)
    return torch.stack([value, in_support.to(value.dtype)], dim=-1)


def without_moments(observed: ObservedSite) -> ModelError:
    """The error to raise for a site whose distribution has no mean and variance."""
    return ModelError(
        f"Site '{observed.name}' has distribution {type(observed.fn).__name__}, which has no mean and variance to "
        "serve as function values. Give it a distribution with moments."
    )
