# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws compared as functions: what a model predicts at probe inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.budget import TrainingBudget
from pyro_apd.distillation.distances import energy_distance, spread
from pyro_apd.distillation.probes import Probes, RowArguments
from pyro_apd.distillation.source import Source
from pyro_apd.models.layout import Layout
from pyro_apd.models.shared_features import with_features
from pyro_apd.predictive.predictive import FunctionView, outputs
from pyro_apd.uncertainty import mutual_information, predictive_entropy

logger = logging.getLogger("pyro_apd")

# Spread, relative to the average over probes, below which a probe no longer gains weight.
_SPREAD_FLOOR = 0.05
# A model that takes its data only as a whole is still compared in function space, up to this many rows.
_MAX_WHOLE_ROWS = 512


class FunctionSpace:
    """Draws as functions of probe inputs.

    :param FunctionView view: from constrained draws to function values ``(S, N, F)``.
    :param Layout layout: of the draws.
    :param str kind: of the observed site, as in :class:`~pyro_apd.predictive.predictive.Outputs`.
    :param callable model: what takes the inputs.
    :param bool outputs_first: whether a model with several outputs per input has the first output of all inputs first,
        as one with a plate of outputs around the plate of data does.
    """

    def __init__(
        self,
        view: FunctionView,
        layout: Layout,
        kind: str,
        model: Callable[..., Any],
        outputs_first: bool = False,
    ) -> None:
        self.model = model
        self._outputs_first = outputs_first
        self._view = view
        self._layout = layout
        self._kind = kind

    def views(self, theta_SD: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Function values ``(P, S, F)``, on each scale that is compared; ``P`` are inputs, or outputs of each in order.

        Log-probabilities differ between draws at every input, probabilities near the decision boundary. With only
        one of them, the generator could be wrong where the other differs. The last view is the one that users see.
        """
        values_PSF = self._view(self._layout.constrain(theta_SD), *inputs).transpose(0, 1)
        if self._outputs_first:
            values_PSF = values_PSF.unflatten(0, (-1, len(inputs[0]))).transpose(0, 1).flatten(0, 1)
        if self._kind == "categorical":
            return [values_PSF, values_PSF.exp()]
        if self._kind == "bernoulli":
            return [values_PSF, torch.cat([-values_PSF, values_PSF], dim=-1).sigmoid()]
        return [values_PSF]

    def distance(self, fake: list[Tensor], real: list[Tensor]) -> Tensor:
        """Energy distance relative to the chain's spread, averaged over probes and summed over views."""
        total = real[0].new_zeros(())
        for fake_PSF, real_PTF in zip(fake, real, strict=True):
            spread_P = spread(real_PTF)
            floor = _SPREAD_FLOOR * spread_P.mean() + torch.finfo(spread_P.dtype).eps
            total = total + (energy_distance(fake_PSF, real_PTF, spread_P) / (spread_P + floor)).mean()
        return total

    def disagreements(self, views: list[Tensor]) -> Tensor:
        """How far draws disagree at each probe, ``(P, F)``: mutual information where the model classifies, in nats,
        else the variances of the locations. Their scales, each of which comes after its location, are left out."""
        if self._is_classifier:
            return mutual_information(views[-1].transpose(0, 1)).unsqueeze(1)
        return views[0].var(1, correction=0)[:, ::2]

    def entropies(self, views: list[Tensor]) -> Tensor | None:
        """Of averaged predictions at each probe, ``(P, 1)``, in nats; None unless the model classifies."""
        return predictive_entropy(views[-1].transpose(0, 1)).unsqueeze(1) if self._is_classifier else None

    def mutual_information(self, views: list[Tensor]) -> Tensor | None:
        """Mean over probes, in nats; None unless the model classifies."""
        return self.disagreements(views).mean() if self._is_classifier else None

    @property
    def _is_classifier(self) -> bool:
        return self._kind in ("categorical", "bernoulli")


def function_space(source: Source, probe_inputs: Sequence[Any] | None) -> tuple[FunctionSpace, Probes] | None:
    """How to compare draws as functions; None, with the reason in the log, where that is not possible.

    :raises ValueError: if there are ``probe_inputs``, and the model cannot be run on them.
    """
    args = source.args if probe_inputs is None else tuple(probe_inputs)
    if source.model is None or args is None:
        lacking = "model" if source.model is None else "data"
        if probe_inputs is not None:
            raise ValueError("`probe_inputs` are inputs of a model; pass `model=` as well.")
        logger.info("No %s given: distilling in weight space, without comparing what the draws predict.", lacking)
        return None
    example_SD = source.theta_CSD[0, :2]
    args, kwargs = with_features(source.model, args, source.kwargs if probe_inputs is None else {})
    try:
        rows = RowArguments(source.model, args, kwargs)
        probes = Probes(rows.rows, unchanged=probe_inputs is not None)
        return _viewed(rows, source, probes.draw(TrainingBudget.num_probes), example_SD), probes
    except Exception as error:
        logger.info("The model cannot be run on a subset of rows (%s).", error)
        reason = error
    if probe_inputs is not None:
        raise ValueError(f"The model cannot be run on `probe_inputs`: {reason}") from reason
    try:
        whole = _WholeData(source.model, args, kwargs)
        space = _viewed(whole, source, (), example_SD)
        if space.views(example_SD, ())[0].shape[0] <= _MAX_WHOLE_ROWS:
            return space, whole
        reason = ValueError(f"more than {_MAX_WHOLE_ROWS} rows, of which no subset can be taken")
    except Exception as error:
        reason = error
    logger.info("Distilling in weight space, without comparing what the draws predict: %s.", reason)
    return None


class _WholeData(Probes):
    """The data unchanged, for a model that takes no other inputs."""

    has_rows = False

    def __init__(self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.__wrapped__ = model
        self._args, self._kwargs = tuple(args), dict(kwargs)

    def __call__(self) -> Any:
        return self.__wrapped__(*self._args, **self._kwargs)

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """No inputs: the model already has them."""
        return ()

    def groups(self, count: int) -> dict[str, tuple[Tensor, ...]]:
        """See :class:`Probes`."""
        return {"rows": ()}


def _viewed(model: Callable[..., Any], source: Source, inputs: tuple[Tensor, ...], example_SD: Tensor) -> FunctionSpace:
    """The function space of a model, after a trial run with gradients."""
    draws = source.layout.constrain(example_SD)
    kind = outputs(model, draws, *inputs).kind
    space = FunctionSpace(FunctionView(model, draws, *inputs), source.layout, kind, model)
    values = space.views(example_SD.clone().requires_grad_(), inputs)[0]
    if not values.requires_grad or not bool(values.isfinite().all()):
        raise ValueError("function values are not finite, or not differentiable")
    if inputs and _has_outputs_first(space, values.detach(), example_SD, inputs):
        return FunctionSpace(FunctionView(model, draws, *inputs), source.layout, kind, model, outputs_first=True)
    return space


@torch.no_grad()
def _has_outputs_first(
    space: FunctionSpace, values_PSF: Tensor, example_SD: Tensor, inputs: tuple[Tensor, ...]
) -> bool:
    """By what the model says of the first input alone, since shapes may tell nothing."""
    num_inputs = len(inputs[0])
    if len(values_PSF) == num_inputs or len(values_PSF) % num_inputs:
        return False
    first_QSF = space.views(example_SD, tuple(value[:1] for value in inputs))[0]
    error, error_if_first = (
        (first_QSF - like_QSF).abs().max() for like_QSF in (values_PSF[: len(first_QSF)], values_PSF[::num_inputs])
    )
    return bool(error_if_first < error)


def joined(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """Views of all draws from views of blocks of them."""
    return [torch.cat(views, 1) for views in zip(*parts, strict=True)]
