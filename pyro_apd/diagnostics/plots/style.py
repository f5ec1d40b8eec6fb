# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Shared by all plots: colours for colour-blind readers, axes, legends.

Colours are those of Okabe and Ito (2008), lighter on a dark background; shapes and dashes tell series apart without
colour. Figures are made without pyplot, so that nothing has to be closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.runtime.optional_packages import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("SGLD", "generator")

_ON_LIGHT = {"chain": "#0072B2", "generator": "#D55E00", "stored": "#009E73", "quiet": "#767676"}
_ON_DARK = {"chain": "#56B4E9", "generator": "#E69F00", "stored": "#3CC9A0", "quiet": "#9A9A9A"}
_SERIES_LIGHT = ("#CC79A7", "#009E73", "#D55E00", "#0072B2", "#8C6D00", "#000000")
_SERIES_DARK = ("#E79BC4", "#3CC9A0", "#E69F00", "#56B4E9", "#F0E442", "#FFFFFF")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
MAX_POINTS = 4000


def new_axes(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    return ax if ax is not None else new_figure((4.6, 3.6)).subplots()


def new_figure(size: tuple[float, float]) -> Any:
    """A figure that is not registered with pyplot, so that it need not be closed."""
    require("matplotlib", purpose="A plot")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def is_dark(ax: Axes) -> bool:
    """Whether the background is dark."""
    red, green, blue = _rgb(ax.get_facecolor())
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _rgb(colour: Any) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def colour(ax: Axes, role: str) -> str:
    """Colour of ``chain``, ``generator``, ``stored`` or ``quiet`` on these axes."""
    return (_ON_DARK if is_dark(ax) else _ON_LIGHT)[role]


def series_colours(ax: Axes) -> tuple[str, ...]:
    """Six colours that tell series apart on these axes."""
    return _SERIES_DARK if is_dark(ax) else _SERIES_LIGHT


def legend(ax: Axes, **options: Any) -> None:
    """A small legend on a translucent background."""
    ax.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize="small", **options)


def to_numpy(values: Tensor) -> np.ndarray:
    """The same as ``float64``."""
    return torch.as_tensor(values).detach().cpu().double().numpy()
