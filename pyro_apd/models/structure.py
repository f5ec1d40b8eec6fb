# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The structure of a model, established before the first step: its latents, and how it scales its likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_apd.data.minibatch import Call, MinibatchSource
from pyro_apd.errors import ModelError
from pyro_apd.models.layout import Layout, is_subsample
from pyro_apd.models.repeatability import check_repeatable
from pyro_apd.models.scaling import check_plates, scaled_sites
from pyro_apd.models.tracing import Site, observed_sites, subsampled_plates
from pyro_apd.runtime.trees import tree_leaves

# A site of more entries is compared at values of the size that it starts with: a network with random weights of unit
# size gives outputs so large that they are compared badly.
_FEW_ENTRIES = 10


@dataclass(frozen=True)
class ModelStructure:
    """The parts of a model that its potential is computed from.

    :ivar Layout layout: its latent sites.
    :ivar start: constrained values of the latents in the first run, drawn from the prior.
    :ivar scaled: observed sites of which a batch shows a part. True: their plate multiplies them by N/B already;
        False: the kernel has to.
    :ivar observed: names of the observed sites that were examined; None where any may appear.
    :ivar pass_through: plates that state N themselves and are given batches of ready rows. Their indices have no
        effect.
    """

    layout: Layout
    start: dict[str, Tensor]
    scaled: Mapping[str, bool] = field(default_factory=dict)
    observed: frozenset[str] | None = None
    pass_through: frozenset[str] = frozenset()


def examine(
    model: Callable[..., Any], source: MinibatchSource, inputs: tuple[Tensor, ...], trace: poutine.Trace
) -> ModelStructure:
    """The structure of ``model``.

    :param source: of mini-batches, and ``inputs`` one of its batches.
    :param trace: a run of the model, on that batch or on all data.
    :raises ModelError: if a latent is discrete, lies in a subsampled plate, or a scaling cannot be established.
    """
    latents = {name: site for name, site in trace.iter_stochastic_nodes() if not is_subsample(site)}
    _refuse_discrete(latents)
    empty = [name for name, site in latents.items() if site["value"].numel() == 0]
    if empty:
        raise ModelError(f"Latent sites {empty} have no entries: leave them out, or give their priors a shape.")
    if trace.param_nodes:
        warnings.warn(
            f"The model has parameters {sorted(trace.param_nodes)} that are not sampled: they stay at their present "
            "values. Give them priors (PyroSample) if they belong to the posterior.",
            stacklevel=2,
        )
    layout = Layout.from_trace(trace)
    start = {name: site["value"].detach() for name, site in latents.items()}
    pass_through = frozenset() if source.plates else frozenset(subsampled_plates(trace))
    call = source.bind(inputs)
    indices = {name: torch.arange(inputs[0].shape[0]) for name in pass_through}
    points = probe_points(layout, start)
    check_repeatable(model, Call(call.args, call.kwargs, {**call.indices, **indices}), [*points[1:], points[0]])
    observed = frozenset(observed_sites(trace))
    if source.is_full:
        return ModelStructure(layout, start, observed=observed)
    axes = source.probe_rows(inputs)
    if source.plates:
        check_plates(model, source.plates, axes, points, trace)
        return ModelStructure(layout, start, observed=observed)
    assert source.num_data is not None
    (rows,) = axes
    scaled = scaled_sites(model, source.num_data, rows, points)
    return ModelStructure(layout, start, scaled, observed, pass_through)


def refuse_missing_sites(trace: poutine.Trace, arguments: Any) -> None:
    """Raises ModelError for a model that has no latent, or is given data and observes nothing.

    :param arguments: of the run. A model without data may be a density of its latents alone.
    """
    if not any(not is_subsample(site) for _, site in trace.iter_stochastic_nodes()):
        raise ModelError(
            "The model has no latent: every site is observed, so that there is nothing to sample. Draw what is unknown "
            "with pyro.sample, without obs=; apd.BNN(net) makes the weights of a network latents."
        )
    if tree_leaves(arguments) and not observed_sites(trace):
        raise ModelError(
            "The model is given data and observes nothing, so that its draws would be from the prior (was the target "
            "given to mcmc.run?). Pass the targets there, and in the model with obs= to the site that scores them."
        )


def probe_points(layout: Layout, start: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Constrained values at which the model is compared: the start, a point near it and two opposite ones.

    What has no effect at a start of zeros has one at the others; what depends on the sign of a latent, at one of them.
    """
    generator = torch.Generator().manual_seed(0)
    points: list[dict[str, Tensor]] = [dict(start), {}, {}, {}]
    for site in layout:
        theta = site.transform.inv(start[site.name]).detach()
        noise = torch.empty(theta.shape, dtype=theta.dtype).normal_(generator=generator).to(theta.device)
        size = theta.square().mean().sqrt().clamp(min=0.03) if theta.numel() else 1.0
        far = noise * (1.0 if theta.numel() < _FEW_ENTRIES else size)
        for point, value in zip(points[1:], (theta + 0.3 * size * noise, far, -far), strict=True):
            point[site.name] = site.transform(value)
    return points


def _refuse_discrete(latents: Mapping[str, Site]) -> None:
    for name, site in latents.items():
        if site["fn"].has_enumerate_support or site["fn"].support.is_discrete:
            raise ModelError(
                f"Site '{name}' is a discrete latent ({type(site['fn']).__name__}); gradient-based samplers need "
                "continuous latents. Marginalise it, or if it should be data, pass its value with obs= (was the target "
                "given to mcmc.run?)."
            )
