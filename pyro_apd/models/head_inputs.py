# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Inputs of the layer that holds all latents of a network, where the rest of the network is fixed before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.errors import ModelError
from pyro_apd.models.bayesian_part import BayesianPart
from pyro_apd.models.network_inputs import NetworkInputs
from pyro_apd.runtime.threads import one_thread

# Rows that are run again alone, to see whether rows depend on each other.
_NUM_ALONE = 2


@torch.no_grad()
def head_inputs(net: nn.Module, part: BayesianPart, inputs: NetworkInputs, batch_size: int) -> Tensor:
    """The inputs ``(N, ...)`` of the smallest module with all latents, which must give the outputs of the network.

    :raises ModelError: if it does not, or a row depends on other rows.
    """
    name = part.module()
    if not name:
        raise ModelError("The latents are not within one layer of the network, so that it has no fixed part before it.")
    head = net.get_submodule(name)
    pieces = []
    for rows in torch.arange(inputs.num_rows, device=inputs.device).split(batch_size):
        batch = inputs.map_rows(lambda tensor, rows=rows: tensor[rows.to(tensor.device)])  # type: ignore[misc]
        pieces.append(_inputs_of(name, net, head, batch))
    few = inputs.map_rows(lambda tensor: tensor[:_NUM_ALONE])
    alone = _inputs_of(name, net, head, few)
    if not torch.allclose(alone, pieces[0][:_NUM_ALONE], rtol=1e-3, atol=1e-5 * float(alone.abs().max())):
        raise ModelError(f"The inputs of layer '{name}' for one datum depend on the other data of its batch.")
    return torch.cat(pieces)


def _inputs_of(name: str, net: nn.Module, head: nn.Module, inputs: NetworkInputs) -> Tensor:
    seen: list[tuple[Any, Any, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args, kwargs, output))

    with one_thread():  # a hook would see the calls of another thread
        handle = head.register_forward_hook(note, with_kwargs=True)
        try:
            output = inputs.call(net, {})
        finally:
            handle.remove()
    if len(seen) != 1:
        raise ModelError(f"Layer '{name}' is called {len(seen)} times, so that its inputs are not one tensor.")
    args, kwargs, result = seen[0]
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or len(args[0]) != inputs.num_rows:
        raise ModelError(f"Layer '{name}' does not take one tensor with a row per datum.")
    if not isinstance(output, Tensor) or output.shape != result.shape or not torch.equal(output, result):
        raise ModelError(f"The outputs of layer '{name}', which holds all latents, are not those of the network.")
    features: Tensor = args[0]
    return features
