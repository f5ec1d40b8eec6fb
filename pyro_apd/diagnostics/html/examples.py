# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Inputs of which chain and generator are most and least sure, and where they differ most, with their predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.diagnostics.comparison.evaluation import Inputs
from pyro_apd.diagnostics.html.pictures import Picture, picture

# Inputs of each kind, and features of a row that are shown.
_COUNT, _NUM_FEATURES = 5, 8
# A row of more is rather an image or a signal, of which the first numbers tell nothing.
_MOST_FEATURES = 32
# Width and height of an image and its title, in inches.
_IMAGE_SIZE = (1.5, 1.85)
#: Shapes of a tensor of images without channels and with them.
_WITHOUT_CHANNELS, _WITH_CHANNELS = 3, 4
_CAPTION = (
    "Test inputs of which the networks of the chain disagree least (first row) and most (second row), and those where "
    "chain and generator differ most in that (third row), with the averaged prediction of either."
)


@dataclass(frozen=True)
class Example:
    """One input.

    :ivar str kind: why it is shown.
    :ivar int index: its number among the inputs.
    :ivar str chain: the chain's prediction.
    :ivar str generator: the generator's.
    :ivar str target: its target; empty where unknown.
    :ivar list features: of a table, the first of them.
    """

    kind: str
    index: int
    chain: str
    generator: str
    target: str
    features: list[str]


def examples(
    per_input: Mapping[str, Mapping[str, Tensor]], inputs: Inputs | None, image_shape: Sequence[int] | None
) -> tuple[list[Example], list[Picture]]:
    """Rows of a table, or where inputs are images a picture; both empty where nothing was predicted.

    :param per_input: as of a :class:`~pyro_apd.diagnostics.comparison.fidelity_table.Fidelity`.
    :param image_shape: ``(H, W)`` or ``(C, H, W)`` of inputs that are flat.
    :raises ValueError: if inputs have another number of entries than ``image_shape``.
    """
    x = None if inputs is None or not inputs.args else inputs.args[0]
    if not per_input or not isinstance(x, Tensor) or x.dim() < 2:
        return [], []
    check_image_shape(x, image_shape)
    chain, generator = per_input["chain"], per_input["generator"]
    score = "mi" if "mi" in chain else "epistemic"
    if len(x) != len(chain[score]):
        return [], []
    targets = per_input.get("targets", {}).get("y")
    images_NHWC = _images(x.detach().cpu(), image_shape)
    found = []
    for kind, index in _chosen(chain[score], generator[score]):
        target = "" if targets is None or targets.dim() != 1 else f"{float(targets[index]):.4g}"
        row = x[index].flatten()[:_NUM_FEATURES] if x[index].numel() <= _MOST_FEATURES else x.new_zeros(0)
        features = [f"{float(value):.4g}" for value in row]
        found.append(Example(kind, index, _said(chain, index), _said(generator, index), target, features))
    if images_NHWC is None:
        return (found, []) if x.dim() == 2 else ([], [])
    rows = -(-len(found) // _COUNT)
    size = (_IMAGE_SIZE[0] * min(_COUNT, len(found)), _IMAGE_SIZE[1] * rows)
    return [], [picture(_drawing(found, images_NHWC, rows), size, _CAPTION)]


def _chosen(chain_N: Tensor, generator_N: Tensor) -> list[tuple[str, int]]:
    """Kinds and indices; each input once per kind."""
    count = min(_COUNT, len(chain_N))
    apart_N = (generator_N - chain_N).abs()
    kinds = {"most sure": -chain_N, "least sure": chain_N, "differ most": apart_N}
    return [(kind, int(i)) for kind, value_N in kinds.items() for i in value_N.nan_to_num(-torch.inf).topk(count)[1]]


def _said(side: Mapping[str, Tensor], index: int) -> str:
    """An averaged prediction in words."""
    mean = side["mean"][index]
    if "mi" in side:
        return f"{int(mean.argmax())} ({float(mean.max()):.2f})"
    return f"{float(mean):.3g} ± {float(side['sd'][index]):.2g}"


def check_image_shape(x: Any, image_shape: Sequence[int] | None) -> None:
    """Raises :class:`ValueError` if inputs have another number of entries than images of this shape."""
    x = x[0] if isinstance(x, tuple) and x else x
    if image_shape is None or not isinstance(x, Tensor) or len(x) == 0:
        return
    size = tuple(image_shape)
    if torch.Size(size).numel() != x[0].numel() or len(size) not in (_WITHOUT_CHANNELS - 1, _WITH_CHANNELS - 1):
        raise ValueError(
            f"`image_shape` {size} does not fit inputs of {x[0].numel()} numbers; give (H, W) or (C, H, W)."
        )


def _images(x: Tensor, image_shape: Sequence[int] | None) -> Tensor | None:
    """Images ``(N, H, W, C)`` with values from 0 to 1; None if inputs are no images."""
    if image_shape is not None:
        x = x.reshape(len(x), *image_shape)
    if x.dim() == _WITHOUT_CHANNELS and image_shape is not None:
        x = x.unsqueeze(1)
    if x.dim() != _WITH_CHANNELS or x.shape[1] not in (1, 3):
        return None
    x = x.float()  # images may be integers, or black and white
    lowest, highest = x.amin(), x.amax()
    return ((x - lowest) / (highest - lowest).clamp_min(1e-12)).permute(0, 2, 3, 1)


def _drawing(found: list[Example], images_NHWC: Tensor, rows: int) -> Callable[[Any], object]:
    def draw(figure: Any) -> None:
        for axis, example in zip(figure.subplots(rows, -(-len(found) // rows), squeeze=False).flat, found, strict=True):
            image_HWC = images_NHWC[example.index]
            axis.imshow(image_HWC.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set_axis_off()
            axis.set_title(f"chain {example.chain}\ngenerator {example.generator}", fontsize=7.5)

    return draw
