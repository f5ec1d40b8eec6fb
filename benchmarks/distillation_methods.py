# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Ways to store a posterior in few bytes, for :mod:`benchmarks.distillation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distillation_cases import Problem
from pyro_apd import DistilledPosterior, baselines
from pyro_apd.baselines import stored_draws
from pyro_apd.baselines.low_rank import fit_low_rank, principal_directions
from pyro_apd.distillation.offline import distill_draws
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.source import Source
from pyro_apd.models.layout import Layout


@dataclass(frozen=True)
class Fitted:
    """Result of a method.

    :ivar sample: function from a number to as many draws ``(S, D)``, with torch's global generator.
    :ivar int num_bytes: bytes to store it.
    :ivar in_parts: function from a number to blocks of the same draws; None where they fit into memory in any case.
    :ivar bool is_endless: whether each call finds other draws.
    """

    sample: Callable[[int], Tensor]
    num_bytes: int
    in_parts: Callable[[int], Iterator[Tensor]] | None = None
    is_endless: bool = True

    def blocks(self, count: int) -> Iterator[Tensor]:
        """So many draws, of large networks some at a time."""
        if self.in_parts is None:
            yield self.sample(count)
        else:
            yield from self.in_parts(count)


@dataclass(frozen=True)
class Material:
    """Input of a method: draws ``(C, T, D)`` and the problem that they belong to."""

    problem: Problem
    layout: Layout
    theta_CTD: Tensor
    seed: int

    @property
    def size(self) -> int:
        """Numbers of a draw."""
        return self.theta_CTD.shape[-1]

    def interleaved(self) -> Tensor:
        """All draws in order of time, chains side by side, ``(T C, D)``."""
        return self.theta_CTD.transpose(0, 1).flatten(0, 1)


#: From material and the number of float32 networks to spend; None where a method cannot do with so few.
Method = Callable[[Material, float], Fitted | None]
# Stored draws that count as a posterior.
_FEWEST = 4
# Numbers of draws that are computed together: a hundred draws of a million.
_NUMBERS_AT_ONCE = 100_000_000


def stored(dtype: str, choice: str = "thinned") -> Method:
    """As many stored draws as fit, see :func:`pyro_apd.baselines.stored_draws`; none if fewer than four do."""

    def method(material: Material, networks: float) -> Fitted | None:
        problem = material.problem
        try:
            kept = stored_draws(
                material.layout.constrain(material.theta_CTD),
                byte_budget=float(networks),
                method=choice,
                dtype=dtype,
                model=problem.model,
                data=problem.train,
                group_by_chain=True,
                seed=material.seed,
            )
        except ValueError as error:
            if "byte_budget" not in str(error):
                raise
            return None
        if kept.num_draws < _FEWEST:
            return None
        kept_KD = material.layout.unconstrain(kept)
        return Fitted(lambda _: kept_KD, kept.num_bytes, is_endless=False)

    return method


def mean_field(material: Material, networks: float) -> Fitted:
    """Independent Gaussians: always two networks."""
    draws_ND = material.interleaved()
    mean_D, sd_D = draws_ND.mean(0), draws_ND.std(0)
    return Fitted(lambda count: mean_D + sd_D * torch.randn(count, len(mean_D)), 8 * len(mean_D))


def low_rank(material: Material, networks: float) -> Fitted | None:
    """SWAG's form (Maddox et al. 2019), fitted: a Gaussian of low rank plus a diagonal; rank + 2 networks."""
    rank = round(networks) - 2
    if rank < 1:
        return None
    generator = fit_low_rank(material.interleaved(), rank).requires_grad_(False)
    num_bytes = 4 * sum(parameter.numel() for parameter in generator.parameters())
    return Fitted(lambda count: generator(generator.latents(count, generator.location)), num_bytes)


