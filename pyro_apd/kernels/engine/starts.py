# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Starts of chains that a user gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_apd.models.layout import Layout


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
