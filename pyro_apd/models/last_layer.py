# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Refuses networks whose outputs are probabilities where the likelihood takes logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.errors import ModelError

# What makes probabilities of logits, by likelihood.
_TO_PROBABILITIES = {"categorical": "softmax(logits, -1)", "bernoulli": "sigmoid(logits)"}
_LAYERS = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid)
# The same as names of the last operation in a graph of gradients, and operations that change the shape alone.
_OPERATIONS = ("Softmax", "Sigmoid", "Hardsigmoid", "LogSigmoid")
_RESHAPES = ("Squeeze", "Unsqueeze", "View", "UnsafeView", "Reshape", "Select", "Slice", "Clone", "Alias", "T")


def refuse_last_layer(net: nn.Module, likelihood: str) -> None:
    """Refuses a network whose last layer makes probabilities, where it is known before the network is called.

    :raises ModelError: naming the layer.
    """
    name, last = "net", net
    while isinstance(last, nn.Sequential) and len(last):
        place = max((i for i, layer in enumerate(last) if not isinstance(layer, nn.Identity)), default=0)
        name, last = f"{name}[{place}]", last[place]
    is_wrong = isinstance(last, _LAYERS) or (likelihood == "bernoulli" and isinstance(last, nn.LogSoftmax))
    if is_wrong and likelihood in _TO_PROBABILITIES:
        raise ModelError(_message(likelihood, f"its last layer, {name}, is {type(last).__name__}", f" (del {name})"))


def refuse_probabilities(
    likelihood: str, outputs: Callable[[dict[str, Tensor]], Any], weights: dict[str, Tensor]
) -> None:
    """The same by the last operation of the network.

    Log-probabilities of all classes are logits.

    :param outputs: its outputs for some inputs, as a function of its weights.
    :param weights: at which it is called.
    :raises ModelError: naming the operation.
    """
    if likelihood not in _TO_PROBABILITIES:
        return
    copies = {id(value): value.detach().clone().requires_grad_() for value in weights.values()}
    try:
        with torch.enable_grad():
            output = outputs({name: copies[id(value)] for name, value in weights.items()})
    except Exception:  # a network may take whole batches only
        return
    node = output.grad_fn if isinstance(output, Tensor) else None
    while node is not None and _operation(node) in _RESHAPES and node.next_functions:
        node = node.next_functions[0][0]
    operation = "" if node is None else _operation(node)
    if operation in _OPERATIONS or (likelihood == "bernoulli" and operation == "LogSoftmax"):
        raise ModelError(_message(likelihood, f"the last operation of its forward() is {operation}", ""))


def _operation(node: Any) -> str:
    return str(node.name()).partition("Backward")[0]


def _message(likelihood: str, found: str, how: str) -> str:
    return (
        f"likelihood={likelihood!r} takes the network's outputs as logits, and {found}: its values would be taken for "
        f"logits. Leave that out{how}; probabilities are torch.{_TO_PROBABILITIES[likelihood]} of what the model "
        "returns."
    )
