# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One network: the maximum of the posterior, by stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_apd.baselines.descent import Descent, Start, check_counts, descend
from pyro_apd.runtime.global_state import gradients


@gradients("map_estimate")
def map_estimate(
    model: Callable[..., Any],
    *args: Any,
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
    """Trains one network on the log joint of a Pyro model, and gives it as a posterior of one draw.

    The maximum is that of the density of the *unconstrained* values: where latents are constrained, such as a noise
    scale, it is not the maximum of the density of the constrained ones.

    :param callable model: a Pyro model.
    :param args: its arguments, full tensors.
    :param int num_steps: steps of gradient descent.
    :param int batch_size: rows a mini-batch; None uses whatever the model and the arguments say.
    :param float learning_rate: of the mean loss a datum.
    :param float momentum: 0 for none.
    :param bool decay: let the rate fall along a cosine to zero.
    :param tuple validation: arguments of the model with data that it is not trained on; the state of the largest
        likelihood there, looked at every ``check_every`` steps, is what is returned.
    :param init_strategy: where to start, as for Pyro's HMC; by default as PyTorch would, see
        :func:`~pyro_apd.baselines.descent.init_to_layers`.
    :param int seed: makes the result reproducible without touching the global generator.
    :param bool progress: whether to show a bar.
    :param kwargs: keyword arguments of the model.
    :returns: values ``(1, ...)`` by site, which :class:`~pyro_apd.Predictive` takes as ``posterior_samples``.
    :raises ValueError: if a number is out of range.
    :raises ModelError: if the likelihood's scaling cannot be established.
    :raises RuntimeError: if the optimisation diverged.
    """
    check_counts(check_every=check_every)
    descent = Descent(num_steps, learning_rate, momentum, decay)
    start = Start.prepare(model, args, kwargs, batch_size, init_strategy, seed)
    theta_D = descend(start, descent, "MAP", progress, model, validation, check_every)
    return start.potential.layout.constrain(theta_D.unsqueeze(0))
