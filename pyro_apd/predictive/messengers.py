# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Running a model with given values up to its observed site, and finding which site that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_apd.errors import ModelError
from pyro_apd.models.layout import is_subsample
from pyro_apd.predictive.vmap_draws import sample_freshly


class Reached(Exception):
    """The site asked for has been reached; the rest of the model need not run."""


class Substitute(Messenger):
    """Gives sites the values of one draw and, at site ``until``, stops the run and keeps that site's message.

    Sites without a value are sampled, parameters come from ``params`` where the store has none.

    It must be entered before the model's own handlers: it is then the last to see a message, after plates have
    expanded the distribution.
    """

    def __init__(
        self, values: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None, until: str | None = None
    ) -> None:
        super().__init__()
        self._values = values
        self._params = params or {}
        self._until = until
        self.reached: Mapping[str, Any] | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values:
            msg["value"] = self._values[msg["name"]]
        elif msg["name"] == self._until:
            self.reached = dict(msg)
            raise Reached
        else:
            sample_freshly(msg)

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self._params and msg["name"] not in pyro.get_param_store():
            msg["value"] = self._params[msg["name"]]


def plain(distribution: Any) -> Any:
    """A distribution without the wrappers that only regroup its dimensions or mask its density."""
    while isinstance(distribution, (dist.Independent, dist.MaskedDistribution)):
        distribution = distribution.base_dist
    return distribution


def is_choosing_rows(node: Mapping[str, Any]) -> bool:
    """Whether this is the index draw of a plate that leaves rows out, by itself: not as the caller told it."""
    if node["type"] != "sample" or not is_subsample(node) or node["is_observed"]:
        return False
    return node["fn"].subsample_size is not None and node["fn"].subsample_size < node["fn"].size


def choose_site(trace: Any, draws: Mapping[str, Tensor], site: str | None) -> str:
    """The observed site: the one that is asked for, else the only sample site that the draws have no values of.

    :raises ValueError: if ``site`` is not such a site.
    :raises ModelError: if ``site`` is None and there are none, or several.
    """
    candidates = [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and name not in draws
        and not is_subsample(node)
        and not isinstance(plain(node["fn"]), (dist.Delta, dist.Unit))
    ]
    if site is not None:
        if site not in candidates:
            raise ValueError(f"`site`='{site}' is not an observed site of the model; it has {candidates}.")
        return site
    if not candidates:
        raise ModelError(
            f"The model has no sample site besides those in the draws, {sorted(draws)}: nothing it could predict. Its "
            "observations need a pyro.sample statement (pyro.factor and pyro.deterministic do not count)."
        )
    if len(candidates) > 1:
        raise ModelError(
            f"The model has several sample sites that are not in the draws: {candidates}. Name the observed one with "
            "`site=`, and add to the draws those that are latent."
        )
    name: str = candidates[0]
    return name
