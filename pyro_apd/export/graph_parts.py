# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Graphs of ONNX, put together: tensors are decoded, a loop runs a graph for every draw, another averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_apd._version import __version__
from pyro_apd.export.stored_tensors import StoredTensors

# Names of dynamic sizes in the file.
_ROWS, _DRAWS = "rows", "draws"


@dataclass
class Part:
    """An exported graph.

    :ivar model: ``onnx.ModelProto``.
    :ivar inputs: names of its inputs, in order, in the whole graph.
    """

    model: Any
    inputs: Sequence[str]


def assembled(
    body: Part,
    scores: Part,
    *,
    draws: Mapping[str, Tensor | None],
    inputs: Sequence[str],
    outputs: Sequence[str],
    stored: StoredTensors,
) -> Any:
    """An ``onnx.ModelProto`` from inputs, and latents where these are inputs, to outputs.

    :param body: from a draw, inputs and tensors to predictions of a network.
    :param scores: from predictions of all networks to outputs.
    :param draws: what the draws take, ``(S, ...)`` each, by name; None for an input of the graph.
    :param inputs: names of the inputs.
    :param outputs: names of the outputs.
    :param stored: tensors of the body.
    """
    from onnx import helper, numpy_helper

    once, each = _renamed(body, "body"), _renamed(scores, "scores")
    types = {value.name: value.type for value in once.input}
    varying = _varying(once, set(draws))
    loop = _scan(once, [n for n in once.node if varying(n)], types, draws, scores.inputs)
    nodes = [*stored.nodes, *(n for n in once.node if not varying(n)), loop, *each.node]
    constants = [numpy_helper.from_array(array, name) for name, array in stored.initializers]
    constants += [numpy_helper.from_array(v.cpu().numpy(), name) for name, v in draws.items() if v is not None]
    constants += [*once.initializer, *each.initializer]
    graph_inputs = [_with_rows(helper, name, types[name], _ROWS) for name in inputs]
    graph_inputs += [_with_draws(helper, name, types[name]) for name, value in draws.items() if value is None]
    renamed = dict(zip((value.name for value in each.output), outputs, strict=True))
    _rename(nodes, renamed)
    graph_outputs = [helper.make_value_info(renamed[value.name], value.type) for value in each.output]
    graph = helper.make_graph(nodes, "posterior", graph_inputs, graph_outputs, constants)
    opset = max(entry.version for entry in body.model.opset_import if entry.domain in ("", "ai.onnx"))
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        producer_name="pyro_apd",
        producer_version=__version__,
        ir_version=min(10, body.model.ir_version),
    )
    _prune(model)
    _shorten(model.graph)
    return model


def _scan(
    once: Any, nodes: Sequence[Any], types: Mapping[str, Any], draws: Collection[str], predictions: Sequence[str]
) -> Any:
    """The loop over draws, which stacks the predictions."""
    from onnx import helper

    # Names within a loop must not be those around it.
    within = {name: f"{name}/one" for name in draws}
    copies = [helper.make_node("Identity", [f"{name}/one"], [f"{name}/current"]) for name in draws]
    _rename(nodes, {name: f"{name}/current" for name in draws})
    body_inputs = [helper.make_value_info(within[name], types[name]) for name in draws]
    body_outputs = [helper.make_value_info(f"{value.name}/one", value.type) for value in once.output]
    ends = [helper.make_node("Identity", [value.name], [f"{value.name}/one"]) for value in once.output]
    body = helper.make_graph([*copies, *nodes, *ends], "one_network", body_inputs, body_outputs)
    return helper.make_node("Scan", list(draws), list(predictions), body=body, num_scan_inputs=len(draws))


def _renamed(part: Part, prefix: str) -> Any:
    """The graph of a part, without functions, with the names of its inputs; all others get a prefix."""
    from onnx import compose, inliner

    graph = compose.add_prefix(inliner.inline_local_functions(part.model), f"{prefix}/").graph
    new = dict(zip((value.name for value in graph.input), part.inputs, strict=True))
    _rename(graph.node, new)
    for value in graph.input:
        value.name = new[value.name]
    return graph


def _rename(nodes: Sequence[Any], new: Mapping[str, str]) -> None:
    """Renames values in nodes, and within their loops."""
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = new.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, new)


def _varying(graph: Any, draws: Collection[str]) -> Any:
    """Whether a node depends on the draw."""
    depends = set(draws)
    found = set()
    for node in graph.node:
        if depends & set(_read(node)):
            depends |= set(node.output)
            found.add(tuple(node.output))
    return lambda node: tuple(node.output) in found


def _read(node: Any) -> list[str]:
    """Values that a node reads, also within its loops."""
    names = list(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            names += [name for inner in attribute.g.node for name in _read(inner)]
            names += [value.name for value in attribute.g.output]
    return names


def _with_rows(helper: Any, name: str, type_: Any, size: str) -> Any:
    value = helper.make_value_info(name, type_)
    value.type.tensor_type.shape.dim[0].dim_param = size
    return value


def _with_draws(helper: Any, name: str, type_: Any) -> Any:
    tensor = type_.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    return helper.make_tensor_value_info(name, tensor.elem_type, [_DRAWS, *sizes])


def _shorten(graph: Any) -> None:
    """Numbers in place of the names of values, but for inputs and outputs: they are most of a small file."""
    kept = {value.name for value in (*graph.input, *graph.output)}
    names = [value.name for value in graph.initializer]
    names += [name for block in _blocks(graph) for node in block.node for name in node.output]
    names += [value.name for block in _blocks(graph) if block is not graph for value in block.input]
    new = {name: f"v{i:x}" for i, name in enumerate(dict.fromkeys(names)) if name and name not in kept}
    for value in graph.initializer:
        value.name = new.get(value.name, value.name)
    for block in _blocks(graph):
        for value in () if block is graph else (*block.input, *block.output):
            value.name = new.get(value.name, value.name)
    _rename(graph.node, new)


def _blocks(graph: Any) -> list[Any]:
    """A graph and those of its loops."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [graph, *(block for one in inner for block in _blocks(one))]


def _prune(model: Any) -> None:
    """Without nodes and initialisers that no output needs."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(_read(node))
            kept.append(node)
    nodes, constants = list(reversed(kept)), [value for value in graph.initializer if value.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    _strip(graph)


def _strip(graph: Any) -> None:
    """Removes what only people read: names of nodes, lines of source, intermediate types."""
    del graph.value_info[:]
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)
