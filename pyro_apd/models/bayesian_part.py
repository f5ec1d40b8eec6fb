# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which parameters of a network are Bayesian: all, the last layer, some by name, or low-rank changes of its layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.errors import ModelError
from pyro_apd.runtime import checks

#: ``bayesian`` of :class:`~pyro_apd.BNN`.
PartSpec = str | Sequence[str] | Callable[[str, Tensor], bool] | None

_LORA = "lora:"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROJECTIONS = ("query", "key", "value")
# Names that a message lists.
_NUM_NAMED = 20


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of some rows of a parameter, W + B A (Hu et al., LoRA, ICLR 2022).

    :ivar str name: of the layer, or of the projection of an attention.
    :ivar str parameter: the first name of the parameter that it changes.
    :ivar int start: the first row that it changes.
    :ivar int units: rows of W; B is ``(units, rank)``.
    :ivar int fan_in: numbers in a row of W; A is ``(rank, fan_in)``.
    """

    name: str
    parameter: str
    start: int
    units: int
    fan_in: int
    rank: int

    @property
    def sites(self) -> tuple[str, str]:
        """The latent sites of A and B."""
        return f"net.{self.name}.lora_A", f"net.{self.name}.lora_B"


@dataclass(frozen=True)
class BayesianPart:
    """The parameters of a network that are latent, and its adapters.

    :ivar dict names: the first name of each latent parameter, by every name that it has.
    :ivar tuple adapters: by parameter, in the order of its rows.
    :ivar dict adapted: the first name of each parameter that adapters change, by every name that it has.
    :ivar str prefix: of the sites of latent parameters, before the name.
    """

    names: dict[str, str]
    adapters: tuple[Adapter, ...] = ()
    adapted: dict[str, str] = field(default_factory=dict)
    prefix: str = "net."

    @property
    def sites(self) -> dict[str, str]:
        """The latent site of each latent parameter, by every name of the parameter."""
        return {name: self.prefix + first for name, first in self.names.items()}

    @property
    def first_names(self) -> dict[str, str]:
        """The first name of each parameter that draws replace or change, by every name that it has."""
        return {**self.names, **self.adapted}

    def base(self, net: nn.Module) -> dict[str, Tensor]:
        """The trained values of the parameters that adapters change, by their first names."""
        return {first: _tensor(net, first) for first in dict.fromkeys(self.adapted.values())}

    def shapes(self, net: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of the latents by site."""
        found = {site: tuple(_tensor(net, name).shape) for name, site in self.sites.items()}
        for adapter in self.adapters:
            a, b = adapter.sites
            found |= {a: (adapter.rank, adapter.fan_in), b: (adapter.units, adapter.rank)}
        return found

    def weights(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the network, by every name, that draws replace or change.

        :param values: one draw by site.
        :param base: the trained values of :attr:`adapted` parameters by name.
        """
        weights = {name: values[site] for name, site in self.sites.items()}
        changed = {
            first: _changed(base[first], [a for a in self.adapters if a.parameter == first], values)
            for first in dict.fromkeys(self.adapted.values())
        }
        return {**weights, **{name: changed[first] for name, first in self.adapted.items()}}

    def module(self) -> str:
        """The name of the smallest module that holds all of them; empty for the network itself."""
        owners = [name.rpartition(".")[0].split(".") for name in self.first_names]
        common = []
        for parts in zip(*owners, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)


def _tensor(net: nn.Module, name: str) -> Tensor:
    """A parameter, or a buffer, as they are in a BNN."""
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(net.get_submodule(owner), leaf)
    return value


def select(net: nn.Module, spec: PartSpec) -> BayesianPart:
    """The Bayesian part of a network.

    :param spec: ``bayesian`` of :class:`~pyro_apd.BNN`.
    :raises ValueError: if ``spec`` is none of what it describes, or matches nothing.
    :raises ModelError: if there is nothing to put a prior on, or the last layer is not known.
    """
    if spec is None:
        return _checked(BayesianPart(_names(net, lambda name, value: value.requires_grad)), net)
    if callable(spec):
        return _checked(BayesianPart(_names(net, lambda name, value: bool(spec(name, value.detach())))), net)
    items = [spec] if isinstance(spec, str) else list(spec) if isinstance(spec, (list, tuple)) else None
    if not items or not all(isinstance(item, str) and item for item in items):
        raise ValueError(
            f"bayesian={spec!r} must be 'last_layer', 'lora:RANK', 'lora:RANK:LAYERS', a name or pattern of parameters "
            "or layers, a list of these, a callable (name, parameter) -> bool, or None for all trainable parameters."
        )
    adapters = [adapter for item in items if item.startswith(_LORA) for adapter in _adapters(net, item)]
    keys = [_last_layer(net) if item == "last_layer" else item for item in items if not item.startswith(_LORA)]
    known = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    for key in keys:
        if not any(_matches(name, key) for name in known):
            raise ValueError(f"bayesian names {key!r}, which matches no parameter; there are {_listed(known)}.")
    names = _names(net, lambda name, value: any(_matches(name, key) for key in keys))
    return _checked(BayesianPart(names, *_joined(net, adapters, names)), net)


def _checked(part: BayesianPart, net: nn.Module) -> BayesianPart:
    if not part.names and not part.adapters:
        raise ModelError(
            "net has no parameter that requires gradients: there is nothing to put a prior on. Choose some by "
            "bayesian='last_layer', or by their names."
        )
    for name in part.names.values():
        if not net.get_parameter(name).is_floating_point():
            raise ModelError(f"Parameter '{name}' is {net.get_parameter(name).dtype}, and priors are over reals.")
    return part


def _names(net: nn.Module, is_chosen: Callable[[str, nn.Parameter], bool]) -> dict[str, str]:
    """Every name of every chosen parameter, and the first name of the same parameter: it is chosen by any of them."""
    named = list(net.named_parameters(remove_duplicate=False))
    chosen = {id(parameter) for name, parameter in named if is_chosen(name, parameter)}
    first: dict[int, str] = {}
    return {name: first.setdefault(id(parameter), name) for name, parameter in named if id(parameter) in chosen}


def _matches(name: str, key: str) -> bool:
    """Whether a parameter or layer has this name, is within that layer, or fits the pattern."""
    return name == key or name.startswith(f"{key}.") or fnmatchcase(name, key)


def _last_layer(net: nn.Module) -> str:
    """The name of the last module with parameters of its own, by the order in which they were defined.

    :raises ModelError: if it is not a linear layer, so that the order of definition may not be that of the calls.
    """
    own = {name: module for name, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))}
    if not own:
        raise ModelError("net has no parameters: there is nothing to put a prior on.")
    name = str(list(own)[-1])
    module = own[name]
    if isinstance(module, nn.Linear):
        return name or "*"  # the network may be one layer
    linear = [other for other, found in own.items() if isinstance(found, nn.Linear)]
    raise ModelError(
        f"bayesian='last_layer' means the last layer that the network defines, and that is '{name}', "
        f"{type(module).__name__}, not a linear layer. Give the layer by its name, bayesian=['{name}']; linear layers "
        f"are {_listed(linear)}."
    )


def _adapters(net: nn.Module, spec: str) -> list[Adapter]:
    """The adapters that ``lora:RANK`` or ``lora:RANK:LAYERS`` stands for."""
    rank_text, _, layers = spec.removeprefix(_LORA).partition(":")
    if not rank_text.isdigit() or int(rank_text) < 1:
        raise ValueError(
            f"bayesian={spec!r} must have a positive rank, such as 'lora:4', or 'lora:4:query,value' for some layers."
        )
    rank = checks.integer("rank of lora", int(rank_text))
    targets = list(_targets(net, rank))
    keys = [key.strip() for key in layers.split(",") if key.strip()]
    found = [a for a in targets if not keys or any(_is_target(a.name, key) for key in keys)]
    unknown = [key for key in keys if not any(_is_target(a.name, key) for a in targets)]
    if unknown or not found:
        raise ValueError(
            f"bayesian={spec!r}: {unknown or 'the network'} has no linear layer, attention or convolution; there are "
            f"{_listed([a.name for a in targets])}."
        )
    for adapter in found:
        if rank >= min(adapter.units, adapter.fan_in) and keys:
            raise ValueError(
                f"bayesian={spec!r}: layer '{adapter.name}' has {adapter.units} units of {adapter.fan_in} inputs, and "
                "an adapter of that rank is larger than the layer. Name the layer itself, or give a lower rank."
            )
    return [a for a in found if rank < min(a.units, a.fan_in)]


def _is_target(name: str, key: str) -> bool:
    return _matches(name, key) or name.endswith(f".{key}")


def _targets(net: nn.Module, rank: int) -> Iterator[Adapter]:
    """An adapter for each layer that can have one; attention has one for each of its projections."""
    first = _names(net, lambda name, value: True)
    seen: set[str] = set()

    def adapter(name: str, parameter: str, start: int, units: int, fan_in: int) -> Iterator[Adapter]:
        key = f"{first[parameter]}:{start}"
        if key not in seen:  # a parameter that appears twice has one adapter
            seen.add(key)
            yield Adapter(name, first[parameter], start, units, fan_in, rank)

    for name, module in net.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
            for i, projection in enumerate(_PROJECTIONS):
                if module.in_proj_weight is not None:
                    yield from adapter(f"{prefix}{projection}", f"{prefix}in_proj_weight", i * width, width, width)
                else:
                    parameter = f"{prefix}{projection[0]}_proj_weight"
                    yield from adapter(f"{prefix}{projection}", parameter, 0, *net.get_parameter(parameter).shape)
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and f"{prefix}weight" in first:
            units = module.weight.shape[0]
            own = name or type(module).__name__.lower()
            yield from adapter(own, f"{prefix}weight", 0, units, module.weight.numel() // units)


def _joined(
    net: nn.Module, adapters: Sequence[Adapter], names: Mapping[str, str]
) -> tuple[tuple[Adapter, ...], dict[str, str]]:
    """Adapters in the order of rows, and every name of what they change.

    :raises ValueError: if two change the same rows, or one changes a latent parameter.
    """
    ordered = sorted(adapters, key=lambda a: (a.parameter, a.start))
    for one, other in itertools.pairwise(ordered):
        if one.parameter == other.parameter and one.start == other.start:
            raise ValueError(f"bayesian gives layer '{one.name}' two adapters; name it in one of them only.")
    # A layer that is Bayesian as a whole needs no change of low rank.
    ordered = [adapter for adapter in ordered if adapter.parameter not in names.values()]
    changed = {adapter.parameter for adapter in ordered}
    every = _names(net, lambda name, value: True)
    return tuple(ordered), {name: first for name, first in every.items() if first in changed}


def _changed(weight: Tensor, adapters: Sequence[Adapter], values: Mapping[str, Tensor]) -> Tensor:
    """A trained parameter with the products B A of its adapters added to their rows."""
    pieces, row = [], 0
    for adapter in adapters:
        a_RI, b_UR = (values[site] for site in adapter.sites)
        pieces += [weight[row : adapter.start]] if row < adapter.start else []
        row = adapter.start + adapter.units
        before = weight[adapter.start : row]
        pieces.append(before + (b_UR @ a_RI).reshape(before.shape))
    pieces += [weight[row:]] if row < len(weight) else []
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{list(names[:_NUM_NAMED])}{more}"
