# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A function of one draw of a model's latents, evaluated for all draws: vectorised where that can be, in chunks.

The one place that knows :func:`torch.vmap`'s conditions: Pyro's validation off (its checks branch on values), fresh
noise for each draw, and what to do where the model cannot be vectorised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.overrides import TorchFunctionMode

from pyro_apd.models.layout import is_subsample
from pyro_apd.predictive.draws import Draws, Values, draws_between
from pyro_apd.predictive.vmap_linear import DrawLinear
from pyro_apd.runtime.vectorisation import vectorised

#: From the values of one draw, and whether it runs under vmap, to named results.
DrawFunction = Callable[[Values, bool], Values]

# What the intermediate results of one chunk may take together. Larger chunks leave the caches of a CPU, and gain
# little on a GPU, which these fill.
_CHUNK_BYTES = 2**26
# Results of this many operations of the largest kind are alive together in a forward pass without gradients.
_ALIVE = 3


def map_draws(function: DrawFunction, draws: Draws, num_draws: int, chunk_size: int, model: object) -> Values:
    """``function`` for each of ``num_draws`` draws, results stacked along a new first dimension.

    :param function: called as ``function(values, vectorised)``; ``vectorised`` is True under vmap, where validation is
        off.
    :param draws: values ``(S, ...)`` by site, or their source; may be empty.
    :param chunk_size: draws evaluated together.
    :param model: that the function runs, see :func:`~pyro_apd.runtime.vectorisation.vectorised`.
    """
    values = vectorised(lambda: _map_vectorised(function, draws, num_draws, chunk_size), model)
    return map_one_by_one(function, draws, num_draws) if values is None else values


def map_one_by_one(function: DrawFunction, draws: Draws, num_draws: int) -> Values:
    """As :func:`map_draws`, one draw after another, with validation as the user has it."""
    rows = [function(_draw(draws, i), False) for i in range(num_draws)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def map_chunk(function: DrawFunction, part: Values, num_draws: int) -> Values:
    """``function`` of ``num_draws`` draws together, under vmap; results may share memory with each other."""
    # The index gives vmap something to map over where a model has no latents.
    mapped = torch.vmap(lambda index, values: function(values, True), randomness="different")
    with vmap_conditions(), nullcontext() if torch.is_grad_enabled() else DrawLinear():
        return mapped(torch.arange(num_draws), part)


def _draw(draws: Draws, i: int) -> Values:
    return {name: value[0] for name, value in draws_between(draws, i, i + 1).items()}


def _map_vectorised(function: DrawFunction, draws: Draws, num_draws: int, chunk_size: int) -> Values:
    whole: Values = {}
    for start in range(0, num_draws, chunk_size):
        stop = min(start + chunk_size, num_draws)
        piece = map_chunk(function, draws_between(draws, start, stop), stop - start)
        # Copied even where one chunk is all: a result may be a draw itself, or one value seen S times, and the
        # caller may write to it.
        if not whole:
            whole = {name: value.new_empty((num_draws, *value.shape[1:])) for name, value in piece.items()}
        for name, value in piece.items():
            whole[name][start:stop] = value
    return whole


@contextmanager
def vmap_conditions() -> Iterator[None]:
    """Validation off, and no remark about an operation that vmap does in a loop."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def sample_freshly(msg: Any) -> None:
    """Samples a site that has no value yet; under vmap, separately for each draw. For use in a messenger."""
    if msg["value"] is None and not is_subsample(msg):
        with _FreshNoise():
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])


class _FreshNoise(TorchFunctionMode):
    """Lets samplers of :mod:`torch.distributions` draw separately for each draw under vmap.

    Many fill an empty tensor in place, which vmap refuses because that tensor is shared by all draws. Random contents
    make it one tensor a draw. Only for code that uses what the in-place call *returns*, as every sampler does.
    """

    _FILLS = frozenset({"normal_", "uniform_", "exponential_", "cauchy_", "geometric_", "log_normal_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._FILLS and args[0].is_floating_point():
            args = (torch.rand_like(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


class Footprint(TorchFunctionMode):
    """Watches one evaluation for one draw, to tell how many draws fit in a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = _storage(result)
            if not any(isinstance(arg, Tensor) and _storage(arg) == storage for arg in args):
                self.largest = max(self.largest, result.numel() * result.element_size())
        return result

    def chunk_size(self, num_draws: int, times: int = 1) -> int:
        """As many draws as keep a chunk within its budget, at least one; a draw takes ``times`` what was watched."""
        return max(1, min(num_draws, _CHUNK_BYTES // max(1, _ALIVE * self.largest * times)))


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without one storage
        return id(tensor)


def parameters_valid(distribution: Any) -> Tensor | bool:
    """What a distribution's constructor checks with validation on, as a tensor: whether all parameters are allowed."""
    valid: Tensor | bool = True
    while isinstance(distribution, Distribution):
        known = vars(distribution)
        for name, constraint in distribution.arg_constraints.items():
            if name in known and isinstance(known[name], Tensor) and not constraints.is_dependent(constraint):
                valid = constraint.check(known[name]).all() & valid
        distribution = known.get("base_dist")
    return valid
