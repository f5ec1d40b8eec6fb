# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What the diagnostics ask of chains and posteriors besides their draws: shapes, sizes, settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.models.layout import Layout
from pyro_apd.predictive.draws import PosteriorLike, check_draws, kernel_of, read_draws


def draw_shapes(posterior: PosteriorLike | None) -> dict[str, tuple[int, ...]] | None:
    """Shape of one draw by site, without drawing where that can be had."""
    if posterior is None:
        return None
    if isinstance(posterior, Mapping):
        check_draws(posterior, "posterior")
        return {site: tuple(value.shape[1:]) for site, value in posterior.items()}
    layout = getattr(posterior, "layout", None)
    if isinstance(layout, Layout):
        return {site.name: tuple(site.shape) for site in layout}
    return {site: tuple(value.shape[1:]) for site, value in read_draws(posterior, 1, seed=0).items()}


def posterior_bytes(posterior: PosteriorLike) -> int:
    """Size of the generator's file, or what stored draws say; of a plain dict, size of its tensors."""
    num_bytes = getattr(posterior, "num_bytes", None)
    if num_bytes is None and isinstance(posterior, Mapping):
        return sum(value.numel() * value.element_size() for value in posterior.values())
    if num_bytes is None:
        raise ValueError("`posterior` has no `num_bytes`, so it cannot be compared with stored draws of the same size.")
    return int(num_bytes)


def kernel_settings(mcmc: object) -> dict[str, Any]:
    """Arguments of the kernel's constructor that are plain values and attributes of the kernel of the same name."""
    kernel = kernel_of(mcmc)
    if kernel is None:
        return dict(getattr(mcmc, "settings", {}))  # of a run read from a file
    settings: dict[str, Any] = {"kernel": type(kernel).__name__}
    for name in inspect.signature(type(kernel).__init__).parameters:
        value = getattr(kernel, name, None)
        if isinstance(value, (bool, int, float, str)):
            settings[name] = value
    for name in ("num_chains", "num_samples", "warmup_steps"):
        value = getattr(mcmc, name, None)
        if isinstance(value, int):
            settings[name] = value
    return settings


def flat(draws: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Values of the named sites side by side, ``(S, D)``."""
    return torch.cat([draws[name].flatten(1) if draws[name].dim() > 1 else draws[name][:, None] for name in names], 1)
