# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The interface of generators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.runtime import checks

#: Standard normal latents are smaller: one in 10^15 is larger.
LARGEST_LATENT = 8.0


class Generator(nn.Module, ABC):
    """From standard normal latents ``(S, L)`` to unconstrained draws ``(S, D)``; one latent is one network.

    :ivar int latent_size: L.
    :ivar int output_size: D.
    """

    latent_size: int
    output_size: int

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Kind and settings, from which :func:`~pyro_apd.generators.build_generator` rebuilds the architecture."""

    @abstractmethod
    def forward(self, latent_SL: Tensor) -> Tensor:
        """Draws ``(S, D)``."""

    def latents(self, count: int, like: Tensor) -> Tensor:
        """Standard normal latents ``(count, L)`` with dtype and device of ``like``, by torch's global generator.

        Each is standard normal. Together they may be more evenly spread than independent draws.
        """
        return torch.randn(count, self.latent_size, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def bound(self) -> float:
        """A number that no entry of a draw exceeds for latents up to :data:`LARGEST_LATENT`, by far not the smallest
        one. It shows that no draw is infinite.

        Here it is estimated from few draws.
        """
        like = next(iter(self.state_dict().values()), torch.zeros(())).new_ones(())
        latent_SL = torch.stack([(value * like).expand(self.latent_size) for value in (0.0, LARGEST_LATENT)])
        return peak(self(latent_SL))


def stratified(latent_SL: Tensor) -> Tensor:
    """Latents whose first entries are evenly spread over their quantiles, in random order; in place.

    Random numbers are those of torch's global generator.
    """
    count = len(latent_SL)
    like: dict[str, Any] = {"dtype": latent_SL.dtype, "device": latent_SL.device}
    order_S = torch.randperm(count, device=latent_SL.device)
    place_S = order_S + torch.rand(count, **like)
    quantile_S = (place_S / count + torch.rand((), **like)) % 1.0
    # Without the ends, whose quantiles are infinite.
    latent_SL[:, 0] = torch.special.ndtri(quantile_S.clamp(1e-6, 1 - 1e-6))
    return latent_SL


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless all are positive integers."""
    for name, size in sizes.items():
        checks.integer(f"Generator setting {name}", size)


def check_in_order(spans: Sequence[tuple[slice, Sequence[int]]], what: str) -> None:
    """Raises ValueError unless spans of a draw are in order and do not overlap; each comes with how to name it."""
    for (one, name), (other, other_name) in pairwise(spans):
        if other.start < one.stop:
            raise ValueError(f"{what} {name} and {other_name} must be in order, and must not overlap.")


def peak(values: Tensor) -> float:
    """The largest absolute value."""
    if values.numel() == 0:
        return 0.0
    least, most = values.aminmax()  # without a copy
    return max(-float(least.detach()), float(most.detach()))


def linear_bound(linear: nn.Linear, inputs: float) -> float:
    """A number that no output of a layer exceeds for inputs up to ``inputs``."""
    return linear.in_features * peak(linear.weight) * inputs + peak(linear.bias)


def is_entry(entry: Sequence[int], smallest: Sequence[int]) -> bool:
    """Whether ``entry`` has as many integers as ``smallest``, each at least as large."""
    return len(entry) == len(smallest) and all(
        checks.is_integer(number) and number >= bound for number, bound in zip(entry, smallest, strict=True)
    )
