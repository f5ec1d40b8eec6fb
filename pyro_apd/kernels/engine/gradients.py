# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How a chain estimates the gradient of U: the protocol, and the plain estimate of the full data or a mini-batch.

:mod:`~pyro_apd.kernels.engine.control_variates` and :mod:`~pyro_apd.kernels.engine.data_parallel` have the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from pyro_apd.models.potential import GradientFunction, Inputs, Pieces, Potential


class GradientEstimator(Protocol):
    """Estimates U and its gradient on the mini-batches of a potential."""

    @property
    def path(self) -> str:
        """``"captured"`` or ``"traced"``, once a gradient was computed."""

    @property
    def num_data(self) -> int | None:
        """N, over all processes that share the data; None where there are no rows."""

    def gradient_function(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        """The function that estimates gradient and U, for states and mini-batches of these shapes; for steps."""

    def gradient(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The plain estimate at a joined state, without variance reduction; for measurements.

        :param theta: ``(D,)``, or ``(C, D)`` with ``inputs`` of C chains.
        :returns: gradient ``(D,)`` or ``(C, D)``, and U ``()`` or ``(C,)``.
        """

    def prepare(self, pieces: Pieces) -> None:
        """Called with the state before the first step, which estimates may be relative to.

        :raises ValueError: if the mini-batches do not suit the estimate.
        """

    def state_dict(self) -> dict[str, Any] | None:
        """Tensors that later estimates depend on; None where there are none."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, where that is not None."""


class PlainGradient:
    """The gradient of a potential on its mini-batch, or on the full data.

    :param Potential potential: the potential.
    """

    def __init__(self, potential: Potential) -> None:
        self._potential = potential

    @property
    def path(self) -> str:
        """See :class:`GradientEstimator`."""
        return self._potential.path

    @property
    def num_data(self) -> int | None:
        """N; None where there are no rows."""
        return self._potential.num_data

    def gradient_function(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        """See :class:`GradientEstimator`."""
        return self._potential.gradient_function(pieces, inputs)

    def gradient(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :class:`GradientEstimator`."""
        return self._potential.gradient(theta, inputs)

    def prepare(self, pieces: Pieces) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any] | None:
        """There is no state."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
