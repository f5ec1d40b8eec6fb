# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Refuses observed sites whose shapes pair every datum with every prediction."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.tracing import Site, observed_sites
from pyro_apd.runtime.trees import tree_leaves

_FIX = (
    "every datum would be scored by every prediction. Give both one shape: for a column, y.squeeze(-1) or "
    "f.squeeze(-1); for several outputs per datum, the distribution with .to_event(1)."
)


def refuse_outer_products(trace: poutine.Trace, arguments: Any) -> None:
    """Raises where targets and likelihood of a site broadcast against each other.

    :param trace: a run of the model, and ``arguments`` of the call.
    :raises DataError: naming the shapes and the fix.
    :raises ModelError: if that is so because weights are drawn inside the plate, once for each row.
    """
    for name, site in observed_sites(trace).items():
        try:
            refuse_outer_product(name, site)
            _refuse_square_factor(name, site, [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)])
        except DataError as error:
            plates = {frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
            for latent, drawn in trace.iter_stochastic_nodes():
                inside = plates & {frame.name for frame in drawn["cond_indep_stack"]}
                if inside:
                    raise ModelError(
                        f"Latent site '{latent}' is drawn inside plate '{min(inside)}', once for each of its rows, and "
                        f"observed site '{name}' then has a term for each pair of rows. Call the network (or read its "
                        f"weights) before `with pyro.plate('{min(inside)}', ...)`, so that one draw serves all rows."
                    ) from error
            raise


def refuse_outer_product(name: str, site: Site) -> None:
    """Raises where targets and likelihood broadcast against each other, such as targets ``(N,)`` and means ``(N, 1)``.

    A plate expands the likelihood first, so that the two seem to agree: means ``(N, 1)`` become ``(N, N)``. What gives
    it away is a dimension along which targets repeat, beside one that no plate declares.

    :param site: an observed site, as Pyro stores it.
    :raises DataError: naming the shapes and the fix.
    """
    fn, value = site["fn"], torch.as_tensor(site["value"])
    batch_shape = torch.Size(fn.batch_shape)
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    _refuse_outer_weights(name, site)
    if value.numel() == 0:
        _refuse_outer_factor(name, batch_shape, plates)
        return
    if value.numel() == 1:
        return
    event_dim = value.dim() if fn.event_dim > value.dim() else fn.event_dim
    data_shape = value.shape[: value.dim() - event_dim]
    event_shape = value.shape[value.dim() - event_dim :]
    if isinstance(fn, torch.distributions.Independent) and event_shape != torch.Size(fn.event_shape):
        raise DataError(_message(name, value, batch_shape + torch.Size(fn.event_shape)))
    shape = torch.broadcast_shapes(batch_shape, data_shape)
    padded = torch.Size([1] * (len(shape) - len(data_shape))) + data_shape
    dims = [dim for dim in range(-len(shape), 0) if shape[dim] > 1]
    repeated = [dim for dim in dims if padded[dim] == 1]
    undeclared = [dim for dim in dims if dim not in plates]
    is_event_of_rows = any(plates.get(dim) in event_shape for dim in repeated)  # targets (N,) as one event for each row
    if repeated and (undeclared or is_event_of_rows):
        raise DataError(_message(name, value, batch_shape))


def _refuse_outer_weights(name: str, site: Site) -> None:
    """A scale or mask that has more dimensions than the terms repeats them."""
    terms = torch.Size(torch.as_tensor(site["fn"].log_prob(site["value"])).shape)
    for what in ("scale", "mask"):
        weights = site[what]
        if isinstance(weights, Tensor) and torch.broadcast_shapes(terms, weights.shape) != terms:
            raise DataError(
                f"Observed site '{name}' has terms of shape {tuple(terms)} and a {what} of shape "
                f"{tuple(weights.shape)}, which repeats them: every datum would count with the {what} of every other. "
                f"Give both one shape; for a column, {what}.squeeze(-1)."
            )


def _refuse_outer_factor(name: str, shape: torch.Size, plates: dict[int | None, int]) -> None:
    """A factor has no targets; a term for each pair of rows shows as a plate's size in a second dimension."""
    undeclared = [shape[dim] for dim in range(-len(shape), 0) if shape[dim] > 1 and dim not in plates]
    if set(undeclared) & set(plates.values()):
        raise DataError(
            f"Factor '{name}' has shape {tuple(shape)} inside a plate of {undeclared[0]} rows, a term for each pair of "
            "rows: targets and predictions broadcast against each other. Give both one shape; for a column, "
            "f.squeeze(-1)."
        )


def _refuse_square_factor(name: str, site: Site, arguments: list[Tensor]) -> None:
    """A factor outside plates with a term for each pair of rows, where no argument has one and pairs are not meant."""
    shape = torch.Size(site["fn"].batch_shape)
    counts = {len(argument) for argument in arguments if argument.dim() > 0 and len(argument) > 1}
    is_square = site["value"].numel() == 0 and len(shape) > 1 and shape[-1] == shape[-2] and shape[-1] in counts
    pairs = [argument for argument in arguments if argument.dim() > 1 and argument.shape[:2] == shape[-2:]]
    if is_square and not site["cond_indep_stack"] and not pairs and not _is_of_one_quantity(site):
        raise DataError(
            f"Factor '{name}' has shape {tuple(shape)} for arguments of {shape[-1]} rows, a term for each pair: "
            "targets and predictions broadcast against each other. Give both one shape; for a column, f.squeeze(-1). "
            f"If pairs are meant, give their sum: pyro.factor('{name}', terms.sum())."
        )


def _is_of_one_quantity(site: Site) -> bool:
    """Whether a factor compares a quantity of each row with the same one of each other row.

    Then a row and itself give one value for all rows, as differences do, or the order of two rows has no effect. A
    target that meets every prediction shows neither.
    """
    terms = site["fn"].log_prob(site["value"]).detach()
    if torch.allclose(terms, terms.reshape(-1)[0]):
        return False
    diagonal = terms.diagonal(dim1=-2, dim2=-1)
    return torch.allclose(diagonal, diagonal[..., :1]) or torch.allclose(terms, terms.transpose(-1, -2))


def _message(name: str, value: Tensor, shape: torch.Size) -> str:
    return (
        f"Observed site '{name}' has values of shape {tuple(value.shape)} and a likelihood of shape {tuple(shape)}, "
        f"plates included: {_FIX}"
    )
