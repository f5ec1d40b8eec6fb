# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""So many draws of whatever stands for a posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_apd.runtime.global_state import seeded


def take_draws(
    posterior: Any, count: int, seed: int | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """``count`` draws by site; of stored draws a random choice, or all where there are no more.

    :param posterior: values by site ``(S, ...)``, or an object with ``get_samples(num_samples)``: a
        :class:`~pyro_apd.DistilledPosterior`, an ``MCMC`` after ``run``.
    :param int count: draws wanted.
    :param int seed: makes the choice reproducible; None takes torch's global generator.
    :param device: whose global generator a posterior draws by.
    :raises ValueError: if it is neither, or holds nothing.
    """
    if isinstance(posterior, Mapping):
        if not posterior:
            raise ValueError("`posterior` holds no sites.")
        total = len(next(iter(posterior.values())))
        if total <= count:
            return dict(posterior)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        chosen = torch.randperm(total, generator=generator)[:count].sort().values
        return {name: value[chosen.to(value.device)] for name, value in posterior.items()}
    if not callable(getattr(posterior, "get_samples", None)):
        raise ValueError(
            "`posterior` must be draws (S, ...) by site, or have get_samples(num_samples), as an MCMC after run() or a "
            f"DistilledPosterior has; got {type(posterior).__name__}."
        )
    with seeded(seed, device), torch.no_grad():
        return dict(posterior.get_samples(count))
