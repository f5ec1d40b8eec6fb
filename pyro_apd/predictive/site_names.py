# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whether draws are of a model's sites. A latent without draws is drawn from its prior, which looks like a result."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_apd.models.layout import is_subsample
from pyro_apd.predictive.messengers import plain

# Names of at least this similarity, by difflib's ratio, may be one name misspelt.
_SIMILAR = 0.6


def check_sites(nodes: Mapping[str, Any], draws: Mapping[str, Tensor], argument: str) -> None:
    """Refuses draws that were meant for a site of another name, or whose values have another shape than their site's.

    :param nodes: sites of a trace of the model, also of one that failed.
    :param draws: values ``(S, ...)`` by site.
    :param str argument: the user's name for ``draws``.
    :raises ValueError: if there are such draws.
    """
    for name, value in draws.items():
        if _is_sample(nodes.get(name)):
            _check_shape(nodes[name]["fn"], name, tuple(value.shape[1:]), argument)
    misnamed = _misnamed(nodes, draws)
    if misnamed:
        pairs = ", ".join(f"'{site}' (nearest: '{name}')" for site, name in list(misnamed.items())[:3])
        raise ValueError(
            f"`{argument}` has no draws of the model's latent {pairs}, which would be drawn from the prior. The names "
            f"in `{argument}` must be those of the model's sites; leave out draws of what the model does not have."
        )


def _check_shape(fn: Any, name: str, shape: tuple[int, ...], argument: str) -> None:
    """Refuses draws of a ``shape`` that values of a site do not have, but for dimensions of size 1 on the left."""
    event_shape = tuple(fn.event_shape)
    if event_shape and shape[max(0, len(shape) - len(event_shape)) :] != event_shape:
        raise ValueError(
            f"`{argument}['{name}']` has draws of shape {shape}, and the model's site '{name}' has values of shape "
            f"{event_shape}. They are draws of another model, or lack the first dimension, for draws."
        )
    num_dims = len(tuple(fn.batch_shape)) + len(event_shape)
    if any(size != 1 for size in shape[: max(0, len(shape) - num_dims)]):
        raise ValueError(
            f"`{argument}['{name}']` has draws of shape {shape}, and the model's site '{name}' has values of shape "
            f"{(*fn.batch_shape, *event_shape)}. Draws grouped by chain, (C, S, ...), are given as (C S, ...): use "
            "get_samples() without group_by_chain, or value.flatten(0, 1) of each site."
        )


def _misnamed(nodes: Mapping[str, Any], draws: Mapping[str, Tensor]) -> dict[str, str]:
    """Sites without draws, and the draws of no site that each was probably called by.

    What a model predicts has no draws either. So a site counts as a latent where its name is similar to that of draws,
    or where another site is left to predict, and no draws are of the model, or some have the shape of the site.
    """
    missing = [name for name, node in nodes.items() if name not in draws and _is_latent(node)]
    surplus = [name for name in draws if name not in nodes]
    if not surplus:
        return {}
    has_more = len(missing) > 1 or any(_is_sample(node) and node["is_observed"] for node in nodes.values())
    is_other = has_more and len(surplus) == len(draws)
    found = {}
    for site in missing:
        nearest = max(surplus, key=lambda name: _similarity(site, name))
        shape = tuple(nodes[site]["value"].shape)
        alike = [name for name in surplus if has_more and shape and tuple(draws[name].shape[1:]) == shape]
        if is_other or _similarity(site, nearest) >= _SIMILAR:
            found[site] = nearest
        elif alike:
            found[site] = alike[0]
    return found


def _similarity(first: str, second: str) -> float:
    first, second = first.lower(), second.lower()
    if first.rpartition(".")[2] == second or second.rpartition(".")[2] == first:
        return 1.0
    return difflib.SequenceMatcher(None, first, second).ratio()


def _is_sample(node: Mapping[str, Any] | None) -> bool:
    return node is not None and node["type"] == "sample" and not is_subsample(node)


def _is_latent(node: Mapping[str, Any]) -> bool:
    is_free = _is_sample(node) and not node["is_observed"]
    return is_free and not isinstance(plain(node["fn"]), (dist.Delta, dist.Unit))
