# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Second moments of the inputs that each matrix of weights meets, in a few runs of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from pyro_apd.generators.weight_matrices import WeightMatrix
from pyro_apd.models.layout import Layout, Site
from pyro_apd.predictive.messengers import Substitute
from pyro_apd.runtime.dispatch import dispatch_mode
from pyro_apd.runtime.global_state import preserved_param_store

logger = logging.getLogger("pyro_apd")

# Rows of inputs that a product is measured on: a convolution has one at each place of an image.
_MAX_ROWS = 4096
# Matrices with fewer units than this are numbers like any other: a frame would cost more than they do.
_MIN_UNITS = 4


@dataclass
class LayerInputs:
    """What a matrix of weights was multiplied with.

    A grouped convolution is one matrix, and its inputs are those of all groups. Where these differ in size, weights of
    a group are 0.5 to 1.6 times as wide as the chain's. A matrix for each group would fix it, but takes a frame for
    each: a layer of four groups then takes 40 to 60 % more bytes.

    :ivar WeightMatrix matrix: where it is, with the bias that was added to the product.
    :ivar Tensor moment_II: mean of the outer products of inputs, the constant input of the bias included.
    """

    matrix: WeightMatrix
    moment_II: Tensor


def layer_inputs(
    model: Callable[..., Any], layout: Layout, theta_SD: Iterable[Tensor], args: Sequence[Any]
) -> dict[str, LayerInputs]:
    """Inputs by the site of the weights, averaged over draws; without sites whose products are not seen.

    :param theta_SD: a few draws, one after the other.
    :param args: arguments of the model, with a few hundred rows.
    """
    uses: dict[str, list[_Use]] = {}
    for theta_D in theta_SD:
        values = layout.constrain(theta_D)
        try:
            seen = _recorder(layout, values, uses)
        except ImportError as error:
            logger.debug("Inputs of layers cannot be recorded: %s.", error)
            return {}
        with preserved_param_store(), torch.no_grad(), poutine.block(), seen, Substitute(values):
            model(*args)
    return {name: found for name, of_site in uses.items() if (found := _combined(layout, layout[name], of_site))}


@dataclass
class _Use:
    """Products of a weight with inputs ``(N, I)``, averaged over these, and summed over ``count`` products."""

    moment_II: Tensor
    mean_I: Tensor
    bias: str | None
    is_transposed: bool
    count: int = 1

    @property
    def form(self) -> tuple[str | None, bool, int]:
        """What uses of the same matrix have in common."""
        return (self.bias, self.is_transposed, len(self.moment_II))

    def add_to(self, uses: list[_Use]) -> None:
        """Adds it to those of the same form: all moments together may be far larger than the network."""
        for use in uses:
            if use.form == self.form:
                use.moment_II += self.moment_II
                use.mean_I += self.mean_I
                use.count += self.count
                return
        uses.append(self)


def _combined(layout: Layout, site: Site, uses: Sequence[_Use]) -> LayerInputs | None:
    """The average; None where products have several forms."""
    first = uses[0]
    if len(uses) > 1:
        return None
    inputs = len(first.moment_II)
    units = site.size // inputs
    if units < _MIN_UNITS:
        return None
    moment_II = first.moment_II / first.count
    bias = -1
    if first.bias is not None and layout[first.bias].size == units:
        bias = layout[first.bias].start
        mean_I1 = (first.mean_I / first.count).unsqueeze(1)
        one = torch.ones(1, 1, dtype=moment_II.dtype, device=moment_II.device)
        moment_II = torch.cat([torch.cat([moment_II, mean_I1], 1), torch.cat([mean_I1.mT, one], 1)])
    return LayerInputs(WeightMatrix(site.start, units, inputs, bias, first.is_transposed), moment_II)


def _recorder(layout: Layout, values: Mapping[str, Tensor], uses: dict[str, list[_Use]]) -> AbstractContextManager[Any]:
    """Records products with sites while it is entered.

    :raises ImportError: see :func:`dispatch_mode`.
    """
    places = [(_address(value), value.numel() * value.element_size(), name) for name, value in values.items()]
    matrices = {name for name in values if layout[name].is_real and len(layout[name].shape) >= 2}
    aten = torch.ops.aten

    class Recorder(dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.mm.default:
                self._product(args[0], args[1], None)
            elif func is aten.addmm.default:
                self._product(args[1], args[2], args[0])
            elif func is aten.convolution.default:
                self._convolution(*args)
            return func(*args, **(kwargs or {}))

        def _name(self, value: Any) -> str | None:
            if not isinstance(value, Tensor) or not value.numel():
                return None
            address = _address(value)
            return next((name for start, length, name in places if start <= address < start + length), None)

        def _product(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
            for inputs_NI, weight_IO in ((left, right), (right.mT, left.mT)):
                name = self._name(weight_IO)
                if name not in matrices:
                    continue
                inputs, units = weight_IO.shape
                row = layout[name].size // layout[name].shape[0]
                # Some rows of the weights may be used alone, as in attention.
                if inputs == row and weight_IO.stride() == (1, inputs):
                    self._add(name, inputs_NI, bias, False)
                elif units == row and weight_IO.stride() == (units, 1) and inputs * units == layout[name].size:
                    self._add(name, inputs_NI, bias, True)
                return

        def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> None:
            stride, padding, dilation, transposed, _, groups = settings
            name = self._name(weight)
            if name not in matrices or transposed or weight.dim() not in (3, 4):
                return
            if weight.dim() == 3:
                x, kernel = x.unsqueeze(2), (1, weight.shape[2])
                stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
            else:
                kernel = (weight.shape[2], weight.shape[3])
            per_image = F.unfold(x[:1], kernel, dilation, padding, stride).shape[-1]
            x = x[: max(1, 4 * _MAX_ROWS // per_image)]
            patches_NJP = F.unfold(x, kernel, dilation, padding, stride)
            patches_NI = patches_NJP.mT.reshape(-1, groups, weight[0].numel()).flatten(0, 1)
            self._add(name, patches_NI, bias, False)

        def _add(self, name: str, inputs_NI: Tensor, bias: Tensor | None, is_transposed: bool) -> None:
            step = max(1, len(inputs_NI) // _MAX_ROWS)
            inputs_NI = inputs_NI[::step].double()
            moment_II = inputs_NI.mT @ inputs_NI / max(1, len(inputs_NI))
            found = _Use(moment_II, inputs_NI.mean(0), self._name(bias), is_transposed)
            found.add_to(uses.setdefault(name, []))

    recorder: AbstractContextManager[Any] = Recorder()
    return recorder


def _address(value: Tensor) -> int:
    return int(value.data_ptr())
