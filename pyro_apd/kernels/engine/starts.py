# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Starts of chains that a user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_apd.models.layout import Layout


def starting_at(
    strategy: Callable[[Any], Tensor], given: Mapping[str, Any] | None, num_chains: int | None
) -> Callable[[Any], Tensor]:
    """An ``init_strategy`` for sites that have no value to start from but the one ``given``, such as flat priors.

    :param strategy: for other sites.
    :param given: unconstrained values by site, as ``initial_params``; None for none.
    :param num_chains: where values have a leading dimension of chains; None where they have none.
    """
    if not given:
        return strategy

    def start(site: Any) -> Tensor:
        try:
            return strategy(site)
        except NotImplementedError:
            if site["name"] not in given:
                raise
            value = torch.as_tensor(given[site["name"]])
            value = value if num_chains is None else value[0]
            constrained: Tensor = biject_to(site["fn"].support)(value)
            return constrained

    return start


def checked_strategy(strategy: Any) -> Callable[..., Any]:
    """An ``init_strategy`` as it is.

    :raises ValueError: if it is not callable.
    """
    if not callable(strategy):
        raise ValueError(f"init_strategy={strategy!r} must be a callable, such as pyro.infer.autoguide.init_to_median.")
    checked: Callable[..., Any] = strategy
    return checked


def checked_start(given: Mapping[str, Tensor], layout: Layout, like: Tensor) -> Tensor:
    """``initial_params`` as one vector.

    :raises ValueError: if sites or shapes are not the model's, or a value is not finite.
    """
    batch = tuple(like.shape[:-1])
    expected = {site.name: (*batch, *site.unconstrained_shape) for site in layout}
    shapes = {name: tuple(torch.as_tensor(value).shape) for name, value in given.items()}
    if shapes != expected:
        raise ValueError(
            f"initial_params has sites and shapes {shapes}, but the model's unconstrained latents are {expected}. "
            "Values are unconstrained; for several chains MCMC(initial_params=) wants a leading dimension of chains."
        )
    theta = layout.join({name: torch.as_tensor(value).detach() for name, value in given.items()}).to(like)
    if not bool(torch.isfinite(theta).all()):
        raise ValueError("initial_params holds NaN or infinite values.")
    return theta
