# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""An ONNX file of a posterior: one network is exported, and a loop in the graph runs it for every draw.

The file holds the generator and not the draws. What does not depend on the draw, such as decoded weights or features of
frozen layers, is computed once, outside of the loop.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.errors import ExportError
from pyro_apd.export.checking import check_file
from pyro_apd.export.fixed_latents import normals
from pyro_apd.export.generator_graph import GeneratorGraph
from pyro_apd.export.graph_parts import Part, assembled
from pyro_apd.export.prediction import PosteriorPrediction
from pyro_apd.export.stored_tensors import StoredTensors
from pyro_apd.runtime import checks
from pyro_apd.runtime.files import atomic_write
from pyro_apd.runtime.optional_packages import require

DTYPES = ("float32", "int8")
OPSET = 20
# Data of the example that is exported; any number but 0 and 1, which exporters take for constants.
_EXAMPLE_ROWS = 3
# Numbers of a constant that is computed in advance.
_FOLDED = 64


def write_onnx(
    prediction: PosteriorPrediction,
    inputs: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    compact: bool = False,
) -> None:
    """Writes an ONNX file, atomically.

    :param prediction: what it computes.
    :param inputs: an example of each input of the network by name, with one row or more.
    :param path: file to write.
    :param str dtype: ``"float32"`` or ``"int8"``, precision of numbers that are no integers.
    :param bool compact: whether large tensors of integers are in a code that the graph decodes.
    :raises ValueError: if the dtype is not known, or inputs have no rows.
    :raises ImportError: if packages of the extra ``onnx`` are missing.
    :raises ExportError: if torch cannot export the network, or the file would compute something else.
    """
    checks.choice("dtype", dtype, DTYPES)
    checks.flag("compact", compact)
    contents = onnx_model(prediction, inputs, dtype, compact).SerializeToString()
    if dtype == "float32":
        check_file(contents, prediction, inputs)
    with atomic_write(path) as partial:
        partial.write_bytes(contents)


def onnx_model(prediction: PosteriorPrediction, inputs: Mapping[str, Tensor], dtype: str, compact: bool) -> Any:
    """The same as an ``onnx.ModelProto``."""
    for package in ("onnx", "onnxscript"):
        require(package, extra="onnx", purpose="A file of ONNX")
    body = OneDraw(prediction)
    rows = tuple(_example(name, value) for name, value in inputs.items())
    draw, tensors = body.example_draw(), tuple(body.tensors.values())
    batch = {0: torch.export.Dim.DYNAMIC}
    dynamic: tuple[Any, ...] = (tuple({} for _ in draw), tuple(batch for _ in rows), tuple({} for _ in tensors))
    with torch.no_grad():
        body_graph = _exported(body, (draw, rows, tensors), dynamic)
        predictions = body(draw, rows, tensors)
        stacked = tuple(torch.stack([value] * (_EXAMPLE_ROWS + 1)) for value in predictions)
        both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        scores_graph = _exported(prediction.scores, stacked, (tuple(both for _ in stacked),))
    stored = StoredTensors(compact)
    stored.add(body.generator_tensors, dtype)
    stored.add(body.network_tensors, "float32")
    return assembled(
        Part(body_graph, [*body.draw_names, *inputs, *body.tensors]),
        Part(scores_graph, [f"predictions_{i}" for i in range(len(stacked))]),
        draws=body.draws,
        inputs=list(inputs),
        outputs=list(prediction.outputs),
        stored=stored,
    )


class OneDraw(nn.Module):
    """Predictions of one network, from its latent, its inputs, and the tensors of generator and network.

    :param prediction: of all networks.
    """

    def __init__(self, prediction: PosteriorPrediction) -> None:
        super().__init__()
        graph = GeneratorGraph(prediction.generator)
        # Not as submodules: the exporter would take tensors of theirs for its own, which are arguments here.
        self._hidden = (graph, prediction.network)
        self._layout = prediction.layout
        self._latent_size = prediction.generator.latent_size
        #: Of the generator, by their names in the graph.
        self.generator_tensors = {f"generator.{n}": value for n, value in graph.tensors.items()}
        own = {**dict(prediction.network.named_parameters()), **dict(prediction.network.named_buffers())}
        self._placeholders = {f"net.{name}" for name in prediction.network.part.first_names}
        #: Of the network, those that no draw replaces.
        self.network_tensors = {f"network.{n}": v.detach() for n, v in own.items() if n not in self._placeholders}
        self.tensors = {**self.generator_tensors, **self.network_tensors}
        self.draws: dict[str, Tensor | None] = {"latent": None}
        if prediction.settings.latent == "fixed":
            self.draws = {"draw/key": prediction.key_S}
            if prediction.head_SH.shape[1]:
                self.draws = {"draw/head": prediction.head_SH, **self.draws}

    @property
    def draw_names(self) -> list[str]:
        """Names of what one draw takes."""
        return list(self.draws)

    def example_draw(self) -> tuple[Tensor, ...]:
        """What the first draw takes."""
        like = next(iter(self.generator_tensors.values()))
        zeros_L = torch.zeros(self._latent_size, device=like.device)
        return tuple(zeros_L if value is None else value[0] for value in self.draws.values())

    def forward(
        self, draw: tuple[Tensor, ...], inputs: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Class probabilities ``(N, ..., K)``; or means and variances."""
        graph, network = self._hidden
        named = dict(zip(self.tensors, tensors, strict=True))
        own = {name.removeprefix("generator."): named[name] for name in self.generator_tensors}
        fixed = {name.removeprefix("network."): named[name] for name in self.network_tensors}
        latent_SL = self._latent(draw).unsqueeze(0)
        values = {n: v[0] for n, v in self._layout.constrain(graph.draw(own, latent_SL)).items()}
        found: tuple[Tensor, ...] = torch.func.functional_call(network, fixed, (values, *inputs))
        return found

    def _latent(self, draw: tuple[Tensor, ...]) -> Tensor:
        if "latent" in self.draws:
            return draw[0]
        *head, key = draw
        count = self._latent_size - (len(head[0]) if head else 0)
        return torch.cat([*head, normals(key, count)])


def _example(name: str, value: Tensor) -> Tensor:
    """Some rows of an input."""
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) == 0:
        raise ValueError(f"Example input '{name}' must be a tensor with at least one row; got {value!r:.80}.")
    return value[torch.arange(_EXAMPLE_ROWS, device=value.device) % len(value)]


def _exported(module: nn.Module, args: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Any:
    """The graph of a module as an ``onnx.ModelProto``."""
    from onnxscript import optimizer

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
        warnings.simplefilter("ignore")  # the exporter's own, about its future
        try:
            program = torch.onnx.export(
                *(module.eval(), args),
                dynamo=True,
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                verbose=False,
                optimize=False,
            )
        except Exception as error:  # of many kinds, and none of them is public
            cause = str(error.__cause__ or error).strip().splitlines() or [""]
            raise ExportError(
                f"torch.onnx cannot export this network: {cause[0]:.300}. Forward must be operations of torch that "
                "depend on the shape, and not on the values, of the inputs."
            ) from error
    assert program is not None
    # Results of constants are left to be computed where the file is loaded, unless they are few numbers.
    return optimizer.optimize(program.model_proto, input_size_limit=_FOLDED, output_size_limit=_FOLDED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without messages of the exporter about packages that it would know, too."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
