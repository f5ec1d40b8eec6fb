# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Several networks, each trained from a start of its own.

**References**

Lakshminarayanan, Pritzel and Blundell, *Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles*,
NeurIPS 2017; without its adversarial training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_apd.baselines.descent import Descent, Start, check_counts, descend
from pyro_apd.runtime.global_state import gradients


@gradients("deep_ensemble")
def deep_ensemble(
    model: Callable[..., Any],
    *args: Any,
    num_networks: int = 5,
    num_steps: int = 5000,
    batch_size: int | None = None,
    learning_rate: float = 0.05,
    momentum: float = 0.0,
    decay: bool = False,
    validation: tuple[Any, ...] | None = None,
    check_every: int = 1000,
    init_strategy: Callable[..., Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Trains networks side by side, as one batched computation, and gives them as a posterior of so many draws.

    Starts and mini-batches differ. Other parameters, and errors, as of
    :func:`~pyro_apd.baselines.map_estimate`; with ``validation`` each network is kept at a best of its own.

    :param int num_networks: networks, ``C``.
    :returns: values ``(C, ...)`` by site.
    """
    check_counts(num_networks=num_networks, check_every=check_every)
    descent = Descent(num_steps, learning_rate, momentum, decay)
    start = Start.prepare(model, args, kwargs, batch_size, init_strategy, seed, num_networks)
    theta_CD = descend(start, descent, "Ensemble", progress, model, validation, check_every)
    return start.potential.layout.constrain(theta_CD)
