# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Linear layers of many draws at once: the same data under several weights is one product of matrices, not several.

:func:`torch.vmap` does a batch of small products instead, and copies the data for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DrawLinear(TorchFunctionMode):
    """Lets :func:`torch.nn.functional.linear` and ``x @ w`` take the fast way under :func:`torch.vmap`.

    For code without gradients. Results are those of vmap but for rounding.
    """

    _PRODUCTS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and _is_layer(*args[:2]):
            return _Linear.apply(args[0], args[1], args[2] if len(args) > 2 else None)  # type: ignore[no-untyped-call]
        if func in self._PRODUCTS and not kwargs and _is_layer(*args):
            return _Linear.apply(args[0], args[1].mT, None)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _is_layer(inputs: Any, weight: Any) -> bool:
    return (
        isinstance(inputs, Tensor)
        and isinstance(weight, Tensor)
        and inputs.dim() >= 2
        and weight.dim() == 2
        and inputs.dtype == weight.dtype
        and inputs.layout == weight.layout == torch.strided
        and not torch.is_autocast_enabled(inputs.device.type)
    )


class _Linear(torch.autograd.Function):
    """``functional.linear`` with a rule of its own for a dimension of draws, in any of the three."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        num_draws, (input_dim, weight_dim, bias_dim) = info.batch_size, in_dims
        if weight_dim is None or (bias is not None and bias_dim is None):
            weight_SOI = weight.expand(num_draws, -1, -1) if weight_dim is None else weight.movedim(weight_dim, 0)
            bias_SO = bias if bias is None or bias_dim is not None else bias.expand(num_draws, -1)
        else:
            weight_SOI = weight.movedim(weight_dim, 0)
            bias_SO = bias
        if bias_SO is not None and bias_dim:
            bias_SO = bias_SO.movedim(bias_dim, 0)
        if input_dim is None:
            return _shared(inputs, weight_SOI, bias_SO)
        inputs_S = inputs.movedim(input_dim, 0)
        flat_SNI = inputs_S if inputs_S.dim() == 3 else inputs_S.flatten(1, -2)
        product_SNO = (
            torch.bmm(flat_SNI, weight_SOI.mT)
            if bias_SO is None
            else torch.baddbmm(bias_SO.unsqueeze(1), flat_SNI, weight_SOI.mT)
        )
        return product_SNO.reshape(*inputs_S.shape[:-1], product_SNO.shape[-1]), 0


def _shared(inputs: Tensor, weight_SOI: Tensor, bias_SO: Tensor | None) -> tuple[Tensor, int]:
    """The same inputs for all draws: one product, whose columns are units of all draws."""
    num_draws, num_units, num_inputs = weight_SOI.shape
    flat_NI, stacked_FI = inputs.reshape(-1, num_inputs), weight_SOI.reshape(num_draws * num_units, num_inputs)
    product_NF = functional.linear(flat_NI, stacked_FI, None if bias_SO is None else bias_SO.reshape(-1))
    return product_NF.view(*inputs.shape[:-1], num_draws, num_units), inputs.dim() - 1
