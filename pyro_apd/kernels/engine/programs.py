# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Compiled programs, kept for later runs of the same shapes, and an estimate of when compiling pays."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.models.capture import capture
from pyro_apd.runtime.announcements import announce
from pyro_apd.runtime.trees import tree_flatten, tree_unflatten

logger = logging.getLogger("pyro_apd")

Program = Callable[..., Any]

#: Programs that are kept.
MAX_KEPT = 16
_KEPT: OrderedDict[str, Program] = OrderedDict()

# Measured on two busy cores, in seconds of processor time. A step that is not compiled takes longer by so much per
# site, whose operations are called one by one, and per weight of all chains but the first.
_SAVED_PER_SITE, _SAVED_PER_WEIGHT = 0.18e-3, 35e-9
# Compiling takes so long, and so much more per step in a program and site.
_COMPILING, _COMPILING_PER_SITE = 10.0, 0.25


@dataclass(frozen=True)
class Estimate:
    """What compiling costs and saves, from sizes alone: what is decided by it is decided again in the same way.

    :ivar int num_sites: sites of the model.
    :ivar int num_weights: numbers of a state.
    :ivar int num_chains: chains that advance together.
    :ivar int unroll: steps in a program.
    """

    num_sites: int
    num_weights: int
    num_chains: int = 1
    unroll: int = 1

    @property
    def cost(self) -> float:
        """Seconds to compile."""
        return _COMPILING + _COMPILING_PER_SITE * self.unroll * self.num_sites

    def saved(self, num_steps: int) -> float:
        """Seconds that this number of steps of all chains takes less once they are compiled."""
        others = (self.num_chains - 1) * self.num_weights
        return num_steps * (_SAVED_PER_SITE * self.num_sites + _SAVED_PER_WEIGHT * others)

    @property
    def min_steps(self) -> int:
        """Steps from which compiling pays. The estimate is low rather than high: sampling in the demo, 18,000 steps
        of four chains, took 43 s uncompiled beside another process, and 21 to 24 s compiled with nothing beside."""
        return round(self.cost / max(self.saved(1), 1e-9))


def compiled(
    function: Callable[..., Any], *examples: Any, is_small: bool = False, announcement: str | None = None
) -> Program:
    """``function``, of trees of tensors, compiled for such trees: a function of their leaves.

    It is captured as a flat graph, and that is given to the compiler. With :func:`torch.compile` the same graph
    would be traced once more, and its arguments checked at each call for changes that cannot happen, which takes longer
    than the arithmetic of a small step.

    The last :data:`MAX_KEPT` programs are kept: a graph that comes again for the same shapes is not compiled again.

    :param is_small: whether calls from Python take a noticeable part of the time: then they are compiled as well, which
        takes the compiler twice as long.
    :param announcement: to be made before it is compiled, where it is.
    """
    leaves, spec = tree_flatten(examples)

    def flat(*tensors: Tensor) -> Any:
        return function(*tree_unflatten(list(tensors), spec))

    copies = [leaf.clone() for leaf in leaves]  # the first call changes its arguments
    graph = capture(flat, *copies)
    constants = _as_arguments(graph)
    key = _identity(graph, [*copies, *constants], is_small)
    program = _KEPT.get(key)
    if program is None:
        if announcement is not None:
            announce(announcement)
        program = _compiled(graph, [*copies, *constants], is_small)
    _keep(key, program)
    return (lambda *tensors: program(*tensors, *constants)) if constants else program


def _compiled(graph: Any, copies: list[Tensor], is_small: bool) -> Program:
    """A graph compiled in the first of several ways that works, and called once on ``copies``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about itself
        for options in ({"cpp_wrapper": True}, {}) if is_small else ({},):
            try:
                program = _inductor(graph, copies, options)
                program(*copies)
                return program
            except Exception as error:  # not of torch's stable interface
                logger.debug("Compiling in another way, since %s.", error)
        program = torch.compile(graph.forward, fullgraph=True, dynamic=False)
        program(*copies)
    return program


def _inductor(graph: Any, examples: list[Tensor], options: dict[str, Any]) -> Program:
    from torch._inductor import compile as compile_graph

    compiled: Program = compile_graph(graph, examples, options=options)  # type: ignore[arg-type]
    return compiled


def _as_arguments(graph: Any) -> list[Tensor]:
    """Makes a graph's constants further arguments; returns them. The program then is no model's own."""
    constants: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        node.meta.clear()  # shapes noted while capturing, which the compiler would use
        if node.op != "get_attr" or not isinstance(getattr(graph, str(node.target), None), Tensor):
            continue
        name = str(node.target)
        if name not in constants:
            constants[name] = getattr(graph, name).detach()
            with graph.graph.inserting_after(last):
                last = arguments[name] = graph.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(arguments[name])
        graph.graph.erase_node(node)
    for name in constants:
        delattr(graph, name)
    graph.recompile()
    return list(constants.values())


def _identity(graph: Any, examples: list[Tensor], is_small: bool) -> str:
    """All that a program depends on, as text: no content of tensors, since all are arguments."""
    others = [
        id(getattr(graph, str(node.target))) for node in graph.graph.nodes if node.op in ("get_attr", "call_module")
    ]
    shapes = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in examples]
    settings = (is_small, torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision())
    return f"{graph.code}{others}{shapes}{settings}"


def _keep(key: str, program: Program) -> None:
    _KEPT[key] = program
    _KEPT.move_to_end(key)
    while len(_KEPT) > MAX_KEPT:
        _KEPT.popitem(last=False)
