# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Frozen tensors of a model: parameters and buffers that predictions depend on and that no draw replaces.

A posterior holds draws of the latents only. Beside another backbone, or other constants of a normalisation, the same
draws are other functions. A digest of what a model reads detects this.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pyro_apd.data.loader import is_loader
from pyro_apd.data.sources import open_source, shown_arguments
from pyro_apd.errors import ArtifactError
from pyro_apd.models.bnn import BNN
from pyro_apd.runtime.dispatch import dispatch_mode
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")

# Operations that take shape and dtype of a tensor, and not its values.
_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
_LIKE |= {"new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}
# Names of frozen tensors that a message lists.
_NUM_NAMED = 4
# Hexadecimal digits of a digest.
_DIGITS = 32
# Digests of tensors of so many bytes are remembered; so many numbers of them are compared each time.
_LARGE, _NUM_COMPARED = 2**20, 1024
_KNOWN: dict[int, tuple[weakref.ref[Tensor], tuple[int, int, bytes], str]] = {}


@dataclass(frozen=True)
class FrozenTensors:
    """The frozen tensors of the model that a posterior is of.

    :ivar dict read: digests, by name, of tensors that the model reads. They cover dtype, shape and numbers, and are the
        same on every device.
    :ivar dict unread: the same of those that it did not read, but may read without targets.
    :ivar dict values: tensors that were read, by name; empty where they are not known.
    """

    read: dict[str, str]
    unread: dict[str, str] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        sites: Collection[str],
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> FrozenTensors | None:
        """Those of a model, which is run once; None if it cannot be.

        :param sites: the latents.
        :param args: arguments of the model; without them only a :class:`~pyro_apd.BNN` is known.
        """
        if not has_frozen(model):
            return cls({})
        found = named_tensors(model)
        if isinstance(model, BNN) and (args is None or "features" in (kwargs or {})):  # no inputs of the network
            return cls._read_only(fixed_tensors(model))
        if args is None:
            return None
        try:
            with preserved_param_store(), reading(model) as read, poutine.block(), torch.no_grad(), seeded(0):
                model(*args, **(kwargs or {}))
        except Exception as error:
            logger.debug("Frozen tensors of the model are not known: %s.", error)
            return None
        others = {
            name: tensor
            for name, tensor in found.items()
            if name not in read and not tensor.requires_grad and not _is_placeholder(name, sites)
        }
        return replace(cls._read_only(read), unread={name: digest(tensor) for name, tensor in others.items()})

    @classmethod
    def of_run(
        cls,
        model: Callable[..., Any],
        sites: Collection[str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        num_data: int | None = None,
        batch_size: int | None = None,
    ) -> FrozenTensors | None:
        """The same from arguments of a run. No batch of a loader is taken: they are the run's."""
        if not has_frozen(model):
            return cls({})
        if is_loader(args, num_data):
            return cls.of(model, sites)
        if batch_size is not None:  # activations of all rows need not fit in memory
            options: dict[str, Any] = {"batch_size": batch_size, "num_data": num_data}
            source, inputs = open_source(args, kwargs, generator=torch.Generator().manual_seed(0), **options)
            call = source.bind(inputs)
            return cls.of(model, sites, call.args, call.kwargs)
        shown, shown_kwargs, _ = shown_arguments(args, kwargs, num_data)
        return cls.of(model, sites, shown, shown_kwargs)

    @classmethod
    def _read_only(cls, tensors: Mapping[str, Tensor]) -> FrozenTensors:
        values = {name: tensor.detach() for name, tensor in tensors.items()}
        return cls({name: digest(tensor) for name, tensor in tensors.items()}, values=values)

    def check(self, model: Callable[..., Any], read: Mapping[str, Tensor]) -> None:
        """Compares with another model.

        :param read: what the model reads, see :func:`reading`.
        :raises ArtifactError: if a tensor that either model reads differs, or is missing in one of them.
        """
        self.check_tensors({**{n: t for n, t in named_tensors(model).items() if n in self.read}, **read})

    def check_tensors(self, found: Mapping[str, Tensor]) -> None:
        """Compares with tensors by name, all of which are read.

        :raises ArtifactError: as :meth:`check`.
        """
        known = {**self.unread, **self.read}
        wrong = [f"'{name}' is missing" for name in self.read if name not in found]
        for name, tensor in found.items():
            if name not in known:
                wrong.append(f"'{name}', {_shown(tensor)}, was not there")
            elif digest(tensor) != known[name]:
                wrong.append(f"'{name}', {_shown(tensor)}, holds other numbers")
        if wrong:
            more = f" and {len(wrong) - _NUM_NAMED} more" if len(wrong) > _NUM_NAMED else ""
            raise ArtifactError(
                "The model has other frozen weights than the one that this posterior was sampled with, so that its "
                f"draws would be other functions: {'; '.join(wrong[:_NUM_NAMED])}{more}. Give the model with the same "
                "frozen parameters and buffers. Or save them with the posterior, save(path, frozen=True), and put them "
                "into the model by posterior.load_frozen(model)."
            )

    def within(self, prefix: str) -> FrozenTensors:
        """Those whose names begin with ``prefix``."""

        def part(table: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in table.items() if name.startswith(prefix)}

        return FrozenTensors(part(self.read), part(self.unread), part(self.values))

    def intact_values(self) -> dict[str, Tensor]:
        """The tensors that were read, by name; empty where they are not known, or have changed since."""
        if not self.values or any(digest(value) != self.read[name] for name, value in self.values.items()):
            return {}
        return dict(self.values)

    def to_json(self) -> dict[str, dict[str, str]]:
        """The digests, in values that JSON holds."""
        return {"read": dict(self.read), "unread": dict(self.unread)}

    @classmethod
    def from_json(cls, description: Any, values: Mapping[str, Tensor] | None = None) -> FrozenTensors:
        """Inverse of :meth:`to_json`.

        :raises ValueError: if it is malformed.
        """
        tables = [description.get(key) if isinstance(description, dict) else None for key in ("read", "unread")]
        if not all(isinstance(table, dict) and all(isinstance(t, str) for t in table.values()) for table in tables):
            raise ValueError("frozen tensors must be two tables of digests by name, 'read' and 'unread'.")
        return cls(dict(description["read"]), dict(description["unread"]), dict(values or {}))


def digest(tensor: Tensor) -> str:
    """A digest of dtype, shape and numbers of a tensor: the same on every device.

    That of a large tensor is computed again only where the tensor was changed.
    """
    if tensor.numel() * tensor.element_size() < _LARGE:
        return _digest(tensor)
    state = state_of(tensor)
    known = _KNOWN.get(id(tensor))
    if known is not None and known[0]() is tensor and known[1] == state:
        return known[2]
    text = _digest(tensor)
    key = id(tensor)
    _KNOWN[key] = (weakref.ref(tensor, lambda _: _KNOWN.pop(key, None)), state, text)
    return text


def _digest(tensor: Tensor) -> str:
    value = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{value.dtype} {list(value.shape)}\n".encode())
    if value.numel():
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:_DIGITS]


def state_of(tensor: Tensor) -> tuple[int, int, bytes]:
    """What changes with the numbers of a tensor: its address, torch's counter of changes in place, and some numbers,
    since ``tensor.data`` is changed without being counted."""
    try:
        version = int(tensor._version)
    except (AttributeError, RuntimeError):  # tensors of inference mode have no counter
        version = -1
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _NUM_COMPARED)].cpu().contiguous()
    return tensor.data_ptr(), version, some.view(torch.uint8).numpy().tobytes()


