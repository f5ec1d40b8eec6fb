# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How an ONNX file keeps tensors: as the posterior's own file does, and the nodes that decode them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.export import rice_code
from pyro_apd.generators import precision

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Integers of a tensor for which the nodes that decode them, some two thousand bytes, are worth it.
_MIN_CODED = 4096


@dataclass
class StoredTensors:
    """Initialisers and nodes of a graph, in order.

    :ivar bool is_compact: whether large tensors of integers are in a code that the graph decodes.
    :ivar list initializers: names and arrays.
    :ivar list nodes: ``onnx.NodeProto`` each.
    """

    is_compact: bool = False
    initializers: list[tuple[str, NDArray[Any]]] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)

    def add(self, tensors: Mapping[str, Tensor], dtype: str) -> None:
        """Keeps tensors at a precision of :data:`pyro_apd.generators.precision.DTYPES`.

        Integers are in a code, or in eight bits where these hold them.
        """
        stored = precision.encode(tensors, dtype)
        for name, value in tensors.items():
            kept = stored[name].detach().cpu()
            if name + precision.SCALE_SUFFIX in stored and name + precision.SCALE_SUFFIX not in tensors:
                self._add_scaled(name, kept, stored[name + precision.SCALE_SUFFIX].cpu())
            elif self.is_compact and _is_coded(kept):
                self._add_coded(name, kept)
            elif kept.dtype == value.dtype and not (kept.dtype == torch.int16 and _fits_int8(kept)):
                self.initializers.append((name, kept.numpy()))
            else:
                kept = kept.to(torch.int8) if kept.dtype == torch.int16 else kept
                self._add_cast(name, kept, value.dtype)

    def _add_coded(self, name: str, kept: Tensor) -> None:
        from onnx import helper

        code = rice_code.encode(kept.numpy())
        constants, nodes = rice_code.nodes(f"{name}/decoded", code)
        self.initializers += constants.items()
        to = helper.np_dtype_to_tensor_dtype(kept.numpy().dtype)
        self.nodes += [*nodes, helper.make_node("Cast", [f"{name}/decoded"], [name], to=to)]

    def _add_cast(self, name: str, kept: Tensor, dtype: torch.dtype) -> None:
        from onnx import helper

        if kept.dtype == torch.bfloat16:  # numpy has none
            kept = kept.float()
        self.initializers.append((f"{name}/stored", kept.numpy()))
        to = helper.np_dtype_to_tensor_dtype(np.dtype(str(dtype).removeprefix("torch.")))
        self.nodes.append(helper.make_node("Cast", [f"{name}/stored"], [name], to=to))

    def _add_scaled(self, name: str, kept: Tensor, scale_R: Tensor) -> None:
        from onnx import TensorProto, helper

        self.initializers.append((f"{name}/stored", kept.numpy()))
        self.initializers.append((f"{name}/scale", scale_R.float().unsqueeze(-1).numpy()))
        self.nodes.append(helper.make_node("Cast", [f"{name}/stored"], [f"{name}/float"], to=TensorProto.FLOAT))
        self.nodes.append(helper.make_node("Mul", [f"{name}/float", f"{name}/scale"], [name]))


def _is_coded(values: Tensor) -> bool:
    return values.dtype in (torch.int8, torch.int16) and values.dim() > 1 and values.numel() >= _MIN_CODED


def _fits_int8(values: Tensor) -> bool:
    return values.numel() == 0 or (int(values.min()) >= -128 and int(values.max()) <= 127)
