# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Inputs of a network: one tensor, several, or tensors by name, all with one row per datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.errors import DataError, ModelError
from pyro_apd.runtime.trees import tree_flatten, tree_leaves, tree_unflatten


@dataclass(frozen=True)
class NetworkInputs:
    """The arguments of one call of a network.

    :ivar tuple args: its positional arguments.
    :ivar dict kwargs: its keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, x: Any, named: Mapping[str, Any]) -> NetworkInputs:
        """From the inputs that a :class:`~pyro_apd.BNN` is given.

        :param x: a tensor; a tuple or list of positional arguments; a mapping, such as a tokenizer's, of keyword
            arguments; None for none.
        :param named: further keyword arguments.
        :raises DataError: if there is no tensor with rows among them, or arguments have different names for the same.
        """
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = dict(named)
        if isinstance(x, Mapping):
            twice = sorted(set(x) & set(named))
            if twice:
                raise DataError(f"Inputs {twice} are in x and among the keyword arguments; give them once.")
            kwargs = {**x, **named}
        elif isinstance(x, (tuple, list)):
            args = tuple(x)
        elif x is not None:
            args = (x,)
        inputs = cls(args, kwargs)
        if not inputs._with_rows():
            given = type(x).__name__ if x is not None else sorted(named)
            raise DataError(
                f"The network needs inputs with one row per datum; got {given}. Give a tensor, a tuple of tensors, or "
                "a dict of tensors by the names of the network's arguments."
            )
        return inputs

    @property
    def num_rows(self) -> int:
        """Data: the leading dimension of the first tensor."""
        return len(self._with_rows()[0])

    @property
    def device(self) -> torch.device:
        """That of the first tensor."""
        return self._with_rows()[0].device

    @property
    def form(self) -> str:
        """What they are besides the numbers of their tensors: names, and values of other kinds."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        return f"{spec} {[None if isinstance(leaf, Tensor) else leaf for leaf in leaves]}"

    @property
    def is_by_row(self) -> bool:
        """Whether all tensors have a row per datum and no gradient, and nothing else is given but plain constants."""
        count, leaves = self.num_rows, tree_leaves((self.args, self.kwargs))
        return all(
            (leaf.dim() > 0 and len(leaf) == count and not leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf is None or isinstance(leaf, (bool, int, float, str))
            for leaf in leaves
        )

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> NetworkInputs:
        """The same with ``function`` of each tensor that has a row per datum."""
        count = self.num_rows
        leaves, spec = tree_flatten((self.args, self.kwargs))
        leaves = [function(leaf) if _has_rows(leaf) and len(leaf) == count else leaf for leaf in leaves]
        return NetworkInputs(*tree_unflatten(leaves, spec))

    def tensors(self) -> list[Tensor]:
        """All tensors among them."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def call(self, net: torch.nn.Module, weights: Mapping[str, Tensor]) -> Any:
        """What the network gives with these weights; of the named outputs of `transformers` the logits.

        :raises ModelError: if the network takes other arguments.
        """
        try:
            output = torch.func.functional_call(net, dict(weights), self.args, self.kwargs)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            given = [type(arg).__name__ for arg in self.args] + [f"{name}=" for name in self.kwargs]
            raise ModelError(
                f"The network cannot be called as net({', '.join(given)}): {error}. A tuple of inputs is passed on as "
                "positional arguments, a dict as keyword arguments; a network that takes the dict itself gets (dict,)."
            ) from error
        logits = getattr(output, "logits", None)
        return logits if isinstance(logits, Tensor) and not isinstance(output, Tensor) else output

    def _with_rows(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors() if tensor.dim() > 0]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
