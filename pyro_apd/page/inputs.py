# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a page shows of a network's inputs: cells to draw in, or a slider per feature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Positions of a slider.
_STEPS = 200
# Where data are not known: standardised features, and brightness of cells.
_FEATURE_RANGE = (-3.0, 3.0)
_MAX_FEATURES = 100


@dataclass(frozen=True)
class PageInputs:
    """Inputs of a page.

    :ivar tuple shape: of one row, as the network takes it.
    :ivar image: rows and columns of cells to draw in; None for sliders.
    :ivar list features: name, lowest and highest value, and step of each slider.
    :ivar tuple limits: lowest and highest value of a cell.
    :ivar list start: values at first.
    :ivar list examples: label and values each.
    """

    shape: tuple[int, ...]
    image: tuple[int, int] | None = None
    features: list[dict[str, Any]] = field(default_factory=list)
    limits: tuple[float, float] = (0.0, 1.0)
    start: list[float] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def drawing(
        cls, shape: Sequence[int], image: tuple[int, int], x: Tensor | None = None, labels: Sequence[str] = ()
    ) -> PageInputs:
        """Cells to draw in.

        :param shape: of one row.
        :param image: rows and columns; their product is the size of a row.
        :param x: data ``(N, ...)``, which give the range of values and examples.
        :param labels: of the examples, which are the first rows of ``x``.
        :raises ValueError: if rows do not have the size of the image.
        """
        if math.prod(shape) != math.prod(image):
            raise ValueError(
                f"An image of {image[0]} x {image[1]} has {math.prod(image)} cells, and a row of the inputs has shape "
                f"{tuple(shape)}. Only images of one channel can be drawn; leave image out for sliders."
            )
        limits = (0.0, 1.0) if x is None else (float(x.min()), float(x.max()))
        if limits[0] >= limits[1]:
            raise ValueError(f"All values of x are {limits[0]}, which gives cells no range.")
        start = [limits[0]] * math.prod(shape)
        return cls(tuple(shape), image, limits=limits, start=start, examples=_examples(x, labels))

    @classmethod
    def sliders(
        cls, shape: Sequence[int], x: Tensor | None = None, names: Sequence[str] = (), labels: Sequence[str] = ()
    ) -> PageInputs:
        """A slider per feature, from its lowest to its highest value; at first in the middle of the data.

        :param shape: of one row.
        :param x: data ``(N, ...)``.
        :param names: of the features.
        :param labels: of the examples, which are the first rows of ``x``.
        :raises ValueError: if names and features differ in number, or there are more than 100 features.
        """
        size = math.prod(shape)
        if size > _MAX_FEATURES:
            raise ValueError(f"A row has {size} numbers, too many for sliders. Draw it: --image ROWSxCOLUMNS.")
        if names and len(names) != size:
            raise ValueError(f"There are {len(names)} names of features, and a row has {size} numbers.")
        columns = None if x is None else x.detach().reshape(len(x), size).double()
        features, start = [], []
        for i in range(size):
            low, high, middle, step = _range(None if columns is None else columns[:, i])
            features.append({"name": str(names[i]) if names else f"x{i}", "low": low, "high": high, "step": step})
            start.append(middle)
        return cls(tuple(shape), features=features, start=start, examples=_examples(x, labels))

    def to_json(self) -> dict[str, Any]:
        """What the page's script takes."""
        return {
            "shape": list(self.shape),
            "image": None if self.image is None else list(self.image),
            "features": self.features,
            "low": self.limits[0],
            "high": self.limits[1],
            "start": self.start,
            "examples": self.examples,
        }


def _range(column: Tensor | None) -> tuple[float, float, float, float]:
    """Lowest and highest value, median, and step of a slider."""
    if column is None:
        low, high = _FEATURE_RANGE
        return low, high, 0.0, (high - low) / _STEPS
    low, high, middle = float(column.min()), float(column.max()), float(column.median())
    if low >= high:
        return low - 1.0, high + 1.0, middle, 2.0 / _STEPS
    is_whole = bool((column == column.round()).all()) and high - low >= 2
    return low, high, middle, 1.0 if is_whole else (high - low) / _STEPS


def _examples(x: Tensor | None, labels: Sequence[str]) -> list[dict[str, Any]]:
    if x is None:
        return []
    return [
        {"label": str(label), "values": row.detach().reshape(-1).to(torch.float32).tolist()}
        for label, row in zip(labels, x, strict=False)
    ]
