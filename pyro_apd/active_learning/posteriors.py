# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors that the loop can be given: a chain, what is distilled from it, MC-dropout.

Each is a callable ``(model, x, y, seed, previous)`` that gives draws ``(S, ...)`` by site, or an object with
``get_samples(num_samples)``; ``previous`` is what it gave in the round before, None where each round starts afresh.
Any function of that form serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_apd.chains import MCMC
from pyro_apd.distillation import distill, distill_online
from pyro_apd.generators.dropout import DropoutGenerator
from pyro_apd.kernels import SGLD
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import PosteriorLike, Values, take_draws
from pyro_apd.runtime.global_state import preserved_param_store, seeded

#: From model, labelled inputs, their labels, a seed and the last round's posterior to this round's.
Posterior = Callable[[Callable[..., Any], Tensor, Tensor, int, PosteriorLike | None], PosteriorLike]


@dataclass(frozen=True)
class Chain:
    """SGLD on the labelled data; all draws after warm-up.

    A chain of a cold round starts at draws from the prior, that of a warm one where the last round's ended (at a draw
    of its generator, where it was distilled).

    :ivar step_size: epsilon, a number or ``"auto"``; or a function from the number of labelled data to either, since U
        grows with it.
    :ivar int num_samples: draws of each chain.
    :ivar int warmup_steps: draws of each chain thrown away first.
    :ivar int thinning: Langevin steps per draw.
    :ivar int num_chains: chains that advance together.
    :ivar batch_size: rows a mini-batch; None, or with fewer labelled data, all.
    :ivar float temperature: 1 is the posterior; a function from the number of labelled data is accepted.
    :ivar kernel: another sampler of the same form, such as :class:`~pyro_apd.SGHMC`.
    :ivar dict options: further arguments of the kernel.
    """

    step_size: float | str | Callable[[int], float | str] = "auto"
    num_samples: int = 100
    warmup_steps: int = 100
    thinning: int = 5
    num_chains: int = 1
    batch_size: int | None = None
    temperature: float | Callable[[int], float] = 1.0
    kernel: Callable[..., MCMCKernel] = SGLD
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: Callable[..., Any], x: Tensor, y: Tensor, seed: int, previous: PosteriorLike | None = None
    ) -> dict[str, Tensor]:
        """Draws ``(S, ...)`` by site, chain after chain."""
        return dict(self.run(model, x, y, seed, previous).get_samples())

    def run(
        self, model: Callable[..., Any], x: Tensor, y: Tensor, seed: int, previous: PosteriorLike | None = None
    ) -> MCMC:
        """The driver after its run."""
        mcmc = MCMC(
            self.make_kernel(model, len(x), seed),
            self.num_samples,
            warmup_steps=self.warmup_steps,
            num_chains=self.num_chains,
            initial_params=self.initial_params(model, x, y, seed, previous),
            disable_progbar=True,
        )
        mcmc.run(x, y)
        return mcmc

    def make_kernel(self, model: Callable[..., Any], num_data: int, seed: int) -> MCMCKernel:
        """The sampler for so many labelled data."""
        return self.kernel(
            model,
            _at(self.step_size, num_data),
            batch_size=None if self.batch_size is None or self.batch_size >= num_data else self.batch_size,
            thinning=self.thinning,
            temperature=_at(self.temperature, num_data),
            seed=seed,
            **self.options,
        )

    def initial_params(
        self, model: Callable[..., Any], x: Tensor, y: Tensor, seed: int, previous: PosteriorLike | None
    ) -> Values | None:
        """Where to start, as ``MCMC`` takes it: at each chain's last draw before, or at draws of a generator."""
        if previous is None:
            return None
        if isinstance(previous, Mapping):
            # Of each chain the last; where chains diverged, and are missing, others stand in for them.
            total = len(next(iter(previous.values())))
            last = [(chain + 1) * total // self.num_chains - 1 for chain in range(self.num_chains)]
            values = {name: value[last] for name, value in previous.items()}
        else:
            values = take_draws(previous, self.num_chains, seed, x.device, "previous")
        with preserved_param_store(), poutine.block(), torch.no_grad(), seeded(0):
            layout = Layout.from_trace(poutine.trace(model).get_trace(x, y), list(values))
        start = layout.split(layout.unconstrain({name: value.to(x.device) for name, value in values.items()}))
        return start if self.num_chains > 1 else {name: value[0] for name, value in start.items()}


@dataclass(frozen=True)
class Distilled:
    """A generator distilled from a chain on the labelled data, trained again in each round.

    :ivar Chain chain: the chain.
    :ivar int num_steps: training steps of the generator.
    :ivar bool online: train it while the chains advance, by :func:`pyro_apd.distill_online`, and keep no draws; else by
        :func:`pyro_apd.distill`.
    :ivar dict options: further arguments of either.
    """

    chain: Chain = field(default_factory=Chain)
    num_steps: int | None = None
    online: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: Callable[..., Any], x: Tensor, y: Tensor, seed: int, previous: PosteriorLike | None = None
    ) -> DistilledPosterior:
        """The distilled posterior."""
        common = {"num_steps": self.num_steps, "seed": seed, "progress": False, **self.options}
        if not self.online:
            return distill(self.chain.run(model, x, y, seed, previous), **common)
        chain = self.chain
        return distill_online(
            chain.make_kernel(model, len(x), seed),
            x,
            y,
            num_samples=chain.num_samples,
            warmup_steps=chain.warmup_steps,
            num_chains=chain.num_chains,
            initial_params=chain.initial_params(model, x, y, seed, previous),
            **common,
        )


@dataclass(frozen=True)
class Baseline:
    """A function of :mod:`pyro_apd.baselines` (MC-dropout, a point estimate, an ensemble) on the labelled data.

    A warm round starts the descent at the weights of the round before: of several networks, at the first one's.

    :ivar fit: called as ``fit(model, x, y, seed=..., progress=False, **options)``.
    :ivar dict options: further arguments.
    """

    fit: Callable[..., PosteriorLike]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: Callable[..., Any], x: Tensor, y: Tensor, seed: int, previous: PosteriorLike | None = None
    ) -> PosteriorLike:
        """What ``fit`` gives."""
        options = dict(self.options)
        if previous is not None:
            values = {name: value.to(x.device) for name, value in _weights(previous).items()}
            options["init_strategy"] = init_to_value(values=values)
        return self.fit(model, x, y, seed=seed, progress=False, **options)


def _weights(previous: PosteriorLike) -> Values:
    """One network of a posterior; of MC-dropout, that with all units."""
    if isinstance(previous, Mapping):
        return {name: value[0] for name, value in previous.items()}
    if isinstance(previous, DistilledPosterior) and isinstance(previous.generator, DropoutGenerator):
        return previous.layout.constrain(previous.generator.weights.detach())
    return {name: value[0] for name, value in take_draws(previous, 1, argument="previous").items()}


def _at(value: Any, num_data: int) -> Any:
    """A setting, or what it is for so many data."""
    return value(num_data) if callable(value) else value
