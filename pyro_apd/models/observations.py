# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Observed sites as users write them, in a form that is scored: labels of another dtype, and missing targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli

from pyro_apd.models.layout import is_subsample


def scored(fn: Any, value: Any) -> Any:
    """``value`` in the dtype that distribution ``fn`` scores.

    torch scores labels of a Bernoulli that are booleans or integers with an error, or not at all.
    """
    if not isinstance(value, Tensor) or value.is_floating_point():
        return value
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return value.to((fn.logits if "logits" in vars(fn) else fn.probs).dtype) if isinstance(fn, Bernoulli) else value


class FloatLabels(Messenger):
    """Handler that gives observed values the dtype that is scored, see :func:`scored`."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["value"] = scored(msg["fn"], msg["value"])


class GivenRows(Messenger):
    """Handler that notes the rows of plates to which the model gives them, with ``subsample=``.

    :ivar rows: by plate.
    """

    def __enter__(self) -> Any:
        self.rows: dict[str, Tensor] = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and msg["value"] is not None and len(msg["value"]) < msg["fn"].size:
            self.rows[msg["name"]] = torch.as_tensor(msg["value"])


class MissingTargets(Messenger):
    """Handler that leaves out the targets that ``pyro.sample(..., obs_mask=)`` calls missing.

    Pyro makes them a latent ``NAME_unobserved``, with a value for each row. Its density integrates to 1, so without it
    the posterior of the other latents is the same; with mini-batches it could not be sampled. Its value here is NaN:
    a model that computes with it has no finite density, and is refused.
    """

    def __enter__(self) -> Any:
        self._observed: set[str] = set()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            self._observed.add(name)
        elif name.endswith("_unobserved") and name.removesuffix("_unobserved") + "_observed" in self._observed:
            fn = msg["fn"]
            msg["value"] = torch.full((*fn.batch_shape, *fn.event_shape), torch.nan)
            msg["fn"] = fn.mask(False)
            msg["is_observed"] = True


def has_missing_targets(trace: Any) -> bool:
    """Whether a run of a model has latents for targets that ``obs_mask=`` calls missing."""
    missing = [name for name in trace.stochastic_nodes if name.endswith("_unobserved")]
    return any(name.removesuffix("_unobserved") + "_observed" in trace.nodes for name in missing)


def without_missing_targets(model: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` with :class:`MissingTargets`."""
    handled: Callable[..., Any] = MissingTargets()(model)
    return handled
