# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Ways to store a posterior in few bytes, for :mod:`benchmarks.distillation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.distillation_cases import Problem
from pyro_apd import DistilledPosterior
from pyro_apd.baselines.low_rank import fit_low_rank
from pyro_apd.baselines.stored_draws import herded as herd
from pyro_apd.distillation.offline import distill_draws
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.probes import Probes
from pyro_apd.distillation.source import Source
from pyro_apd.generators import CoordinateGenerator, precision
from pyro_apd.models.layout import Layout
from pyro_apd.predictive.predictive import function_values


@dataclass(frozen=True)
class Fitted:
    """Result of a method.

    :ivar sample: function from a number to as many draws ``(S, D)``, with torch's global generator.
    :ivar int num_bytes: bytes to store it.
    """

    sample: Callable[[int], Tensor]
    num_bytes: int


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


#: From material and the number of float32 networks to spend.
Method = Callable[[Material, float], Fitted]


def thinned(material: Material, networks: float) -> Fitted:
    """k stored draws, evenly spaced."""
    draws_ND = material.interleaved()
    kept_KD = draws_ND[torch.linspace(0, len(draws_ND) - 1, round(networks)).round().long()]
    return Fitted(lambda _: kept_KD, kept_KD.numel() * 4)


def herded(material: Material, networks: float) -> Fitted:
    """k stored draws chosen by kernel herding (Chen, Welling & Smola 2010) with the energy kernel in function space.

    Each draw is added to minimise the distance from the chosen draws to all draws, averaged over probes.
    """
    draws_ND = material.interleaved()
    inputs = Probes([material.problem.train[0]]).draw(64)
    values_NPF = function_values(material.problem.model, material.layout.constrain(draws_ND), *inputs)
    kept_KD = draws_ND[herd(values_NPF, round(networks))]
    return Fitted(lambda _: kept_KD, kept_KD.numel() * 4)


def as_int8(method: Method) -> Method:
    """Draws that ``method`` chooses, stored in int8 with one scale per draw: four times as many for the same bytes."""

    def narrow(material: Material, networks: float) -> Fitted:
        chosen = method(material, min(4 * networks, material.theta_CTD.shape[:2].numel())).sample(0)
        kept = precision.encode({"theta": chosen}, "int8")
        num_bytes = sum(value.numel() * value.element_size() for value in kept.values())
        kept_KD = precision.decode(kept, "int8")["theta"]
        return Fitted(lambda _: kept_KD, num_bytes)

    return narrow


def mean_field(material: Material, networks: float) -> Fitted:
    """Independent Gaussians: always two networks."""
    draws_ND = material.interleaved()
    mean_D, sd_D = draws_ND.mean(0), draws_ND.std(0)
    return Fitted(lambda count: mean_D + sd_D * torch.randn(count, len(mean_D)), 8 * len(mean_D))


def low_rank(material: Material, networks: float) -> Fitted:
    """SWAG's form (Maddox et al. 2019), fitted: a Gaussian of low rank plus a diagonal; rank + 2 networks."""
    generator = fit_low_rank(material.interleaved(), max(1, round(networks) - 2)).requires_grad_(False)
    num_bytes = 4 * sum(parameter.numel() for parameter in generator.parameters())
    return Fitted(lambda count: generator(generator.latents(count, generator.location)), num_bytes)


