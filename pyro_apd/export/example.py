# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Examples of a network's inputs, whose shapes an exported program has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_apd.errors import ExportError


def network_inputs(
    net: nn.Module, example: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Inputs by name: as given, or one row for a network that begins with a linear layer.

    :param net: the network.
    :param example: a tensor, several, or several by name; None to derive it.
    :raises ExportError: if it is needed.
    """
    if isinstance(example, Mapping):
        return dict(example)
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
