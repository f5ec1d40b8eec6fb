# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a network as variables with names: all of its weights, some of them, or what stands for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.diagnostics.arviz_export.compat import Variable
from pyro_apd.diagnostics.comparison.evaluation import Inputs
from pyro_apd.diagnostics.draws import flat
from pyro_apd.diagnostics.mixing.function_space import FunctionProbe
from pyro_apd.predictive.draws import Values, evenly_spaced
from pyro_apd.runtime.checks import integer

#: Variables that stand for weights; no site may be called so where they are asked for.
PARAMETERS, PROJECTIONS, FUNCTIONS = "parameters", "projections", "functions"


@dataclass(frozen=True)
class Selection:
    """What is kept of draws; see :func:`~pyro_apd.diagnostics.to_arviz`."""

    var_names: Sequence[str] | None = None
    max_parameters: int | None = None
    projections: int = 0
    functions: int = 0

    def __post_init__(self) -> None:
        if self.max_parameters is not None:
            hint = "To have no weights, pass var_names=[] with projections= or functions=."
            integer("max_parameters", self.max_parameters, hint=hint)
        for name in ("projections", "functions"):
            integer(name, getattr(self, name), at_least=0, hint="0 for none, or how many are wanted.")
        names = self.var_names
        is_listed = isinstance(names, Sequence) and not isinstance(names, str)
        if names is not None and not (is_listed and all(isinstance(name, str) for name in names)):
            raise ValueError(f"`var_names` must be a list of names of sites, or None for all; got {names!r:.80}.")


class Variables:
    """Makes variables of draws; the same weights, directions and inputs for the chain and for the generator.

    :param Selection selection: what is wanted.
    :param dict reference: draws ``(C, S, ...)`` by site, by whose means and spreads projections are standardised.
    :param FunctionProbe probe: the function values, where these are wanted.
    :param int seed: of the random directions.
    """

    def __init__(self, selection: Selection, reference: Values, probe: FunctionProbe | None, seed: int | None) -> None:
        self._selection, self._probe = selection, probe
        self._names = list(reference)
        if selection.projections:
            theta_SD = flat({name: value.flatten(0, 1) for name, value in reference.items()}, self._names)
            self._centre, self._scale = theta_SD.mean(0), theta_SD.std(0).nan_to_num().clamp_min(1e-30)
            generator = torch.Generator().manual_seed(0 if seed is None else seed)
            directions_DP = torch.randn(theta_SD.shape[1], selection.projections, generator=generator)
            self._directions = (directions_DP / directions_DP.norm(dim=0)).to(theta_SD)

    def __call__(self, draws: Values, argument: str) -> dict[str, Variable]:
        """Variables of draws ``(C, S, ...)`` by site.

        :param str argument: whose draws they are, for errors.
        :raises ValueError: if ``var_names`` names what is not there.
        """
        kept = self._kept(draws, argument)
        found = {}
        limit = self._selection.max_parameters
        if limit is not None and sum(_size(value) for value in kept.values()) > limit:
            found[PARAMETERS] = _some(kept, limit)
        else:
            shared = _layers_of_units(kept)
            found = {name: _whole(name, value, shared) for name, value in kept.items()}
        chains, steps = next(iter(draws.values())).shape[:2]
        pooled = {name: value.flatten(0, 1) for name, value in draws.items()}
        if self._selection.projections:
            values_SP = ((flat(pooled, self._names) - self._centre) / self._scale) @ self._directions
            found[PROJECTIONS] = Variable(_array(values_SP.reshape(chains, steps, -1)), ("projection",))
        if self._probe is not None:
            values_SF = self._probe(pooled)
            if values_SF is not None:
                labels = {"function": ("function", self._probe.names)}
                found[FUNCTIONS] = Variable(_array(values_SF.reshape(chains, steps, -1)), ("function",), labels)
        return found

    def _kept(self, draws: Values, argument: str) -> Values:
        names = self._selection.var_names
        if names is None:
            return draws
        missing = [name for name in names if name not in draws]
        if missing:
            raise ValueError(f"`var_names` has {missing}, which `{argument}` lacks; its sites are {sorted(draws)}.")
        return {name: draws[name] for name in names}


def function_probe(
    selection: Selection, model: Callable[..., Any] | None, inputs: Inputs | None
) -> FunctionProbe | None:
    """What evaluates the functions that were asked for.

    :raises ValueError: if there is no model, or nothing to call it with.
    """
    if not selection.functions:
        return None
    if model is None or inputs is None:
        raise ValueError(
            f"`functions` asks for predictions on {selection.functions} inputs, but there is no "
            f"{'model' if model is None else 'input'}: pass `model` and `x`."
        )
    return FunctionProbe(model, inputs, selection.functions)


def _layers_of_units(kept: Values) -> set[str]:
    """Layers whose weights and biases have the same number of units; a transposed convolution is none."""
    sizes: dict[str, set[int]] = {}
    for name, value in kept.items():
        layer, _, last = name.rpartition(".")
        if layer and last in ("weight", "bias") and value.dim() > 2:
            sizes.setdefault(layer, set()).add(value.shape[2])
    return {layer for layer, found in sizes.items() if len(found) == 1}


def _whole(name: str, value: Tensor, shared: set[str]) -> Variable:
    """All entries of a site. Units of a layer are one dimension of all its sites, where ``shared`` has the layer."""
    layer, _, last = name.rpartition(".")
    sizes = value.shape[2:]
    dims = [f"{name}_dim_{i}" for i in range(len(sizes))]
    if layer in shared and last in ("weight", "bias") and sizes:
        dims[0] = f"{layer}_unit"
        if len(sizes) > 1 and last == "weight":
            dims[1] = f"{layer}_input"
    return Variable(
        _array(value), tuple(dims), {dim: (dim, range(size)) for dim, size in zip(dims, sizes, strict=True)}
    )


def _some(kept: Values, limit: int) -> Variable:
    """Entries at even distances through all sites, each labelled by site, layer and unit."""
    sizes = [_size(value) for value in kept.values()]
    starts = np.cumsum([0, *sizes])
    places = np.asarray(evenly_spaced(int(starts[-1]), limit))
    columns, labels = [], []
    for (name, value), start, stop in zip(kept.items(), starts, starts[1:], strict=False):
        inside = places[(places >= start) & (places < stop)] - start
        columns.append((value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1))[:, :, torch.as_tensor(inside)])
        for place in inside:
            index = [int(i) for i in np.unravel_index(int(place), tuple(value.shape[2:]))] if value.dim() > 2 else []
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            labels.append((label, name, name.rpartition(".")[0] or name, index[0] if index else 0))
    names = ("parameter", "site", "layer", "unit")
    coords = {what: ("parameter", column) for what, column in zip(names, zip(*labels, strict=True), strict=True)}
    return Variable(_array(torch.cat(columns, -1)), ("parameter",), coords)


def _size(value: Tensor) -> int:
    return math.prod(value.shape[2:])


def _array(value: Tensor) -> np.ndarray:
    # NumPy has no bfloat16.
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
