# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Priors of a network's parameters, and of the noise scale of a regression, from the settings of a BNN."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from pyro_apd.models.bayesian_part import Adapter
from pyro_apd.runtime import checks

#: Standard deviation, distribution, or name of a rule for the prior of one parameter.
Prior = float | str | Distribution
#: One prior for all parameters, priors by layer or parameter name, or a function that computes them.
PriorSpec = Prior | Mapping[str, Prior] | Callable[[str, Tensor], Prior]

_NOISE_PRIORS: dict[str, Callable[[Tensor], Distribution]] = {
    "half_cauchy": dist.HalfCauchy,
    "half_normal": dist.HalfNormal,
}


def parameter_priors(
    net: nn.Module, names: Mapping[str, str], spec: PriorSpec, adapters: Sequence[Adapter] = ()
) -> dict[str, Distribution]:
    """Prior of each parameter, with its shape, dtype and device.

    :param net: the network.
    :param names: the first name of each latent parameter, by every name that it has.
    :param adapters: low-rank changes of other parameters, whose layers ``spec`` may name, too.
    :param spec: ``prior_scale`` of :class:`~pyro_apd.BNN`.
    :raises ValueError: if ``spec`` names an unknown parameter, lacks one, or is no prior of it.
    """
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters() if name in names.values()}
    if isinstance(spec, Mapping):
        known = [*names, *(adapter.name for adapter in adapters)]
        unknown = [key for key in spec if not any(_is_within(name, key) for name in known)]
        if unknown:
            raise ValueError(
                f"prior_scale names {unknown}, which match no parameter; there are "
                f"{[*parameters, *known[len(names) :]]}."
            )
    return {name: _prior(_chosen(spec, name, value), name, value) for name, value in parameters.items()}


def _chosen(spec: PriorSpec, name: str, parameter: Tensor) -> Any:
    """What a specification says of one parameter."""
    if isinstance(spec, Mapping):
        matching = [key for key in spec if _is_within(name, key)]
        if not matching:
            raise ValueError(f"prior_scale has nothing for '{name}'; add it, its layer, or '' for all the rest.")
        return spec[max(matching, key=len)]
    return spec(name, parameter) if callable(spec) and not isinstance(spec, Distribution) else spec


def adapter_priors(adapter: Adapter, weight: Tensor, spec: PriorSpec) -> dict[str, Distribution]:
    """Priors of A and B of a change W + B A around the trained network, by site.

    Entries of A are N(0, 1/fan_in), so that A keeps the size of its inputs, and those of B N(0, s^2/rank). For inputs
    of root mean square 1 the output of each unit then changes with standard deviation s, whatever the rank.

    :param torch.Tensor weight: the trained W.
    :param spec: ``prior_scale`` of :class:`~pyro_apd.BNN`, which gives s; ``"fan_in"`` is 1.
    :raises ValueError: if that is no positive number.
    """
    sites = adapter.sites
    scale = _chosen(spec, adapter.name, weight)
    scale = 1.0 if scale == "fan_in" else scale
    hint = "That of an adapter is a number: by how much it may change the output of a unit."
    scale = checks.number(f"prior_scale[{adapter.name!r}]", scale, above=0, hint=hint)
    a, b = weight.new_empty(adapter.rank, adapter.fan_in), weight.new_empty(adapter.units, adapter.rank)
    return {
        sites[0]: _prior(1.0 / math.sqrt(adapter.fan_in), sites[0], a),
        sites[1]: _prior(scale / math.sqrt(adapter.rank), sites[1], b),
    }


def noise_scale_prior(prior: str | Distribution, scale: float, like: Tensor) -> Distribution:
    """Prior of a learned noise scale, a scalar with the dtype and device of ``like``.

    :param prior: by name, with this ``scale``, or a distribution over positive numbers.
    :raises ValueError: if it is neither.
    """
    if isinstance(prior, str) and prior in _NOISE_PRIORS:
        scale = checks.number("noise_prior_scale", scale, above=0)
        prior = _NOISE_PRIORS[prior](like.new_tensor(scale))
    elif not isinstance(prior, Distribution):
        names = ", ".join(map(repr, _NOISE_PRIORS))
        raise ValueError(f"noise_prior={prior!r} must be one of {names}, or a distribution over positive numbers.")
    prior = _shaped(prior, "noise_scale", like.new_empty(()))
    if prior.support is not None and prior.support.check(like.new_tensor(-1.0)):
        raise ValueError(f"noise_prior must be over positive numbers; {type(prior).__name__} allows -1.")
    return prior


def _is_within(name: str, key: str) -> bool:
    return key == "" or name == key or name.startswith(f"{key}.")


def _prior(prior: Any, name: str, parameter: Tensor) -> Distribution:
    if isinstance(prior, Distribution):
        return _shaped(prior, name, parameter)
    if prior == "fan_in":
        prior = 1.0 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 1.0
    hint = "It is a standard deviation; 'fan_in' and distributions of pyro.distributions are accepted, too."
    sd = checks.number(f"prior_scale[{name!r}]", prior, above=0, hint=hint)
    loc = parameter.new_zeros(()).expand(parameter.shape)
    scale = parameter.new_tensor(sd).expand(parameter.shape)
    normal: Distribution = dist.Normal(loc, scale).to_event(parameter.dim())
    return normal


def _shaped(prior: Distribution, name: str, parameter: Tensor) -> Distribution:
    """A distribution over one parameter, from one over a single entry or over the whole parameter."""
    if not hasattr(prior, "to_event"):
        raise ValueError(f"The prior of '{name}' is from torch.distributions; use the same of pyro.distributions.")
    if prior.support is None or prior.support.is_discrete:
        raise ValueError(
            f"The prior of '{name}', {type(prior).__name__}, is not continuous; gradients need a continuous one."
        )
    shape, event = parameter.shape, prior.event_shape
    batch = shape[: len(shape) - len(event)]
    try:
        if shape[len(batch) :] != event:
            raise ValueError("event shapes differ")
        # A copy by `expand` keeps its validation permanently, also where it is switched off globally later.
        expanded = prior if prior.batch_shape == batch else prior.expand(batch)
        expanded = expanded.to_event(len(batch))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The prior of '{name}' has batch shape {tuple(prior.batch_shape)} and event shape {tuple(event)}, which "
            f"do not make the parameter's shape {tuple(shape)}; give a scalar distribution or one of that shape."
        ) from error
    return map_tensors(expanded, lambda t: t.to(parameter.device, parameter.dtype if t.is_floating_point() else None))


def map_tensors(prior: Distribution, fn: Callable[[Tensor], Tensor]) -> Distribution:
    """A copy of a distribution with ``fn`` applied to every tensor in it."""
    mapped: Distribution = _mapped(prior, fn, {})
    return mapped


def _mapped(value: Any, fn: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """The same for any attribute. ``done`` holds the copies by identity: a transform and its inverse refer to each
    other."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (Distribution, Transform, Constraint)):
        duplicate = done[id(value)] = copy.copy(value)
        vars(duplicate).update({name: _mapped(attribute, fn, done) for name, attribute in vars(value).items()})
        return duplicate
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, fn, done) for item in value)
    return value
