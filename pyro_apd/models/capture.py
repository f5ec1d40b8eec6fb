# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A Pyro model's density as a graph of tensor operations, and the priors that have a closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_apd.models.layout import Layout

Function = TypeVar("Function", bound=Callable[..., Any])


def capture(function: Function, *examples: Any) -> Function:
    """The tensor operations of ``function`` as a flat graph without its Python code.

    :param function: of tensors, and of tuples and dicts of tensors.
    :param examples: its arguments; the graph is for tensors of their shapes.
    :raises RuntimeError: if the function's Python code depends on values of tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with pyro.validation_enabled(False), torch.no_grad(), _NoReadings():
        graph = make_fx(function)(*examples)
    _refuse_shapes_from_values(graph)
    graph.graph.eliminate_dead_code()
    # Parameters of modules that the function refers to would make autograd record every call. As views they follow
    # changes of the parameters.
    for name in {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}:
        constant = getattr(graph, name, None)
        if isinstance(constant, Tensor) and constant.requires_grad:
            delattr(graph, name)
            graph.register_buffer(name, constant.detach())
    graph.recompile()
    return cast(Function, graph)


# Functions that take a tensor for its shape, dtype and device alone.
_BY_SHAPE = ("new_", "ones_like", "zeros_like", "full_like", "empty_like")


class _NoReadings(TorchFunctionMode):
    """Context in which Python code cannot read the values of tensors by ways that tracing does not notice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.__repr__):
            raise RuntimeError("it reads values of tensors, by tolist() or as text")
        return func(*args, **(kwargs or {}))


def _refuse_shapes_from_values(graph: Any) -> None:
    """Raises RuntimeError if a tensor's shape follows from values, such as ``x[mask]`` or ``unique()``.

    Code may ask for that shape, as ``if x[mask].shape[0]:`` does, and the graph would keep the answer for one batch.
    """
    varying: set[Any] = set()  # nodes whose values follow those of the inputs
    for node in graph.graph.nodes:
        name = str(node.target).rpartition("::")[2].removeprefix("aten.")
        inputs = [part for part in node.all_input_nodes if part in varying]
        if node.op != "placeholder" and (not inputs or name.startswith(_BY_SHAPE)):
            continue
        varying.add(node)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.dynamic_output_shape not in tags and torch.Tag.data_dependent_output not in tags:
            continue
        packet = getattr(node.target, "overloadpacket", None)
        if packet is torch.ops.aten.index and not any(_is_mask(part) and part in varying for part in node.args[1]):
            continue  # rows by their numbers, or by a mask that is the same for all data
        raise RuntimeError(f"the shape of a tensor depends on values ({node.target})")


def _is_mask(node: Any) -> bool:
    meta = getattr(node, "meta", {})
    value = meta.get("val", meta.get("tensor_meta"))
    return node is not None and getattr(value, "dtype", torch.bool) in (torch.bool, torch.uint8)


@dataclass(frozen=True)
class GaussianPriors:
    """The sites whose prior is an independent Gaussian with constant parameters: their part of U in closed form.

    That part is half of ``precision * (theta - loc)**2``, plus a constant, so that energies agree with the model's.

    :ivar parameters: ``(loc, precision)`` by site: numbers where they are equal for all entries of the site, otherwise
        flat tensors.
    :ivar float constant: the part that does not depend on theta.
    """

    parameters: Mapping[str, tuple[float | Tensor, float | Tensor]]
    constant: float

    @property
    def names(self) -> frozenset[str]:
        """The sites with such a prior."""
        return frozenset(self.parameters)

    @classmethod
    def of(cls, layout: Layout, traces: Sequence[poutine.Trace]) -> GaussianPriors:
        """Finds them in runs of the model at different points. Parameters that differ there belong to a hierarchy."""
        parameters: dict[str, tuple[float | Tensor, float | Tensor]] = {}
        constant = 0.0
        for site in layout:
            here, *others = (_gaussian_parameters(trace.nodes[site.name]) for trace in traces)
            if here is None or any(there is None or not all(map(torch.equal, here, there)) for there in others):
                continue
            loc, scale = (value.reshape(-1) for value in here)
            parameters[site.name] = (_as_number(loc), _as_number(scale.square().reciprocal()))
            normaliser = scale.double().log().sum() + 0.5 * scale.numel() * torch.log(torch.tensor(2 * torch.pi))
            constant += float(normaliser)
        return cls(parameters, constant)

    def add_to(
        self, layout: Layout, pieces: Sequence[Tensor], gradients: Sequence[Tensor], energy: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients by site, and U ``()`` or ``(C,)``, with the part of these priors added."""
        total = list(gradients)
        for i, site in enumerate(layout):
            if site.name in self.parameters:
                loc, precision = self.parameters[site.name]
                deviation = pieces[i] if isinstance(loc, float) and loc == 0.0 else pieces[i] - loc
                # In few operations: each costs time where graphs are not compiled.
                if isinstance(precision, float):
                    total[i] = torch.add(total[i], deviation, alpha=precision)
                    energy = energy + _square(deviation) * (0.5 * precision)
                else:
                    total[i] = torch.addcmul(total[i], deviation, precision)
                    energy = energy + 0.5 * (precision * deviation.square()).sum(-1)
        return tuple(total), energy + self.constant


def _square(values: Tensor) -> Tensor:
    """Sum of squares over the last dimension."""
    return torch.dot(values, values) if values.dim() == 1 else values.square().sum(-1)


def _as_number(values: Tensor) -> float | Tensor:
    first = float(values[0]) if values.numel() else 0.0
    return first if bool((values == first).all()) else values


def _gaussian_parameters(site: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Mean and sd, each in the site's full shape; None unless it is an unscaled, unmasked independent Gaussian."""
    fn, shape = site["fn"], site["value"].shape
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    # Only the exact types: ExpandedDistribution and MaskedDistribution stay in the graph.
    is_scaled = isinstance(site["scale"], torch.Tensor) or site["scale"] != 1.0
    if type(fn) not in (dist.Normal, torch.distributions.Normal) or site["mask"] is not None or is_scaled:
        return None
    return fn.loc.detach().expand(shape), fn.scale.detach().expand(shape)


class UnvalidatedInstances(Messenger):
    """Switches argument validation off in distributions that were built before the run, until :meth:`restore`.

    ``pyro.validation_enabled(False)`` has no effect on those. Densities are computed after the model has run, so
    leaving the context of the run must not switch validation on again. If a version of torch renames the attribute, the
    capture fails, and the model is traced at every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed: list[tuple[Any, bool]] = []

    def restore(self) -> None:
        """Switches validation on again where it was on."""
        while self._changed:
            fn, flag = self._changed.pop()
            fn._validate_args = flag

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while fn is not None:
            flag = getattr(fn, "_validate_args", False)
            if flag:
                self._changed.append((fn, flag))
                fn._validate_args = False
            fn = getattr(fn, "base_dist", None)
