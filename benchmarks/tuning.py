# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Step sizes and lengths for the kernels by theory, from the curvature of U, and never from a reference.

:class:`TracedPotential` computes U by tracing the model, so that it is independent of the package's own potential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from torch import Tensor

from pyro_apd import MCLMC, PSGLD, SGHMC, SGLD
from pyro_apd.models.layout import Layout

KERNELS = {"SGLD": SGLD, "PSGLD": PSGLD, "SGHMC": SGHMC, "MCLMC": MCLMC}
#: Share by which a Gaussian's variance may be widened in its stiffest direction.
INFLATION = 0.1
#: PSGLD remembers 1 / (1 - DECAY) steps; SGHMC's friction is the package's default.
DECAY, FRICTION = 0.999, 0.1
#: Steps of MCLMC per draw: no theory says how many there should be.
MCLMC_STEPS = 20
#: Keywords by kernel.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "SGLD": {},
    "PSGLD": {"decay": DECAY},
    "SGHMC": {"friction": FRICTION},
    "MCLMC": {},
}


class TracedPotential:
    """U of a model on its arguments, as a function of the flat unconstrained vector ``(D,)``, with a mode of it.

    :param model: a Pyro model whose arguments all have the data's rows in front.
    :param args: its arguments.
    :param start: values by site where the search for the mode starts; sites that are missing start from the prior.
    :ivar Tensor mode: a mode of exp(-U), ``(D,)``.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Tensor, ...], start: Mapping[str, Tensor]) -> None:
        self.model, self.args = model, args
        self.init = init_to_value(values=dict(start))
        with poutine.block():
            trace = poutine.trace(InitMessenger(self.init)(model)).get_trace(*args)
        self.layout = Layout.from_trace(trace)
        self.mode = self._newton(self.layout.unconstrain({s.name: trace.nodes[s.name]["value"] for s in self.layout}))

    def value(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """U at ``theta``; on the given rows of the data only, if any."""
        args = self.args if rows is None else tuple(arg[rows] for arg in self.args)
        trace = poutine.trace(poutine.condition(self.model, self.layout.constrain(theta))).get_trace(*args)
        return -trace.log_prob_sum() - self.layout.log_abs_det_jacobian(theta)

    def gradient(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """Gradient of :meth:`value`, ``(D,)``."""
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(self.value(leaf, rows), leaf)[0]

    def hessian(self, theta: Tensor) -> Tensor:
        """Hessian of U, ``(D, D)``."""
        return torch.autograd.functional.hessian(self.value, theta)

    def _newton(self, theta: Tensor, iterations: int = 50) -> Tensor:
        """A mode, by damped Newton steps, which do not depend on scales."""
        for _ in range(iterations):
            values, vectors = torch.linalg.eigh(self.hessian(theta))
            gradient, here = self.gradient(theta), self.value(theta)
            step = vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-8 * values.abs().max()))
            if float(gradient @ step) < 1e-12:
                break
            size = 1.0
            while not self.value(theta - size * step) < here and size > 1e-6:
                size /= 2
            theta = theta - size * step
        return theta.detach()


@dataclass(frozen=True)
class Pilot:
    """Measurements of a posterior by a short chain.

    :ivar hessians: of U along it, ``(M, D, D)``.
    :ivar second_moment: of the full-data gradient, ``(D,)``.
    :ivar row_covariance: of one row's gradient at the mode, ``(D, D)``.
    """

    hessians: Tensor
    second_moment: Tensor
    row_covariance: Tensor


def explore(target: TracedPotential, by_row: bool = True, num_points: int = 60) -> Pilot:
    """A pilot chain of SGLD from the mode, with a step size from the curvature there, thinned to ``num_points``.

    :param bool by_row: whether to measure single rows, which plans for mini-batches need.
    """
    curvature = float(torch.linalg.eigvalsh(target.hessian(target.mode))[-1])
    kernel = SGLD(target.model, 4 * INFLATION / curvature, thinning=25, init_strategy=target.init, seed=1_000)
    start = target.layout.split(target.mode)
    mcmc = MCMC(kernel, num_points, num_points // 4, initial_params=start, disable_progbar=True)
    mcmc.run(*target.args)
    points = target.layout.unconstrain(mcmc.get_samples())
    covariance = torch.zeros(2 * target.mode.shape).to(target.mode)
    if by_row:
        order = torch.randperm(len(target.args[0]), generator=torch.Generator().manual_seed(0))[:200]
        covariance = torch.cov(torch.stack([target.gradient(target.mode, row[None]) for row in order]).T)
    return Pilot(
        torch.stack([target.hessian(point) for point in points]),
        torch.stack([target.gradient(point) for point in points]).square().mean(0),
        covariance,
    )


@dataclass(frozen=True)
class Plan:
    """How a kernel is run.

    :ivar step_size: epsilon, or ``"auto"``.
    :ivar float steps_each: Langevin steps per effective draw; infinite if the pilot chain cannot tell.
    """

    step_size: float | str
    steps_each: float


def plan(kernel: str, pilot: Pilot, num_data: int, batch_size: int | None = None) -> Plan:
    """Step size and autocorrelation time by theory for a Gaussian.

    With preconditioner G (the identity but for PSGLD), curvature L and mini-batch gradient covariance C, the variance
    of a direction is widened by eps (L + C) / 4 in SGLD and PSGLD, and by eps (L / (2 - a) + C / a) / 4 in SGHMC at
    friction a, L and C being those of G^1/2 U'' G^1/2. The 95 % point along the pilot chain of the stiffest
    direction's widening is set to :data:`INFLATION`. An effective draw takes 4 / (eps L) steps in the slowest
    direction, times a in SGHMC, but no fewer than 2 / a there. MCLMC finds its step size itself.
    """
    if kernel == "MCLMC":
        return Plan("auto", MCLMC_STEPS)
    noise = torch.zeros_like(pilot.row_covariance)
    if batch_size is not None:
        noise = num_data * (num_data / batch_size - 1) * pilot.row_covariance
    scale = torch.ones_like(pilot.second_moment)
    if kernel == "PSGLD":
        scale = num_data / (pilot.second_moment + noise.diagonal()).sqrt()
    root = scale.sqrt()
    hessians, noise = root[:, None] * pilot.hessians * root, root[:, None] * noise * root
    of_curvature, of_noise = (1 / (2 - FRICTION), 1 / FRICTION) if kernel == "SGHMC" else (1.0, 1.0)
    widening = torch.linalg.eigvalsh(of_curvature * hessians + of_noise * noise)[:, -1].quantile(0.95)
    step_size = 4 * INFLATION / float(widening)
    slowest = float(torch.linalg.eigvalsh(hessians.mean(0))[0])
    steps = 4 / (step_size * slowest) if slowest > 0 else math.inf
    return Plan(step_size, max(FRICTION * steps, 2 / FRICTION) if kernel == "SGHMC" else steps)


def shown(step_size: float | str) -> str:
    """A step size in a table."""
    return step_size if isinstance(step_size, str) else f"{step_size:.2g}"
