# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Known posteriors, chains that sample them, and generators with planted defects.

Both posteriors are normal in the weights, so that an exact generator exists: a regression on ten bumps, whose posterior
is normal, and a 2-4-3 network with its Laplace approximation. Their weights are strongly correlated. Each also has a
version with two modes of equal weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_apd.models.layout import Layout

Draws = dict[str, Tensor]

NUM_CHAINS, NUM_DRAWS = 4, 250
#: Autocorrelation of the chain from one draw to the next, and the probability that it draws a new mode.
AUTOCORRELATION, HOP = 0.5, 0.3
#: Number of draws of a memorising generator.
NUM_MEMORISED = 20


@dataclass(frozen=True)
class Problem:
    """A posterior that is normal around each of its modes.

    :ivar modes_MD: centres, ``(M, D)``; one or two, of equal weight.
    :ivar factor_DD: Cholesky factor of the covariance around each.
    :ivar layout: sites of the weights.
    """

    name: str
    model: Callable[..., Any]
    x: Tensor
    y: Tensor
    modes_MD: Tensor
    factor_DD: Tensor
    layout: Layout

    def constrain(self, theta: Tensor) -> Draws:
        """Weights ``(..., D)`` by site."""
        return self.layout.constrain(theta)

    def draws(self, number: int, generator: torch.Generator, modes: Tensor | None = None) -> Tensor:
        """Independent draws ``(number, D)``."""
        modes = self.modes_MD if modes is None else modes
        which = torch.randint(len(modes), (number,), generator=generator)
        noise = torch.randn(number, len(self.factor_DD), generator=generator)
        return modes[which] + noise @ self.factor_DD.T

    def chain(self, generator: torch.Generator, autocorrelation: float = AUTOCORRELATION) -> Tensor:
        """Stationary autocorrelated draws ``(C, S, D)``, chains apart."""
        size = len(self.factor_DD)
        state = torch.randn(NUM_CHAINS, size, generator=generator)
        mode = torch.randint(len(self.modes_MD), (NUM_CHAINS,), generator=generator)
        steps = []
        for _ in range(NUM_DRAWS):
            fresh = torch.randn(NUM_CHAINS, size, generator=generator)
            state = autocorrelation * state + (1 - autocorrelation**2) ** 0.5 * fresh
            hops = torch.rand(NUM_CHAINS, generator=generator) < HOP
            other = torch.randint(len(self.modes_MD), (NUM_CHAINS,), generator=generator)
            mode = torch.where(hops, other, mode)
            steps.append(self.modes_MD[mode] + state @ self.factor_DD.T)
        return torch.stack(steps, 1)

    def unmixed(self, generator: torch.Generator) -> Tensor:
        """Chains that each stay near their own point; all points are draws of the posterior."""
        places = self.draws(NUM_CHAINS, generator)
        noise = torch.randn(NUM_CHAINS, NUM_DRAWS, len(self.factor_DD), generator=generator)
        return places[:, None] + 0.2 * noise @ self.factor_DD.T


@dataclass(frozen=True)
class Generator:
    """What :func:`~pyro_apd.diagnostics.compare` uses of a posterior: draws, and the bytes of its file."""

    problem: Problem
    sampler: Callable[[int, torch.Generator], Tensor]
    num_bytes: int = 8000

    def get_samples(self, num_samples: int | None = None) -> Draws:
        """Draws by site, ``(S, ...)``, under torch's global seed."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return self.problem.constrain(self.sampler(num_samples or 100, generator))


def bumps(x: Tensor) -> Tensor:
    """Ten bumps over the line, ``(N, 10)``."""
    return torch.exp(-0.5 * ((x[:, None] - torch.linspace(-3, 3, 10)) / 0.8) ** 2)


def regression(x: Tensor, y: Tensor | None = None) -> Any:
    """Weights of ten bumps; noise sd 0.3."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(bumps(x) @ w, 0.3), obs=y)


