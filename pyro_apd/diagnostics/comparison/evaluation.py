# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions of a set of draws on some inputs, and the metrics that summarise them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd import metrics, uncertainty
from pyro_apd.data.loader import is_loader
from pyro_apd.data.sources import shown_arguments
from pyro_apd.diagnostics.draws import flat
from pyro_apd.predictive import predictive
from pyro_apd.predictive.draws import Values, kernel_of, run_arguments
from pyro_apd.predictive.model_check import check_frozen
from pyro_apd.runtime.tensor_checks import is_dense, shape_of
from pyro_apd.runtime.trees import tree_leaves

# Quantiles over weights of the ratio of standard deviations.
_SD_QUANTILES = (5, 50, 95)


@dataclass(frozen=True)
class Inputs:
    """What draws are evaluated on.

    :ivar tuple args: arguments of the model without targets.
    :ivar dict kwargs: keyword arguments of the model.
    :ivar labelled: arguments of the model with targets; None where these are unknown.
    :ivar targets: the targets, one per datum; None where unknown.
    :ivar ood: arguments of the model by name of an out-of-distribution set.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labelled: tuple[Any, ...] | None
    targets: Tensor | None
    ood: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Evaluation:
    """Predictions of ``S`` draws, before they are averaged.

    :ivar theta_SD: the draws themselves, constrained values side by side.
    :ivar kind: ``classes``, ``numbers`` (regression) or ``weights`` (no function values).
    :ivar values: of classes ``{"": probs_SNK}``; of numbers ``{"": (2, S, N)}``, means and variances. Other keys are
        the out-of-distribution sets.
    :ivar log_prob_SN: log-likelihood of the targets.
    :ivar targets: the targets, ``(N,)``.
    """

    theta_SD: Tensor
    kind: str
    values: Mapping[str, Tensor]
    log_prob_SN: Tensor | None = None
    targets: Tensor | None = None

    @property
    def num_draws(self) -> int:
        """Draws, ``S``."""
        return self.theta_SD.shape[0]

    def take(self, index: Sequence[int]) -> Evaluation:
        """The same of some of the draws."""
        i = torch.as_tensor(index, dtype=torch.long, device=self.theta_SD.device)
        return replace(
            self,
            theta_SD=self.theta_SD[i],
            values={k: v[i] if self.kind == "classes" else v[:, i] for k, v in self.values.items()},
            log_prob_SN=None if self.log_prob_SN is None else self.log_prob_SN[i],
        )

    def scores(self, which: str = "") -> dict[str, Tensor]:
        """Total and epistemic uncertainty of each datum of a set, ``(N,)``."""
        if self.kind == "classes":
            probs = self.values[which]
            total, model = uncertainty.predictive_entropy(probs), uncertainty.mutual_information(probs)
            return {"entropy": total, "mi": _without_rounding(model, 1.0)}
        mean_SN, variance_SN = self.values[which]
        epistemic = (mean_SN - mean_SN.mean(0)).square().mean(0)
        total = variance_SN.mean(0) + epistemic
        return {"sd": total.sqrt(), "epistemic": _without_rounding(epistemic, mean_SN.square().mean(0) + total)}

    def mean(self) -> Tensor:
        """Averaged prediction: probabilities ``(N, K)`` or numbers ``(N,)``."""
        return self.values[""].mean(0) if self.kind == "classes" else self.values[""][0].mean(0)

    def total_variance(self) -> Tensor:
        """Variance of the prediction over draws, unbiased, summed over all inputs and outputs."""
        values = self.values[""] if self.kind == "classes" else self.values[""][0]
        return values.var(0).sum()

    def metrics(self) -> dict[str, float]:
        """All metrics of these draws alone."""
        if self.kind == "weights":
            return {}
        found: dict[str, float] = {}
        if self.kind == "classes" and self.targets is not None:
            probs, mean = self.values[""], self.mean()
            found["accuracy"] = metrics.accuracy(mean, self.targets)
            found["one_draw_accuracy"] = float((probs.argmax(-1) == self.targets).double().mean())
        if self.kind == "numbers" and self.targets is not None:
            found["rmse"] = float((self.mean() - self.targets).square().mean().sqrt())
        if self.log_prob_SN is not None:
            averaged = self.log_prob_SN.double().logsumexp(0) - math.log(self.num_draws)
            found["nll"] = float(-averaged.mean())
        if self.kind == "classes" and self.targets is not None:
            found["ece"] = metrics.expected_calibration_error(mean, self.targets)
        inside = self.scores()
        found |= {f"mean_{name}": float(score.double().mean()) for name, score in inside.items()}
        for which in self.values:
            if which:
                outside = self.scores(which)
                model = list(outside)[-1]
                found[f"mean_{model}[{which}]"] = float(outside[model].double().mean())
                found |= {f"auroc_{n}[{which}]": metrics.auroc(inside[n], s) for n, s in outside.items()}
        return found


def similarities(reference: Evaluation, other: Evaluation) -> dict[str, float]:
    """How similar two sets of draws are: metrics of the pair.

    Agreement (share of data given the same class) and total variation (half the L1 distance of averaged predictions,
    mean over data) as in Izmailov et al. 2021, section 6; correlation over data of the uncertainty of the model; and
    5, 50 and 95 % quantiles over weights of sd(other) / sd(reference).
    """
    found: dict[str, float] = {}
    scores = {} if reference.kind == "weights" else reference.scores()
    if scores:
        name = list(scores)[-1]
        found[f"{name}_correlation"] = _correlation(scores[name], other.scores()[name])
    if reference.kind == "classes":
        first, second = reference.mean(), other.mean()
        found["agreement"] = float((first.argmax(-1) == second.argmax(-1)).double().mean())
        found["total_variation"] = float((first - second).abs().sum(-1).double().mean() / 2)
    elif reference.kind == "numbers":
        shift = (reference.mean() - other.mean()).abs() / scores["sd"]
        found["mean_shift"] = float(shift.double().mean())
    if min(reference.num_draws, other.num_draws) < 2:
        return found
    reference_sd, other_sd = reference.theta_SD.std(0), other.theta_SD.std(0)
    moving = reference_sd > 0
    if bool(moving.any()):
        ratio = (other_sd[moving] / reference_sd[moving]).double().sort().values
        # A sort instead of torch.quantile, which takes at most 16 million entries.
        positions = [round(q / 100 * (len(ratio) - 1)) for q in _SD_QUANTILES]
        found |= {f"weight_sd_ratio_{q}": float(ratio[i]) for q, i in zip(_SD_QUANTILES, positions, strict=True)}
    return found


def model_of(mcmc: object, model: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """``model`` where it is given, else that of the kernel, if there is one.

    :raises ValueError: if it cannot be called.
    """
    if model is not None and not callable(model):
        raise ValueError(f"`model` must be a Pyro model, which is called with `x`; got {shape_of(model)}.")
    return model if model is not None else getattr(kernel_of(mcmc), "model", None)


def find_inputs(
    mcmc: object, model: Callable[..., Any] | None, x: Any, y: Tensor | None, ood: Mapping[str, Any] | None
) -> tuple[Inputs | None, list[str]]:
    """Inputs to evaluate on: ``x``, ``y`` and ``ood``, else the arguments of ``mcmc.run``; and remarks for the reader.

    :raises ValueError: if targets or sets come without inputs, or inputs without a model.
    """

    def as_args(value: Any, argument: str = "x") -> tuple[Any, ...]:
        args = value if isinstance(value, tuple) else (value,)
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if not tensors or any(not is_dense(tensor) or tensor.numel() == 0 for tensor in tensors):
            raise ValueError(
                f"`{argument}` must be a tensor of inputs with at least one row, or the tuple of the model's "
                f"arguments; got {shape_of(value)}. Use torch.as_tensor(...) of an array."
            )
        return args

    def without_targets(model: Callable[..., Any], value: Any, argument: str) -> tuple[Any, ...]:
        args = as_args(value, argument)
        try:
            inspect.signature(getattr(model, "forward", None) or model).bind(*args)
        except TypeError:
            return (*args, None)  # a model that requires targets is given None
        return args

    if ood is not None and not isinstance(ood, Mapping):
        raise ValueError(f"`ood` must be a dict of inputs by the name of their set; got {shape_of(ood)}.")
    if y is not None and not is_dense(y):
        raise ValueError(f"`y` must be a tensor of targets, one per datum; got {shape_of(y)}.")
    if x is None and (y is not None or ood):
        raise ValueError("`y` and `ood` need `x`, the inputs that they are compared on; got none.")
    if x is not None:
        if model is None:
            raise ValueError("`x` was given but no model: pass `model`, since a dict of draws knows none.")
        labelled = None if y is None else (*as_args(x), y)
        sets = {name: without_targets(model, value, f"ood[{name!r}]") for name, value in (ood or {}).items()}
        return Inputs(without_targets(model, x, "x"), {}, labelled, y, sets), []
    given = run_arguments(mcmc)
    num_data = getattr(kernel_of(mcmc), "num_data", None)
    if model is not None and given is not None and not is_loader(given[0], num_data):
        args, kwargs, has_all_data = shown_arguments(*given, num_data)
        if has_all_data:
            note = "Compared on the data that the chain was conditioned on; held-out inputs say more."
            return Inputs(args, kwargs, args, None, {}), [note]
    return None, ["Weights alone were compared, which are unidentified: pass `x` (and a model) for predictions."]


def check_sampled_model(
    sources: Sequence[object], model: Callable[..., Any] | None, draws: Values, inputs: Inputs | None
) -> None:
    """Refuses a model with other frozen weights than the one that any of ``sources`` is of.

    :raises ArtifactError: if it has.
    """
    if model is not None and inputs is not None:
        for source in sources:
            check_frozen(source, model, draws, inputs.args, inputs.kwargs)


def evaluate(
    model: Callable[..., Any] | None, draws: Values, names: Sequence[str], inputs: Inputs | None
) -> Evaluation:
    """Runs the model under all draws on all inputs.

    :raises ValueError: if targets are not one per datum.
    """
    theta_SD = flat(draws, names)
    if model is None or inputs is None:
        return Evaluation(theta_SD, "weights", {})
    kind, values = _values(model, draws, inputs.args, inputs.kwargs)
    if kind == "weights":
        return Evaluation(theta_SD, kind, {})
    sets = {name: _values(model, draws, args, inputs.kwargs)[1] for name, args in inputs.ood.items()}
    targets, log_prob_SN = _targets(inputs.targets, kind, values), None
    if inputs.labelled is not None:
        log_prob_SN = predictive.log_likelihood(model, draws, *inputs.labelled, **inputs.kwargs).flatten(1)
    return Evaluation(theta_SD, kind, {"": values, **sets}, log_prob_SN, targets)


def _targets(targets: Tensor | None, kind: str, values: Tensor) -> Tensor | None:
    """One target a datum: a class, or a number."""
    if targets is None:
        return None
    if kind == "classes" and targets.dim() == 2 and targets.shape == values.shape[1:]:
        targets = targets.argmax(-1)  # of a one-hot likelihood
    num_data = values.shape[1] if kind == "classes" else values.shape[2]
    if targets.numel() != num_data:
        raise ValueError(
            f"`y` has {targets.numel()} entries, but the model predicts {num_data} on `x`; it takes one target a datum."
        )
    return targets.reshape(-1).to(values.device)


def _values(
    model: Callable[..., Any], draws: Values, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Tensor]:
    out = predictive.outputs(model, draws, *args, **kwargs)
    if out.probs_SNK is not None:
        return "classes", out.probs_SNK
    if out.mean_SN is not None and out.variance_SN is not None:
        return "numbers", torch.stack([out.mean_SN, out.variance_SN])
    return "weights", torch.empty(0)


def _without_rounding(score_N: Tensor, scale: Tensor | float) -> Tensor:
    """Zero where a score is no larger than rounding errors of equal draws, by which data must not be ranked.

    Equal networks need not predict equally, since the rounding of matrix products depends on the position in a batch.
    """
    return torch.where(score_N > torch.finfo(score_N.dtype).eps ** 1.5 * scale, score_N, 0.0)


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; zero if the second alone is constant (a collapsed generator), NaN if the first is."""
    if bool((first == first[0]).all()):
        return math.nan
    correlation = float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])
    return 0.0 if math.isnan(correlation) else correlation
