# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Probe inputs, at which functions are compared: near the data, and far from them, where posteriors differ most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.runtime.trees import tree_flatten, tree_unflatten

# Shares of the probes: mixtures of two rows, rows with added noise, unchanged rows; the rest is noise alone. With more
# unchanged rows the generator is better near the data, and worse far from them.
_MIXTURES, _PERTURBED, _UNCHANGED, _NOISE = 0.25, 0.35, 0.2, 0.2


class RowArguments:
    """A model as a function of those of its arguments that have one row per datum.

    :param callable model: a Pyro model.
    :param args: its arguments; the leading dimension of the first tensor is the number of rows.
    :param kwargs: its keyword arguments.
    :raises ValueError: if no argument is a tensor with rows.
    """

    def __init__(self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        #: The model, as functions with decorators have it.
        self.__wrapped__ = model
        self._leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        tensors = [leaf for leaf in self._leaves if _has_rows(leaf)]
        if not tensors or len(tensors[0]) == 0:
            raise ValueError("no argument of the model is a tensor with rows")
        self._num_rows = len(tensors[0])
        #: The arguments with rows, in order; also those inside of tuples and dicts.
        self.rows: tuple[Tensor, ...] = tuple(value for value in tensors if len(value) == self._num_rows)

    def __call__(self, *rows: Tensor) -> Any:
        args, kwargs = self.of(*rows)
        return self.__wrapped__(*args, **kwargs)

    def of(self, *rows: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keyword arguments of the model with these rows in place of its own."""
        given = iter(rows)
        is_row = [_has_rows(leaf) and len(leaf) == self._num_rows for leaf in self._leaves]
        leaves = [next(given) if flag else leaf for flag, leaf in zip(is_row, self._leaves, strict=True)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return list(args), kwargs


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


class Probes:
    """Makes probe inputs from rows of data.

    A quarter are mixtures of two rows (Zhang et al., ICLR 2018), 35 % are rows with Gaussian noise of up to the data's
    standard deviation, mostly less, 20 % are unchanged rows, and the rest are uniform noise in the range of the data.
    Integer arguments are always unchanged rows.

    :param rows: tensors with one row per datum, ``(N, ...)`` each.
    :param bool unchanged: take all probes from the rows, unchanged.
    """

    #: Whether probes are rows, of which a model takes any number; otherwise it takes all data as they are.
    has_rows = True

    def __init__(self, rows: Sequence[Tensor], *, unchanged: bool = False) -> None:
        self._rows = tuple(rows)
        self._unchanged = unchanged
        self._ranges = [_range(value) if value.is_floating_point() else None for value in rows]

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """``count`` probes, with torch's global generator."""
        device = self._rows[0].device
        num_rows = len(self._rows[0])
        first, second = torch.randint(num_rows, (2, count), device=device)
        amount = torch.rand(count, device=device).square()
        return tuple(
            value[first] if bounds is None or self._unchanged else _vary(value, bounds, first, second, amount)
            for value, bounds in zip(self._rows, self._ranges, strict=True)
        )

    def groups(self, count: int) -> dict[str, tuple[Tensor, ...]]:
        """Probes by kind, ``count`` of each: ``"rows"`` unchanged, and where some are varied, those ``"near"`` the data
        (noise and mixtures) and ``"far"`` (noise alone)."""
        varied = not self._unchanged and any(bounds is not None for bounds in self._ranges)
        plain = Probes(self._rows, unchanged=True).draw(count)
        if not varied:
            return {"rows": plain}
        mixed = self.draw(int(count / _NOISE) + 1)
        near = int((_MIXTURES + _PERTURBED) * len(mixed[0]))
        noise = int((_MIXTURES + _PERTURBED + _UNCHANGED) * len(mixed[0]))
        return {
            "rows": plain,
            "near": tuple(value[:near][:: max(1, near // count)][:count] for value in mixed),
            "far": tuple(value[noise:] for value in mixed),
        }


def _vary(
    value: Tensor, bounds: tuple[Tensor, Tensor, Tensor], first: Tensor, second: Tensor, amount: Tensor
) -> Tensor:
    low, high, deviation = bounds
    count = len(first)
    mixtures, perturbed = int(_MIXTURES * count), int((_MIXTURES + _PERTURBED) * count)
    noise = int((_MIXTURES + _PERTURBED + _UNCHANGED) * count)
    probes = value[first].clone()
    amount = amount.to(value).reshape(-1, *[1] * (value.dim() - 1))
    probes[:mixtures] = torch.lerp(probes[:mixtures], value[second[:mixtures]], amount[:mixtures] / 2)
    middle = slice(mixtures, perturbed)
    probes[middle] += torch.randn_like(probes[middle]) * deviation * amount[middle]
    probes[noise:] = low + (high - low) * torch.rand_like(probes[noise:])
    return probes


def _range(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper bound and standard deviation: of all entries, or by column where columns differ in unit.

    Pixels have a common unit, so that also those that are constant in the data are varied. Columns whose ranges differ
    much from that of all columns have units of their own.
    """
    low, high = value.amin(0), value.amax(0)
    ranges = (high - low)[high > low]
    if value.dim() != 2 or len(ranges) == 0 or ranges.median() >= 0.5 * (high.amax() - low.amin()):
        return low.amin(), high.amax(), value.std(correction=0)
    return low, high, value.std(0, correction=0)
