# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The interface of generators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.runtime import checks


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


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless all are positive integers."""
    for name, size in sizes.items():
        checks.integer(f"Generator setting {name}", size)


def is_entry(entry: Sequence[int], smallest: Sequence[int]) -> bool:
    """Whether ``entry`` has as many integers as ``smallest``, each at least as large."""
    return len(entry) == len(smallest) and all(
        checks.is_integer(number) and number >= bound for number, bound in zip(entry, smallest, strict=True)
    )
