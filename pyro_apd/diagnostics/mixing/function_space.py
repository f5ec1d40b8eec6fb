# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A few predictions as scalars: unlike weights they are identified, and they may mix where weights do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_apd.diagnostics.comparison.evaluation import Inputs
from pyro_apd.predictive import predictive
from pyro_apd.predictive.draws import evenly_spaced
from pyro_apd.runtime.global_state import preserved_param_store


class FunctionProbe:
    """Predictions on a few inputs, one number each: the probability of a class, or the mean.

    Of classes, the most probable by the first draws given; the same for all later draws. R-hat is of ranks, so that
    probabilities need no transformation.

    :param callable model: the Pyro model.
    :param Inputs inputs: what it is called with.
    :param int count: inputs, evenly spaced among those given.
    """

    def __init__(self, model: Callable[..., Any], inputs: Inputs, count: int) -> None:
        self._model, self._count = model, count
        self._args, self._rows = _few_rows(inputs.args, count)
        self._kwargs = inputs.kwargs
        self._classes: Tensor | None = None
        #: What each number is, such as ``p(class 3) at input 12``; empty before the first call.
        self.names: list[str] = []

    def __call__(self, draws: Mapping[str, Tensor]) -> Tensor | None:
        """``(S, F)`` for draws ``(S, ...)`` by site; None if the model predicts neither classes nor numbers."""
        with preserved_param_store(), torch.no_grad():
            out = predictive.outputs(self._model, draws, *self._args, **self._kwargs)
        if out.probs_SNK is not None:
            if self._classes is None:
                self._classes = out.probs_SNK.mean(0).argmax(-1)
            index_SN1 = self._classes[None, :, None].expand(len(out.probs_SNK), -1, 1)
            values_SN, what = (
                out.probs_SNK.gather(-1, index_SN1).squeeze(-1),
                [f"p(class {int(c)})" for c in self._classes],
            )
        elif out.mean_SN is not None:
            values_SN, what = out.mean_SN, ["mean"] * out.mean_SN.shape[1]
        else:
            return None
        shown = evenly_spaced(values_SN.shape[1], self._count)
        labels = self._rows if len(self._rows) == values_SN.shape[1] else range(values_SN.shape[1])
        self.names = [f"{what[i]} at input {labels[i]}" for i in shown]
        return values_SN[:, shown]


def _few_rows(args: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], list[int]]:
    """Some rows of the inputs and which these are, where there is one tensor of rows; else all, and no numbers."""
    tensors = [value for value in args if value is not None]
    if len(tensors) == 1 and isinstance(args[0], Tensor) and args[0].dim() > 0:
        rows = evenly_spaced(len(args[0]), count)
        return (args[0][rows], *args[1:]), rows
    return args, []
