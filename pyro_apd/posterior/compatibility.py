# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a posterior is one of a given model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyro_apd.errors import ArtifactError
from pyro_apd.models.frozen import FrozenTensors, named_tensors, put_values, reading
from pyro_apd.models.layout import Layout
from pyro_apd.models.networks import network_tensors
from pyro_apd.runtime.global_state import preserved_param_store, seeded


def check_model(
    layout: Layout,
    frozen: FrozenTensors | None,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Compares sites and frozen tensors with those of a model, which is run once.

    :raises ArtifactError: if a site is missing in the model, or has another shape or support there, or if frozen
        tensors differ.
    """
    with preserved_param_store(), poutine.block(), torch.no_grad(), seeded(0), reading(model) as read:
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    _check_layout(layout, trace)
    if frozen is not None:
        frozen.check(model, read)


def frozen_values(frozen: FrozenTensors | None) -> dict[str, Tensor]:
    """The numbers of frozen tensors, for a file.

    :raises ValueError: if they are not at hand.
    """
    if frozen is not None and not frozen.read:
        return {}
    values = {} if frozen is None else frozen.intact_values()
    if not values:
        raise ValueError(
            "frozen=True: the frozen weights of the model are not known here, or have changed since the posterior was "
            "distilled. Save the posterior that distill() returned, before the model is trained further, or one that "
            "was loaded from a file with frozen weights."
        )
    return values


def restore(frozen: FrozenTensors | None, layout: Layout, model: Callable[..., Any]) -> None:
    """Copies frozen tensors into a model, in place.

    :raises ArtifactError: if their numbers are not known, or the model has no such tensors.
    """
    values = {} if frozen is None else frozen.intact_values()
    if not values and (frozen is None or frozen.read):
        raise ArtifactError("This posterior does not hold frozen weights. Save it with save(path, frozen=True).")
    if isinstance(model, torch.nn.Module) and not isinstance(model, PyroModule):
        tensors = network_tensors(model, layout)
    else:
        tensors = named_tensors(model)
    put_values(tensors, values)


def _check_layout(layout: Layout, trace: Any) -> None:
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