def swag(material: Material, networks: float) -> Fitted | None:
    """SWAG (Maddox et al. 2019) by gradient descent of its own, not of the chain; rank + 2 networks."""
    rank = round(networks) - 2
    if rank < 2:
        return None
    x, y = material.problem.train
    posterior = baselines.swag(
        material.problem.model, x, y, rank=rank, batch_size=min(100, len(x)), seed=material.seed, progress=False
    )
    return Fitted(of_posterior(posterior).sample, 4 * (rank + 2) * material.size)


def flow_matching(material: Material, networks: float) -> Fitted | None:
    """Flow matching (Lipman et al. 2023) in principal coordinates of the draws, without function space."""
    num_small = _num_parameters(_velocity(round(networks)))
    rank = int(networks - num_small / material.size) - 1
    if rank < 1:
        return None
    location_D, basis_RD, target_NR = principal_directions(material.interleaved(), rank)
    rank = len(basis_RD)
    velocity = _velocity(rank)
    optimiser = torch.optim.Adam(velocity.parameters(), lr=2e-3)
    for _ in range(4000):
        end_SR = target_NR[torch.randint(len(target_NR), (256,))]
        start_SR, time_S1 = torch.randn_like(end_SR), torch.rand(256, 1)
        at_SR = torch.cat([torch.lerp(start_SR, end_SR, time_S1), time_S1], -1)
        loss = (velocity(at_SR) - (end_SR - start_SR)).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    @torch.no_grad()
    def sample(count: int, num_steps: int = 50) -> Tensor:
        state_SR = torch.randn(count, rank)
        for i in range(num_steps):
            now_S1 = torch.full((count, 1), i / num_steps)
            state_SR = state_SR + velocity(torch.cat([state_SR, now_S1], -1)) / num_steps
        return location_D + state_SR @ basis_RD

    return Fitted(sample, 4 * ((rank + 1) * material.size + _num_parameters(velocity)))


def _velocity(rank: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(rank + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, rank))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def distilled(material: Material, **options: Any) -> Fitted:
    """:func:`pyro_apd.distill`; draws of a file of this precision."""
    # As from the store of an MCMC: without a copy of the draws.
    source = Source(material.theta_CTD, material.layout, material.problem.model, material.problem.train)
    posterior, _ = distill_draws(source, DistillOptions(seed=material.seed, **options), None, progress=False)
    return of_posterior(posterior)


def of_posterior(posterior: DistilledPosterior) -> Fitted:
    """Draws of a saved posterior."""
    shipped = posterior.rounded(posterior.storage_dtype)

    def in_parts(count: int) -> Iterator[Tensor]:
        latent_SL = shipped.generator.latents(count, next(shipped.generator.parameters()))
        for latent_NL in latent_SL.split(draws_at_a_time(shipped.layout.size)):
            yield shipped.layout.unconstrain(shipped.sample(latent=latent_NL))

    return Fitted(lambda count: torch.cat(list(in_parts(count))), posterior.num_bytes, in_parts)


def draws_at_a_time(size: int) -> int:
    """Draws with ``size`` numbers that are computed together."""
    return max(1, _NUMBERS_AT_ONCE // size)


def default(material: Material, networks: float) -> Fitted:
    """Our generator with default settings."""
    return distilled(material)


def ours(material: Material, networks: float) -> Fitted | None:
    """Our generator within so many networks; none where it refuses that."""
    try:
        return distilled(material, byte_budget=float(networks))
    except ValueError as error:
        if "byte_budget" not in str(error):
            raise
        return None


def paper(objective: str, num_steps: int) -> Method:
    """The paper's generator, as published except for the number of steps; always about 101 networks."""

    def method(material: Material, networks: float) -> Fitted:
        return distilled(material, generator="paper", objective=objective, num_steps=num_steps)

    return method


def timed(method: Method, material: Material, networks: float) -> tuple[Fitted | None, float]:
    """Result of a method, and its CPU seconds."""
    torch.manual_seed(material.seed)
    start = time.process_time()
    fitted = method(material, networks)
    return fitted, time.process_time() - start