def flow_matching(material: Material, networks: float) -> Fitted:
    """Flow matching (Lipman et al. 2023) in the same coordinates, without an adversary and without function space."""
    generator = CoordinateGenerator.fit(material.theta_CTD, max(1, round(networks) - 1))
    generator.fold()
    basis_RD, location_D = generator.basis.detach(), generator.location.detach()
    target_NR = (material.interleaved() - location_D) @ torch.linalg.pinv(basis_RD)
    rank = len(basis_RD)
    velocity = nn.Sequential(nn.Linear(rank + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, rank))
    optimiser = torch.optim.Adam(velocity.parameters(), lr=2e-3)
    for _ in range(4000):
        end_SR = target_NR[torch.randint(len(target_NR), (256,))]
        start_SR, time_S1 = torch.randn_like(end_SR), torch.rand(256, 1)
        at_SR = torch.cat([torch.lerp(start_SR, end_SR, time_S1), time_S1], -1)
        loss = (velocity(at_SR) - (end_SR - start_SR)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    @torch.no_grad()
    def sample(count: int, num_steps: int = 50) -> Tensor:
        state_SR = torch.randn(count, rank)
        for i in range(num_steps):
            now_S1 = torch.full((count, 1), i / num_steps)
            state_SR = state_SR + velocity(torch.cat([state_SR, now_S1], -1)) / num_steps
        return location_D + state_SR @ basis_RD

    num_small = sum(parameter.numel() for parameter in velocity.parameters())
    return Fitted(sample, 4 * ((rank + 1) * material.size + num_small))


def distilled(material: Material, networks: float, **options: Any) -> Fitted:
    """:func:`pyro_apd.distill`; draws of a file of this precision."""
    # As from the store of an MCMC: without a copy of the draws.
    source = Source(material.theta_CTD, material.layout, material.problem.model, material.problem.train)
    posterior, _ = distill_draws(source, DistillOptions(seed=material.seed, **options), None, progress=False)
    return of_posterior(posterior)


def of_posterior(posterior: DistilledPosterior) -> Fitted:
    """Draws of a saved posterior."""
    shipped = posterior.rounded(posterior.storage_dtype)

    def sample(count: int) -> Tensor:
        return shipped.layout.unconstrain(shipped.sample((count,)))

    return Fitted(sample, posterior.num_bytes)


def default(material: Material, networks: float) -> Fitted:
    """Our generator with default settings."""
    return distilled(material, networks)


def ours(material: Material, networks: float) -> Fitted:
    """Our generator in float32."""
    return distilled(material, networks, rank=max(1, int(networks - 1.4)), storage_dtype="float32")


def ours_int8(material: Material, networks: float) -> Fitted:
    """Our generator in int8: four times the coordinates for the same bytes."""
    return distilled(material, networks, rank=max(1, int(4 * (networks - 0.8))), storage_dtype="int8")


def aligned(material: Material, networks: float) -> Fitted:
    """Our generator on chains whose hidden units were first permuted to match the first chain (Ainsworth et al. 2023).

    Weight matching on the means of the chains, layer by layer until nothing changes. A chain is permuted as a whole, so
    that each network computes the same function. For perceptrons only.
    """
    means_CD = material.theta_CTD.mean(1)
    theirs = [perceptron(material.layout.split(mean_D)) for mean_D in means_CD]
    chains = []
    for weights, theta_TD in zip(theirs, material.theta_CTD, strict=True):
        orders = matched(theirs[0], weights)
        values = material.layout.split(theta_TD)
        layers = [permuted(layer, i, orders) for i, layer in enumerate(perceptron(values))]
        known = dict(zip(perceptron_sites(values), (v for layer in layers for v in layer), strict=True))
        chains.append(material.layout.join({**values, **known}))
    return distilled(replace(material, theta_CTD=torch.stack(chains)), networks)


def perceptron_sites(values: Mapping[str, Tensor]) -> list[str]:
    """Names of weights and biases, in the order of the layers."""
    return [name for name in values if name.endswith(("weight", "bias"))]


def perceptron(values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weights ``(..., out, in)`` and biases ``(..., out)`` of each layer."""
    parts = [values[name] for name in perceptron_sites(values)]
    return list(zip(parts[::2], parts[1::2], strict=True))


def permuted(layer: tuple[Tensor, Tensor], i: int, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Layer ``i`` with the hidden units before and after it in these orders."""
    weight, bias = layer
    if i > 0:
        weight = weight[..., orders[i - 1]]
    if i < len(orders):
        weight, bias = weight[..., orders[i], :], bias[..., orders[i]]
    return weight, bias


def matched(reference: Sequence[tuple[Tensor, Tensor]], layers: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """An order for each hidden layer, that maximises the inner product of the weights with the reference."""
    orders = [torch.arange(len(bias)) for _, bias in layers[:-1]]
    for _ in range(20):
        before = [order.clone() for order in orders]
        for i in range(len(orders)):
            # Without the order of layer i, so that its rows are in their own order.
            others = [*orders[:i], torch.arange(len(orders[i])), *orders[i + 1 :]]
            here, behind = (permuted(layers[j], j, others) for j in (i, i + 1))
            gain = reference[i][0] @ here[0].T + torch.outer(reference[i][1], here[1])
            gain = gain + reference[i + 1][0].T @ behind[0]
            orders[i] = torch.as_tensor(linear_sum_assignment(gain.numpy(), maximize=True)[1])
        if all(order.equal(old) for order, old in zip(orders, before, strict=True)):
            break
    return orders


def paper(objective: str, num_steps: int) -> Method:
    """The paper's generator, as published except for the number of steps; always about 101 networks."""

    def method(material: Material, networks: float) -> Fitted:
        return distilled(material, networks, generator="paper", objective=objective, num_steps=num_steps)

    return method


def timed(method: Method, material: Material, networks: float) -> tuple[Fitted, float]:
    """Result of a method, and its seconds."""
    torch.manual_seed(material.seed)
    start = time.monotonic()
    fitted = method(material, networks)
    return fitted, time.monotonic() - start