def named_tensors(model: Callable[..., Any]) -> dict[str, Tensor]:
    """All parameters and buffers of a model by name.

    Of a function, those of the modules that it refers to: with their names in the module where it is one, and after the
    name of the variable where there are several.
    """
    modules = _modules(model)
    tensors = {}
    for variable, module in modules.items():
        prefix = f"{variable}." if len(modules) > 1 else ""
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        tensors.update({prefix + name: value for name, value in named if not isinstance(value, UninitializedParameter)})
    return tensors


def fixed_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a network that no draw replaces, by name, in evaluation mode.

    :param net: a :class:`~pyro_apd.BNN`, or a network whose latents are the parameters that require gradients.
    """
    if isinstance(net, BNN):
        drawn = {f"net.{name}" for name in net.parameter_sites}
    else:
        drawn = {name for name, value in net.named_parameters(remove_duplicate=False) if value.requires_grad}
    counted = "num_batches_tracked"  # of batch normalisation, which uses it in training mode only
    return {n: t for n, t in named_tensors(net).items() if n not in drawn and n.rpartition(".")[2] != counted}


def has_frozen(model: Callable[..., Any]) -> bool:
    """Whether a model may read parameters or buffers that no draw replaces."""
    return bool(fixed_tensors(model) if isinstance(model, BNN) else named_tensors(model))


@torch.no_grad()
def put_values(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into tensors of the same names, in place.

    :raises ArtifactError: if one is missing, or has another shape or dtype; then none is changed.
    """
    for name, value in values.items():
        there = tensors.get(name)
        if there is None or there.shape != value.shape or there.dtype != value.dtype:
            has = "does not have it" if there is None else f"has {_shown(there)} there"
            raise ArtifactError(
                f"The frozen weights '{name}', {_shown(value)}, do not fit: the model {has}. Give the model that the "
                "posterior was sampled with."
            )
    for name, value in values.items():
        tensors[name].copy_(value)


