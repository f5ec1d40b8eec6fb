# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Stochastic gradient descent on the potential: what every baseline that trains networks shares.

    v <- momentum v + grad U(theta, mini-batch) / N,    theta <- theta - learning_rate v

U/N is the mean loss a datum plus the prior's share of it, so that a learning rate means what it means in PyTorch, and
a Gaussian prior of precision p is a weight decay of p/N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_apd.errors import ModelError
from pyro_apd.models.building import build_potential
from pyro_apd.models.potential import Potential
from pyro_apd.models.tracing import StartMessenger
from pyro_apd.predictive.predictive import log_likelihood
from pyro_apd.runtime.checks import integer, number
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.rates import share_of_rate
from pyro_apd.runtime.seeds import derived_generator, derived_seed, seed_or_fresh


@dataclass(frozen=True)
class Descent:
    """How to descend.

    :ivar int num_steps: steps.
    :ivar float learning_rate: of a mean loss a datum.
    :ivar float momentum: 0 for none.
    :ivar bool decay: let the rate rise over the first twentieth, and then fall along a cosine to zero.
    :raises ValueError: if a number is out of range.
    """

    num_steps: int
    learning_rate: float
    momentum: float = 0.0
    decay: bool = False

    def __post_init__(self) -> None:
        check_counts(num_steps=self.num_steps)
        number("learning_rate", self.learning_rate, above=0)
        number("momentum", self.momentum, at_least=0, below=1)

    def positions(self, start: Start, desc: str, progress: bool) -> Iterator[Tensor]:
        """Yields the state after each step: the same tensor, changed in place.

        :raises RuntimeError: if the state is no longer finite at the end.
        """
        theta, velocity, source = start.theta, torch.zeros_like(start.theta), start.potential.source
        num_data = source.num_data or 1
        for i in tqdm(range(self.num_steps), desc=desc, disable=not progress, leave=False):
            gradient, _ = start.potential.gradient(theta, source.draw())
            velocity.mul_(self.momentum).add_(gradient, alpha=1 / num_data)
            share = share_of_rate((i + 0.5) / self.num_steps) if self.decay else 1.0
            theta.sub_(velocity, alpha=share * self.learning_rate)
            yield theta
        if not bool(torch.isfinite(theta).all()):
            raise RuntimeError(
                f"Gradient descent diverged: the weights are not finite after {self.num_steps} steps. Give a smaller "
                f"learning_rate than {self.learning_rate:g}."
            )


@dataclass(frozen=True)
class Start:
    """A potential, its source of mini-batches begun, and where to start.

    :ivar Tensor theta: ``(D,)``, or ``(C, D)`` for networks that are trained side by side.
    """

    potential: Potential
    theta: Tensor

    @classmethod
    def prepare(
        cls,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        batch_size: int | None,
        init_strategy: Callable[..., Any] | None,
        seed: int | None,
        num_networks: int | None = None,
    ) -> Start:
        """Each network has a start and mini-batches of its own. Arguments as of the baselines."""
        seed = seed_or_fresh(seed)
        count = num_networks or 1
        starting = StartMessenger(init_strategy or init_to_layers)(model)
        thetas: list[Tensor] = []
        with preserved_param_store():
            for i in range(count):
                with seeded(derived_seed(seed, "start", i)):
                    if not thetas:
                        potential, start = build_potential(starting, args, kwargs, batch_size=batch_size)
                        if len(potential.layout) == 0:
                            raise ModelError("The model has no latents, so there is nothing to train.")
                    else:
                        start = potential.draw_start()
                thetas.append(potential.layout.unconstrain(start).detach())
        potential.model = model
        generators = [derived_generator(seed, "batches", i, device=thetas[0].device) for i in range(count)]
        potential.source.start(generators if num_networks else generators[0])
        return cls(potential, torch.stack(thetas) if num_networks else thetas[0].clone())


def descend(
    start: Start,
    descent: Descent,
    desc: str,
    progress: bool,
    model: Callable[..., Any],
    validation: tuple[Any, ...] | None = None,
    check_every: int = 1000,
) -> Tensor:
    """Where the descent ends; with ``validation``, the best state by its likelihood there, looked at now and then."""
    best = Best(model, start, validation) if validation is not None else None
    with torch.no_grad():
        for i, _ in enumerate(descent.positions(start, desc, progress), 1):
            if best is not None and (i % check_every == 0 or i == descent.num_steps):
                best.look()
    return start.theta if best is None else best.theta


class Best:
    """Keeps the best state of each network, by the mean log-likelihood of data that it is not trained on."""

    def __init__(self, model: Callable[..., Any], start: Start, validation: tuple[Any, ...]) -> None:
        if not isinstance(validation, (tuple, list)):
            raise TypeError(
                f"`validation` must be the tuple of the model's arguments, as (x, y); got {type(validation).__name__}."
            )
        self._model, self._start, self._validation = model, start, tuple(validation)
        self.theta = start.theta.clone()
        self._value_C: Tensor | None = None

    def look(self) -> None:
        """Compares the present state with the best."""
        theta = self._start.theta
        draws = self._start.potential.layout.constrain(theta.reshape(-1, theta.shape[-1]))
        value_C = log_likelihood(self._model, draws, *self._validation).mean(1)
        if self._value_C is None:
            self._value_C = torch.full_like(value_C, -torch.inf)
        is_better_C = value_C > self._value_C
        self._value_C = torch.where(is_better_C, value_C, self._value_C)
        self.theta = torch.where(is_better_C.reshape(*theta.shape[:-1], 1), theta, self.theta)


def init_to_layers(site: Any) -> Tensor:
    """An ``init_strategy`` that starts networks as deep learning does, whatever the width of the prior.

    Real-valued sites of two dimensions or more are normal with standard deviation sqrt(2 / inputs of a unit) (He et al.
    2015), real-valued vectors zero, but for those whose name ends in ``weight``: these are the scales of normalisation
    layers, and one (a network with all of them zero has no gradient). Other sites are drawn from their prior.
    """
    fn = site["fn"]
    support, shape = fn.support, tuple(fn.shape())
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is not torch.distributions.constraints.real or not shape:
        value: Tensor = init_to_sample(site)
        return value
    like = fn.sample()
    if len(shape) == 1:
        return torch.full_like(like, float(site["name"].rpartition(".")[2] == "weight"))
    return torch.randn_like(like) * math.sqrt(2.0 / math.prod(shape[1:]))


def check_counts(**counts: object) -> None:
    """:raises ValueError: unless all are positive integers."""
    for name, value in counts.items():
        integer(name, value)
