# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The batches on which a model is compared: rows at even distances, at random, and those that are most unlike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.minibatch import Call, ProbeRows
from pyro_apd.models.row_terms import RowProbe
from pyro_apd.models.tracing import Site, observed_sites
from pyro_apd.runtime.trees import tree_flatten, tree_leaves, tree_unflatten

# Rows whose values are looked at, to find the smallest and the largest ones.
_NUM_LOOKED_AT = 64
# Arguments whose smallest and largest rows are compared.
_MAX_ARGUMENTS = 3

#: Two batches ``(n,)`` of row numbers.
Pair = tuple[Tensor, Tensor]


def first_rows(rows: ProbeRows, count: int) -> Tensor:
    """``count`` rows at even distances from the first row on; repeated where there are fewer."""
    if count <= rows.num_rows:
        return torch.arange(count) * rows.num_rows // count
    return torch.arange(count) % rows.num_rows


def second_rows(rows: ProbeRows, count: int) -> Tensor:
    """As many others, as far as there are, in another order."""
    shift = rows.num_rows // count // 2 if rows.num_rows >= 2 * count else rows.num_rows - count
    return ((first_rows(rows, count) + shift) % rows.num_rows).flip(0)


def random_pair(rows: ProbeRows, generator: torch.Generator) -> Pair:
    """Two batches of random rows: a model may treat some batches in another way."""
    one, two = torch.randint(rows.num_rows, (2, rows.batch_size), generator=generator)
    return one, two


def unlike_pairs(
    rows: ProbeRows, model: Callable[..., Any], values: Mapping[str, Tensor], place: int, generator: torch.Generator
) -> list[Pair]:
    """Pairs of batches that hold one row alone, each of two rows that are as unlike as can be.

    :param values: of the latents, at the point of number ``place`` among those at which the model is compared.
    """
    pairs = _by_size(rows) if place % 2 else [_of_two_rows(rows, generator)]
    pairs += _by_label(rows) if place == 1 else []
    with contextlib.suppress(Exception):  # a model may fail on other numbers of rows
        pairs += _by_prediction(rows, model, values)
    return pairs


def _by_label(rows: ProbeRows) -> list[Pair]:
    """For each label, of the rows with its smallest and its largest value."""
    # With more values they are no labels.
    labels = [label.byte() if label.dtype == torch.bool else label for label in rows.labels]
    labels = [label for label in labels if 2 * len(label.unique()) <= len(label)]
    return [_alone(rows, label.argmin(), label.argmax()) for label in labels]


def _by_size(rows: ProbeRows) -> list[Pair]:
    """By what the rows of an argument sum to: what a model does with a batch may depend on its mean."""
    count = min(_NUM_LOOKED_AT, rows.num_rows)
    looked_at = first_rows(rows, count)
    call = rows.call(looked_at)
    pairs: list[Pair] = []
    for leaf in tree_leaves((call.args, call.kwargs)):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or not leaf.is_floating_point():
            continue
        if rows.plate is not None and len(leaf) == rows.num_rows:  # a plate takes its rows from arguments of all rows
            leaf = leaf[looked_at.to(leaf.device)]
        if len(leaf) == count and len(pairs) < _MAX_ARGUMENTS:
            sizes = leaf.reshape(count, -1).sum(1)
            pairs.append(_alone(rows, looked_at[sizes.argmin().cpu()], looked_at[sizes.argmax().cpu()]))
    return pairs


def _by_prediction(rows: ProbeRows, model: Callable[..., Any], values: Mapping[str, Tensor]) -> list[Pair]:
    """By the mean that the model gives to the first observed site with a row for each.

    Where it has no mean, by its terms for one target.
    """
    looked_at = first_rows(rows, min(_NUM_LOOKED_AT, rows.num_rows))
    trace = RowProbe(model, replace(rows, call=lambda numbers: _of_one_target(rows.call(numbers)))).trace(
        looked_at, values
    )
    for name, site in observed_sites(trace).items():
        sizes = None if name in values else _predictions(site, len(looked_at))
        if sizes is not None:
            by_size = [sizes, *_parameters(site, len(looked_at))]
            ends = dict.fromkeys((int(size_N.argmin()), int(size_N.argmax())) for size_N in by_size)
            return [_alone(rows, looked_at[low], looked_at[high]) for low, high in ends if low != high]
    return []


def _of_two_rows(rows: ProbeRows, generator: torch.Generator) -> Pair:
    """Of two random rows."""
    one, two = torch.randint(rows.num_rows, (2,), generator=generator)
    return _alone(rows, one, two)


def _of_one_target(call: Call) -> Call:
    """The call with the largest entry in place of each, in arguments of one floating number for each row."""

    def changed(leaf: Any) -> Any:
        is_target = isinstance(leaf, Tensor) and leaf.dim() == 1 and leaf.is_floating_point() and len(leaf) > 0
        return leaf.nan_to_num().max().expand(leaf.shape) if is_target else leaf

    leaves, spec = tree_flatten((call.args, call.kwargs))
    args, kwargs = tree_unflatten([changed(leaf) for leaf in leaves], spec)
    return Call(args, kwargs, call.indices)


def _predictions(site: Site, num_rows: int) -> Tensor | None:
    """One number for each row; None where the site has none for each."""
    try:
        found = torch.as_tensor(site["fn"].mean)
    except (NotImplementedError, AttributeError):
        found = torch.full((), torch.nan)
    if not bool(found.isfinite().all()):
        found = torch.as_tensor(site["fn"].log_prob(site["value"]))
    if found.dim() == 0 or len(found) != num_rows:
        return None
    entries = found.detach().cpu().double().reshape(num_rows, -1)
    weights = torch.linspace(1.0, 1.5, entries.shape[1], dtype=torch.double)  # probabilities sum to one
    return entries @ weights


def _parameters(site: Site, num_rows: int) -> list[Tensor]:
    """Sums of the distribution's parameters for each row: means of a Dirichlet distribution do not show their size."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    found = [getattr(fn, name, None) for name in getattr(fn, "arg_constraints", {})]
    by_row = [value for value in found if isinstance(value, Tensor) and value.dim() and len(value) == num_rows]
    return [value.detach().cpu().double().reshape(num_rows, -1).sum(1) for value in by_row]


def _alone(rows: ProbeRows, one: Tensor, other: Tensor) -> Pair:
    return one.cpu().expand(rows.batch_size).clone(), other.cpu().expand(rows.batch_size).clone()
