# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Examples of a network's inputs, whose shapes an exported program has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_apd.errors import ExportError


def network_inputs(
    net: nn.Module, example: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Inputs by name: as given, or one row for a network that begins with a linear layer.

    :param net: the network.
    :param example: a tensor, several, or several by the names of the network's arguments; None to derive it.
    :raises ExportError: if it is needed, or several are not the network's first arguments in their order.
    """
    if isinstance(example, Mapping):
        return _checked_order(net, dict(example))
    if isinstance(example, Tensor):
        return {"x": example}
    if example is not None:
        return {f"x_{i}": value for i, value in enumerate(example)}
    first = next(module for module in net.modules() if not list(module.children()))
    if not isinstance(first, nn.Linear) or not isinstance(net, (nn.Sequential, nn.Linear)):
        raise ExportError(
            f"The shape of the inputs of this {type(net).__name__} is not known. Pass example=x, a tensor with one row "
            "or more of the network's inputs; of several inputs a tuple, or a dict by name."
        )
    return {"x": torch.zeros(1, first.in_features)}


def _checked_order(net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by name, which a program passes on by position: another order would exchange them.

    :raises ExportError: if there are several, and they are not the network's first arguments in their order.
    """
    parameters = list(inspect.signature(net.forward).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    if len(inputs) > 1 and not takes_any and list(inputs) != positional[: len(inputs)]:
        raise ExportError(
            f"Several inputs are exported by position, and example={list(inputs)} are not the first arguments of "
            f"{type(net).__name__}.forward, which are {positional}. Give example= these names in this order, without "
            "gaps; keyword arguments after a gap cannot be exported yet."
        )
    return inputs
