# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The structure of a model, established before the first step: its latents, and how it scales its likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro import poutine
from torch import Tensor

from pyro_apd.data.minibatch import MinibatchSource
from pyro_apd.errors import ModelError
from pyro_apd.models.layout import Layout, is_subsample
from pyro_apd.models.scaling import check_plates, scaled_sites
from pyro_apd.models.tracing import Site, subsampled_plates


@dataclass(frozen=True)
class ModelStructure:
    """The parts of a model that its potential is computed from.

    :ivar Layout layout: its latent sites.
    :ivar start: constrained values of the latents in the first run, drawn from the prior.
    :ivar scaled: observed sites of which a batch shows a part. True: their plate multiplies them by N/B already;
        False: the kernel has to.
    :ivar pass_through: plates that state N themselves and are given batches of ready rows. Their indices have no
        effect.
    """

    layout: Layout
    start: dict[str, Tensor]
    scaled: Mapping[str, bool] = field(default_factory=dict)
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
    if trace.param_nodes:
        warnings.warn(
            f"The model has parameters {sorted(trace.param_nodes)} that are not sampled: they stay at their present "
            "values. Give them priors (PyroSample) if they belong to the posterior.",
            stacklevel=2,
        )
    layout = Layout.from_trace(trace)
    start = {name: site["value"].detach() for name, site in latents.items()}
    if source.is_full:
        return ModelStructure(layout, start)
    probe = source.probe_calls(inputs)
    if source.plates:
        check_plates(model, source.plates, probe, start, trace)
        return ModelStructure(layout, start)
    assert source.num_data is not None
    scaled = scaled_sites(model, source.num_data, probe, start)
    return ModelStructure(layout, start, scaled, frozenset(subsampled_plates(trace)))


def _refuse_discrete(latents: Mapping[str, Site]) -> None:
    for name, site in latents.items():
        if site["fn"].has_enumerate_support or site["fn"].support.is_discrete:
            raise ModelError(
                f"Site '{name}' is a discrete latent ({type(site['fn']).__name__}); gradient-based samplers need "
                "continuous latents. Marginalise it, or if it should be data, pass its value with obs= (was the target "
                "given to mcmc.run?)."
            )
