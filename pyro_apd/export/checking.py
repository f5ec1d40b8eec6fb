# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Checks that an ONNX file computes what the posterior does, for several numbers of rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_apd.errors import ExportError
from pyro_apd.export.prediction import PosteriorPrediction

# Rows that are tried: a size that was baked into the graph shows with at least one of them.
_NUM_ROWS = (1, 4)
_TOLERANCE = 1e-4
# Latents, where these are inputs.
_NUM_DRAWS = 2
# Jumps where two networks' classes are equally probable up to rounding.
_JUMPING = ("variation_ratio",)


def check_file(contents: bytes, prediction: PosteriorPrediction, inputs: Mapping[str, Tensor]) -> None:
    """Runs a file, if onnxruntime is installed.

    :param bytes contents: of the file.
    :param prediction: what it is to compute.
    :param inputs: an example of each input by name.
    :raises ExportError: if results differ, or it does not run.
    """
    try:
        import onnxruntime
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # failures are raised, with the same message
    like = next((value for value in prediction.buffers() if value.is_floating_point()), torch.zeros(()))
    latent = [torch.linspace(-1, 1, _NUM_DRAWS * prediction.generator.latent_size).view(_NUM_DRAWS, -1)]
    try:
        session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        for count in _NUM_ROWS:
            rows = [value[torch.arange(count, device=value.device) % len(value)] for value in inputs.values()]
            rows += latent if prediction.settings.latent == "input" else []
            found = session.run(None, {n: v.cpu().numpy() for n, v in zip(names, rows, strict=True)})
            with torch.no_grad():
                expected = prediction(*(row.to(like.device) for row in rows))
            _compare(prediction.outputs, found, expected, count)
    except Exception as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"The exported file does not run: {error!s:.300}.") from error


def _compare(names: tuple[str, ...], found: list[object], expected: tuple[Tensor, ...], count: int) -> None:
    for name, one, other in zip(names, found, expected, strict=True):
        value = torch.as_tensor(one)
        if value.shape != other.shape:
            raise ExportError(
                f"Output '{name}' of the exported file has shape {tuple(value.shape)} for {count} rows, and the "
                f"posterior's has {tuple(other.shape)}. A size in the network's forward is a constant: use x.shape[0], "
                "not len(x)."
            )
        distance = float((value - other.cpu()).abs().max()) if value.numel() else 0.0
        scale = max(1.0, float(other.abs().max())) if value.numel() else 1.0
        if not distance <= _TOLERANCE * scale and name not in _JUMPING:
            raise ExportError(
                f"Output '{name}' of the exported file differs from the posterior's by {distance:.2g} for {count} "
                "rows. Please report the network; torch.onnx exports one of its operations differently."
            )