def network(x: Tensor, y: Tensor | None = None) -> Any:
    """2-4-3, tanh; prior sd 1.5."""
    sizes = {"hidden.weight": (4, 2), "hidden.bias": (4,), "out.weight": (3, 4), "out.bias": (3,)}
    w = {
        name: pyro.sample(name, dist.Normal(0.0, 1.5).expand(list(shape)).to_event(len(shape)))
        for name, shape in sizes.items()
    }
    hidden = torch.tanh(x @ w["hidden.weight"].T + w["hidden.bias"])
    with pyro.plate("data", len(x)):
        logits = hidden @ w["out.weight"].T + w["out.bias"]
        return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def line(two_modes: bool) -> Problem:
    """Regression; the second mode is higher by 1.5 in a region with few data."""
    generator = torch.Generator().manual_seed(7)
    x = torch.cat([torch.rand(30, generator=generator) * 2 - 3, torch.rand(30, generator=generator) * 2 + 1])
    y = torch.sin(x) + 0.3 * torch.randn(60, generator=generator)
    features = bumps(x)
    precision = features.T @ features / 0.09 + torch.eye(10)
    mean = torch.linalg.solve(precision, features.T @ y / 0.09)
    test = torch.linspace(-3, 3, 100)
    truth = torch.sin(test) + 0.3 * torch.randn(100, generator=generator)
    other = mean + torch.linalg.lstsq(bumps(test), 1.5 * torch.exp(-0.5 * (test / 0.6) ** 2)).solution
    modes = torch.stack([mean, other]) if two_modes else mean[None]
    factor = torch.linalg.cholesky(torch.linalg.inv(precision))
    name = "regression, two modes" if two_modes else "regression"
    return Problem(name, regression, test, truth, modes, factor, Layout({"w": (10,)}))


def clusters(two_modes: bool) -> Problem:
    """Three clusters of points; the second mode gives a fourth, ambiguous cluster to another class."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0], [2.0, 2.0]])

    def points(number: int, other: int) -> tuple[Tensor, Tensor]:
        which = torch.arange(number) % 4
        x = centres[which] + 0.8 * torch.randn(number, 2, generator=generator)
        return x, torch.where(which == 3, other, which)

    x, y = points(60, 0)
    layout = Layout({"hidden.weight": (4, 2), "hidden.bias": (4,), "out.weight": (3, 4), "out.bias": (3,)})
    first = _mode(layout, x, y, torch.randn(27, generator=generator))
    test, truth = points(150, 0)
    modes, factor = first[None], _laplace(layout, x, y, first)
    if two_modes:
        other = _mode(layout, x, torch.where((y == 0) & (x[:, 0] > 1), 1, y), first)
        modes = torch.stack([first, other])
    return Problem("classes, two modes" if two_modes else "classes", network, test, truth, modes, factor, layout)


def _log_joint(layout: Layout, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    def log_joint(theta_D: Tensor) -> Tensor:
        w = layout.split(theta_D)
        hidden = torch.tanh(x @ w["hidden.weight"].T + w["hidden.bias"])
        logits = hidden @ w["out.weight"].T + w["out.bias"]
        return -torch.nn.functional.cross_entropy(logits, y, reduction="sum") - theta_D.square().sum() / (2 * 1.5**2)

    return log_joint


def _mode(layout: Layout, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    theta = start.clone().requires_grad_()
    optimizer, log_joint = torch.optim.Adam([theta], 0.05), _log_joint(layout, x, y)
    for _ in range(600):
        optimizer.zero_grad()
        (-log_joint(theta)).backward()
        optimizer.step()
    return theta.detach()


def _laplace(layout: Layout, x: Tensor, y: Tensor, mode: Tensor) -> Tensor:
    hessian = torch.autograd.functional.hessian(_log_joint(layout, x, y), mode)
    values, vectors = torch.linalg.eigh(-(hessian + hessian.T) / 2)
    # The posterior is no flatter than its prior.
    covariance = vectors @ torch.diag(1 / values.clamp_min(1 / 1.5**2)) @ vectors.T
    return torch.linalg.cholesky((covariance + covariance.T) / 2)
