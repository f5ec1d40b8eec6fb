# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a posterior is one of a given model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine

from pyro_apd.errors import ArtifactError
from pyro_apd.models.layout import Layout
from pyro_apd.runtime.global_state import preserved_param_store, seeded


def check_layout(layout: Layout, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compares the sites of ``layout`` with those of a model, which is run once.

    :raises ArtifactError: if a site is missing in the model, or has another shape or support there.
    """
    with preserved_param_store(), poutine.block(), torch.no_grad(), seeded(0):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    known = {name for name, _ in trace.iter_stochastic_nodes()}
    names = [name for name in layout.names if name in known]
    missing = [name for name in layout.names if name not in known]
    theirs = {site["name"]: site for site in Layout.from_trace(trace, names).to_json()}
    ours = {site["name"]: site for site in layout.to_json()}
    unlike = [f"{n}: {theirs[n]['shape']} {theirs[n]['support']['kind']}" for n in names if theirs[n] != ours[n]]
    if missing or unlike:
        raise ArtifactError(
            f"This posterior is of another model. It draws {layout!r}; the model lacks {missing} and differs in "
            f"{unlike}. Give the model that the posterior was distilled from."
        )
