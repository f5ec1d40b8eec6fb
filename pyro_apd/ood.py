# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Out-of-distribution detection by a posterior's uncertainty.

Out-of-distribution data are the positives throughout, and every score is turned so that higher means more unlike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_apd import metrics, uncertainty
from pyro_apd.baselines import DarkKnowledge
from pyro_apd.errors import ModelError
from pyro_apd.predictive.draws import PosteriorLike, draws_between, spread_draws
from pyro_apd.predictive.model_check import check_frozen
from pyro_apd.predictive.predictive import outputs
from pyro_apd.predictive.reductions import reduce_outputs
from pyro_apd.runtime.checks import integer, number
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.seeds import derived_generator, seed_or_fresh
from pyro_apd.runtime.tensor_checks import check_inputs
from pyro_apd.runtime.trees import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["METRICS", "Detection", "Metric", "OutOfDistribution", "evaluate", "rank_metrics"]

#: Names of the metrics: areas under the ROC and the precision-recall curves, and the share of data from inside that are
#: taken for outside where 95 % of those from outside are found.
METRICS = ("auroc", "aupr_out", "aupr_in", "fpr95")

_OF_CLASSES = ("predictive_entropy", "mutual_information", "max_probability", "model_variance")
_OF_MOMENTS = ("variance", "model_variance")
# Scores for which low means unsure.
_CONFIDENCES = frozenset({"max_probability"})
_FOUND = 0.95
# Entries of the table of resampled counts that are worked on together.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Metric:
    """A metric and its bootstrap interval.

    :ivar float value: of the data as they are.
    :ivar float low: lower end of the interval; NaN without a bootstrap.
    :ivar float high: upper end.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.low != self.low else f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Detection:
    """How well one score finds one set.

    :ivar str out: name of the set.
    :ivar str score: name of the score, of :mod:`pyro_apd.uncertainty`.
    :ivar dict metrics: by name of :data:`METRICS`.
    :ivar int num_in: data from inside; ``num_out`` from outside. The chance level of AUPR is their share.
    """

    out: str
    score: str
    metrics: dict[str, Metric]
    num_in: int
    num_out: int


@dataclass(frozen=True)
class OutOfDistribution:
    """What :func:`evaluate` found; prints as a table.

    :ivar list detections: one for each set and score.
    :ivar dict scores_in: scores of the data from inside, ``(N,)`` by name, as computed.
    :ivar dict scores_out: those of each set, by name of the set.
    :ivar float confidence: of the intervals.
    """

    detections: list[Detection]
    scores_in: dict[str, Tensor] = field(repr=False)
    scores_out: dict[str, dict[str, Tensor]] = field(repr=False)
    confidence: float = 0.95

    def __getitem__(self, key: tuple[str, str]) -> Detection:
        """Of a set and a score, by their names."""
        for detection in self.detections:
            if (detection.out, detection.score) == tuple(key):
                return detection
        known = [(detection.out, detection.score) for detection in self.detections]
        raise KeyError(f"There is nothing for {key!r}; there are {known}.")

    def records(self) -> list[dict[str, Any]]:
        """One flat dict per set, score and metric, with plain values, as a table of pandas takes it."""
        return [
            {
                "out": detection.out,
                "score": detection.score,
                "metric": metric,
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "num_in": detection.num_in,
                "num_out": detection.num_out,
            }
            for detection in self.detections
            for metric, found in detection.metrics.items()
        ]

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Values by set, score and metric, without intervals."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for detection in self.detections:
            values = {metric: found.value for metric, found in detection.metrics.items()}
            table.setdefault(detection.out, {})[detection.score] = values
        return table

    def __str__(self) -> str:
        header = ["out", "score", *METRICS]
        rows = [[d.out, d.score, *(str(d.metrics[metric]) for metric in METRICS)] for d in self.detections]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        title = "  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip()
        return "\n".join([title, "-" * len(title), *lines])


def evaluate(
    model: Callable[..., Any],
    posterior: PosteriorLike | DarkKnowledge,
    in_data: Any,
    out_data: Any,
    scores: Collection[str] | str | None = None,
    *,
    num_samples: int = 100,
    num_bootstrap: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
    chunk_size: int | None = None,
) -> OutOfDistribution:
    """Scores data from inside and outside under a posterior, and says how well the scores tell them apart.

    :param callable model: a Pyro model with one observed site.
    :param posterior: an ``MCMC`` after ``run``, of which draws evenly spaced in time are taken; draws by site
        ``(S, ...)``, all of which are; a :class:`~pyro_apd.DistilledPosterior`, from :func:`~pyro_apd.distill` or
        :mod:`~pyro_apd.baselines`; or what :func:`~pyro_apd.baselines.dark_knowledge` gives.
    :param in_data: inputs that the model was not trained on but is meant for: a tensor, or the tuple of the model's
        arguments without targets.
    :param out_data: inputs unlike these, likewise, or several sets of them by name.
    :param scores: names of scores. For a classification those of :mod:`pyro_apd.uncertainty` (default: entropy, mutual
        information, largest probability, model variance), for a regression ``variance``, ``expected_variance`` and
        ``model_variance`` (default: the first and last).
    :param int num_samples: draws of an ``MCMC`` or generator.
    :param int num_bootstrap: resamplings of the data, inside and outside apart; 0 for no intervals.
    :param float confidence: of the percentile intervals. They tell how far the metrics depend on which data are there,
        not on which draws.
    :param int seed: of draws and bootstrap, without touching the global generator.
    :param int chunk_size: draws evaluated together; None chooses it by memory.
    :raises ValueError: if a number is out of range, a name is not known, a set is empty, or a score is NaN.
    :raises TypeError: if ``posterior`` is none of the above.
    :raises ModelError: if the model has not one observed site with probabilities or a mean and variance.
    :raises ArtifactError: if the model has other frozen weights than the one that was sampled.
    """
    num_samples = integer("num_samples", num_samples)
    num_bootstrap = integer("num_bootstrap", num_bootstrap, at_least=0, hint="0 gives no intervals.")
    confidence = number("confidence", confidence, above=0, below=1)
    seed = seed_or_fresh(seed)
    inside, sets = _arguments(in_data, "in_data"), _named_sets(out_data)
    device = next(value for value in tree_leaves(inside) if isinstance(value, Tensor)).device
    with preserved_param_store(), torch.no_grad(), seeded(seed, device):  # running a model draws from its prior
        score = _scorer(model, posterior, scores, inside, num_samples, seed, chunk_size)
        scores_in = score(inside)
        scores_out = {name: score(args) for name, args in sets.items()}
    generator = derived_generator(seed, "bootstrap")
    detections = []
    for out, found in scores_out.items():
        for name, value_N in found.items():
            sign = -1.0 if name in _CONFIDENCES else 1.0
            by_name = _metrics(sign * scores_in[name], sign * value_N, num_bootstrap, confidence, generator)
            detections.append(Detection(out, name, by_name, scores_in[name].numel(), value_N.numel()))
    return OutOfDistribution(detections, scores_in, scores_out, confidence)


def rank_metrics(scores_in: Tensor, scores_out: Tensor) -> dict[str, float]:
    """The metrics of :data:`METRICS`, of scores that are higher outside.

    :param Tensor scores_in: any shape; ``scores_out`` likewise.
    :raises ValueError: if either is empty or holds NaN.
    """
    return {name: float(value) for name, value in _of_ranks(metrics.RankedScores(scores_in, scores_out)).items()}


def _of_ranks(ranked: metrics.RankedScores) -> dict[str, Tensor]:
    """Each ``(B,)``."""
    return {
        "auroc": ranked.auroc(),
        "aupr_out": ranked.average_precision_out(),
        "aupr_in": ranked.average_precision_in(),
        "fpr95": ranked.false_positive_rate(_FOUND),
    }


def _metrics(
    inside: Tensor, outside: Tensor, num_bootstrap: int, confidence: float, generator: torch.Generator
) -> dict[str, Metric]:
    values = rank_metrics(inside, outside)
    if not num_bootstrap:
        return {name: Metric(value) for name, value in values.items()}
    resampled = _resampled(inside.flatten(), outside.flatten(), num_bootstrap, generator)
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    bounds = {name: resampled[name].cpu().quantile(levels).tolist() for name in values}
    return {name: Metric(value, *bounds[name]) for name, value in values.items()}


def _resampled(inside_N: Tensor, outside_M: Tensor, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Metrics ``(B,)`` of resampled data: a datum drawn k times counts k times."""
    parts = []
    per_chunk = max(1, _CHUNK // (len(inside_N) + len(outside_M)))
    for start in range(0, count, per_chunk):
        num = min(per_chunk, count - start)
        counts = [_counts(num, len(part), generator) for part in (inside_N, outside_M)]
        parts.append(_of_ranks(metrics.RankedScores(inside_N, outside_M, *counts)))
    return {name: torch.cat([part[name] for part in parts]) for name in METRICS}


def _counts(num: int, num_data: int, generator: torch.Generator) -> Tensor:
    """How often each datum is drawn, ``(B, N)``."""
    drawn = torch.randint(num_data, (num, num_data), generator=generator)
    return torch.zeros(num, num_data, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _scorer(
    model: Callable[..., Any],
    posterior: PosteriorLike | DarkKnowledge,
    scores: Collection[str] | str | None,
    inside: tuple[Any, ...],
    num_samples: int,
    seed: int,
    chunk_size: int | None,
) -> Callable[[tuple[Any, ...]], dict[str, Tensor]]:
    """From arguments of the model to scores by name."""
    if scores is not None and (not isinstance(scores, Collection) or not all(isinstance(s, str) for s in scores)):
        raise ValueError(f"`scores` must be names of scores, or None for the usual ones; got {scores!r:.80}.")
    wanted = (scores,) if isinstance(scores, str) else None if scores is None else tuple(scores)
    if isinstance(posterior, DarkKnowledge):
        return lambda args: _student_scores(posterior, wanted, args)
    draws = spread_draws(posterior, num_samples, seed=seed)
    check_frozen(posterior, model, draws, _head(inside), {})
    if wanted is None:
        kind = outputs(model, draws_between(draws, 0, 1), *_head(inside)).kind
        wanted = _OF_CLASSES if kind in ("categorical", "bernoulli") else _OF_MOMENTS
    of_classes = {"mean_probability", "mean"} & set(wanted)
    if of_classes:
        raise ValueError(f"`scores` must be uncertainties; {sorted(of_classes)} are predictions.")
    names = wanted
    return lambda args: reduce_outputs(model, draws, *args, names=names, chunk_size=chunk_size)


def _student_scores(student: DarkKnowledge, wanted: tuple[str, ...] | None, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """A student has one prediction: what it is unsure about, but nothing that draws could disagree on."""
    if student.kind == "normal":
        raise ModelError("A student of a regression gives a variance as it is; scores are for classifications.")
    names = wanted or ("predictive_entropy", "max_probability")
    known = ("predictive_entropy", "max_probability")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"`scores` of a student must be some of {list(known)}: it has one prediction; got {unknown}.")
    probs_1NK = student(*args).unsqueeze(0)
    return {name: getattr(uncertainty, name)(probs_1NK) for name in names}


def _head(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first rows, enough to see what a model predicts."""
    leaves, spec = tree_flatten(args)
    num_rows = len(next(value for value in leaves if isinstance(value, Tensor)))
    few = [v[:2] if isinstance(v, Tensor) and v.dim() and len(v) == num_rows else v for v in leaves]
    found: tuple[Any, ...] = tree_unflatten(few, spec)
    return found


def _named_sets(out_data: Any) -> dict[str, tuple[Any, ...]]:
    sets = dict(out_data) if isinstance(out_data, Mapping) else {"out": out_data}
    if not sets:
        raise ValueError("`out_data` holds no sets; give a tensor, or a dict of them by name.")
    return {str(name): _arguments(value, f"out_data[{name!r}]") for name, value in sets.items()}


def _arguments(data: Any, name: str) -> tuple[Any, ...]:
    args: Sequence[Any] = data if isinstance(data, tuple) else (data,)
    tensors = [value for value in tree_leaves(tuple(args)) if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors or len(tensors[0]) == 0:
        what = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(
            f"`{name}` must be a tensor of inputs (N, ...) with at least one row, or the tuple of the model's "
            f"arguments without targets; got {what}."
        )
    for value in tensors:
        check_inputs(f"`{name}`", value, is_real=False)
    return tuple(args)