@contextmanager
def reading(model: Callable[..., Any]) -> Iterator[dict[str, Tensor]]:
    """Parameters and buffers of a model, by name, whose values operations within this context use.

    They are complete when the context ends. Where torch does not show its operations, they stay empty.
    """
    found = named_tensors(model)
    read: dict[str, Tensor] = {}
    mode = _recorder() if found else None
    recorder = None if mode is None else mode()
    with nullcontext() if recorder is None else recorder:
        yield read
    if recorder is not None:
        read.update({name: tensor for name, tensor in found.items() if _key(tensor) in recorder.keys})


@functools.cache
def _recorder() -> Any:
    """The class of a dispatch mode that notes which tensors operations use.

    None if torch has no such modes where they are today, which is not its public interface.
    """
    try:
        base = dispatch_mode()
    except ImportError:
        return None

    class Recorder(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.keys: set[Any] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ not in _LIKE:
                self.keys |= {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            return func(*args, **(kwargs or {}))

    return Recorder


def _key(tensor: Tensor) -> Any:
    """The same for all views of a tensor."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return id(tensor)


def _modules(model: Callable[..., Any]) -> dict[str, nn.Module]:
    """The modules that a model is, or refers to, by the name of the variable."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, value: Any, namespace: Mapping[str, Any] | None) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.setdefault(name, value)
            return
        for inner_name, inner, scope in _references(value, namespace):
            visit(inner_name, inner, scope)

    visit("model", model, None)
    return found


def _references(value: Any, namespace: Mapping[str, Any] | None) -> Iterator[tuple[str, Any, Mapping[str, Any] | None]]:
    """What a callable refers to: names, values, and the module of Python whose functions are looked into."""
    if isinstance(value, functools.partial):
        yield from ((f"argument{i}", item, namespace) for i, item in enumerate((value.func, *value.args)))
        yield from ((name, item, namespace) for name, item in value.keywords.items())
    elif isinstance(value, types.MethodType):
        owner = value.__self__
        if isinstance(owner, nn.Module):
            yield "self", owner, namespace
        else:
            yield from ((name, item, namespace) for name, item in getattr(owner, "__dict__", {}).items())
        yield "function", value.__func__, namespace
    elif isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f"item {key}", item, namespace) for key, item in items if isinstance(item, nn.Module))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield from ((name, item, namespace) for item in _contents(cell))
        # Of global variables modules, and functions beside the model's; libraries are not looked into.
        if namespace is None or namespace is value.__globals__:
            for name in _global_names(value.__code__):
                item = value.__globals__.get(name)
                if isinstance(item, (nn.Module, types.FunctionType)):
                    yield name, item, value.__globals__
    elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        yield from ((name, item, namespace) for name, item in vars(value).items())


def _global_names(code: types.CodeType) -> Iterator[str]:
    """Names that a function uses, also within functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _contents(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a variable that has no value yet
        return []


def _is_placeholder(name: str, sites: Collection[str]) -> bool:
    """Whether a tensor that is not read stands for a latent: sites have its name, or that after a prefix."""
    return any(site == name or site.endswith(f".{name}") for site in sites)


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
