# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Groups of an ArviZ container that need the model: predictions, likelihoods, observations and the prior."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_apd.models.layout import is_subsample
from pyro_apd.predictive import predictive
from pyro_apd.predictive.draws import Values
from pyro_apd.runtime.global_state import preserved_param_store, seeded

_LOG = logging.getLogger("pyro_apd")

#: Numbers of a group (draws times observations) up to which it is made without being asked for.
LARGEST_UNASKED = 10_000_000


class ModelGroups:
    """What a model says about its data under draws.

    :param callable model: the Pyro model.
    :param tuple args: its arguments, with observations where there are any.
    :param dict kwargs: its keyword arguments.
    :param dict draw: one draw of every latent site, from which the model's sites are found.
    :param int seed: of all sampling.
    :raises Exception: whatever the model raises on these arguments.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draw: Values,
        seed: int | None,
    ) -> None:
        self._model, self._args, self._kwargs, self._seed = model, args, dict(kwargs), seed
        with preserved_param_store(), seeded(0), torch.no_grad():
            trace = poutine.trace(poutine.condition(model, data=draw)).get_trace(*args, **self._kwargs)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample" and site["name"] not in draw]
        #: Whether a plate shows the model some of the data only.
        self.is_subsampled = any(is_subsample(site) and len(site["value"]) < site["fn"].size for site in sites)
        data = [site for site in sites if not _is_fixed(site)]
        self._names = [site["name"] for site in data]
        self._observed = {site["name"]: site["value"] for site in data if site["is_observed"]}
        self._size = sum(site["value"].numel() for site in data)
        self._shapes = {name: tuple(value.shape) for name, value in draw.items()}

    @property
    def has_observations(self) -> bool:
        """Whether the arguments hold any."""
        return bool(self._observed)

    def is_large(self, num_draws: int) -> bool:
        """Whether predictions under so many draws should wait until they are asked for."""
        is_large: bool = num_draws * self._size > LARGEST_UNASKED
        return is_large

    def observed(self) -> dict[str, np.ndarray]:
        """Observed sites by name."""
        return {name: value.detach().cpu().numpy() for name, value in self._observed.items()}

    def predictions(self, draws: Values) -> dict[str, np.ndarray]:
        """New observations sampled under draws ``(C, S, ...)``: ``(C, S, ...)`` by site."""
        pooled = {name: value.flatten(0, 1) for name, value in draws.items()}
        with seeded(self._seed, next(iter(draws.values())).device):
            model = poutine.uncondition(self._model)
            sampled = predictive.Predictive(model, posterior_samples=pooled, return_sites=tuple(self._names))(
                *self._args, **self._kwargs
            )
        return _by_chain(sampled, draws)

    def log_likelihood(self, draws: Values) -> dict[str, np.ndarray]:
        """Log-likelihood of each observation under each draw, in nats, ``(C, S, N)`` by observed site."""
        pooled = {name: value.flatten(0, 1) for name, value in draws.items()}
        with preserved_param_store(), seeded(0):
            found = {
                name: predictive.log_likelihood(self._model, pooled, *self._args, site=name, **self._kwargs)
                for name in self._observed
            }
        return _by_chain(found, draws)

    def prior(self, num_samples: int) -> Values:
        """Draws of the latent sites from the prior, ``(1, S, ...)``."""
        with seeded(self._seed):
            drawn = predictive.Predictive(self._model, num_samples=num_samples, return_sites=tuple(self._shapes))(
                *self._args, **self._kwargs
            )
        return {name: drawn[name].reshape(1, num_samples, *shape) for name, shape in self._shapes.items()}


def attempt(what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The result of ``make``; if it fails, warns and returns nothing, so that the draws are still exported."""
    try:
        return make()
    except Exception as error:
        _LOG.warning("No %s: %s: %s", what, type(error).__name__, error)
        return {}


def _by_chain(values: Mapping[str, Tensor], draws: Values) -> dict[str, np.ndarray]:
    chains, steps = next(iter(draws.values())).shape[:2]
    return {
        name: value.detach().cpu().numpy().reshape(chains, steps, *value.shape[1:]) for name, value in values.items()
    }


def _is_fixed(site: Mapping[str, Any]) -> bool:
    """Whether a site is the index of a plate, a ``pyro.deterministic`` or a ``pyro.factor``: observed, but no data."""
    return is_subsample(site) or site["infer"].get("_deterministic", False) or type(site["fn"]).__name__ == "Unit"
