# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Accuracy of a posterior under attack, and detection of attacks by its uncertainty.

A metric of detection means nothing without its attack: against an attacker who knows one network only, uncertainty
detects much that it does not detect of one who takes the posterior into account (Feng, Rudner, Tsilivis and Kempe,
*Attacking Bayes*, 2024). So both stand side by side, and attacks that succeeded apart from all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pyro_apd import metrics, uncertainty
from pyro_apd.adversarial.attacks import Attack, Bounds, attack, checked_bounds, checked_data, not_classification
from pyro_apd.predictive.draws import PosteriorLike, take_draws
from pyro_apd.predictive.model_check import check_frozen
from pyro_apd.predictive.predictive import outputs
from pyro_apd.runtime.checks import integer
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.seeds import derived_seed, seed_or_fresh
from pyro_apd.runtime.tensor_checks import checked_labels

#: Scores that an attacked input is to be told by, and their names in tables.
SCORES = {
    "predictive_entropy": "entropy",
    "mutual_information": "MI",
    "model_variance": "variance",
}
_KNOWN_SCORES = (*SCORES, "expected_entropy", "max_probability", "variation_ratio")


@dataclass(frozen=True)
class Row:
    """One attack.

    :ivar str name: what was done, and through what.
    :ivar float epsilon: the largest change allowed, in the units of the inputs.
    :ivar float distance: mean over inputs of the largest change made.
    :ivar float robust_accuracy: of the averaged prediction on the attacked inputs.
    :ivar float success_rate: share of the inputs classified correctly before that no longer are; NaN where none were.
    :ivar int num_successes: how many these are.
    :ivar dict auroc: by score, the probability that an attacked input scores above a clean one.
    :ivar dict auroc_successes: the same between the inputs classified correctly, and those of them on which the attack
        succeeded; NaN where there are none.
    """

    name: str
    epsilon: float
    distance: float
    robust_accuracy: float
    success_rate: float
    num_successes: int
    auroc: dict[str, float]
    auroc_successes: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Attacks on one posterior. Printed, it is a table.

    :ivar float clean_accuracy: of the averaged prediction without an attack.
    :ivar int num_data: inputs.
    :ivar int num_draws: networks that predict and score; fresh ones, which the attacker has not seen, of a generator.
    :ivar tuple bounds: of the inputs' entries.
    :ivar bool is_transfer: whether the attacks were made on another posterior.
    :ivar tuple rows: :class:`Row` by attack.
    """

    clean_accuracy: float
    num_data: int
    num_draws: int
    bounds: Bounds
    is_transfer: bool
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; metrics that do not exist are None."""
        content: dict[str, Any] = _without_nan(asdict(self))
        return content

    def __str__(self) -> str:
        span = self.bounds[1] - self.bounds[0]
        names = [SCORES.get(name, name) for name in (self.rows[0].auroc if self.rows else {})]
        width = max([10, *(len(row.name) for row in self.rows)])
        head = f"{'attack':{width}}  epsilon   of range  distance  robust  success  "
        head += "  ".join(f"{f'AUROC {name}, all / successes':>32}" for name in names)
        lines = [
            f"accuracy {self.clean_accuracy:.4f} on {self.num_data} inputs in {self.bounds}, {self.num_draws} draws"
            + (", attacks made on another posterior" if self.is_transfer else ""),
            head,
        ]
        for row in self.rows:
            cells = [f"{row.auroc[n]:.3f} / {row.auroc_successes[n]:.3f}" for n in row.auroc]
            lines.append(
                f"{row.name:{width}}  {row.epsilon:7.4g}  {row.epsilon / span:8.1%}  {row.distance:8.4f}  "
                f"{row.robust_accuracy:6.4f}  {row.success_rate:7.4f}  " + "  ".join(f"{cell:>32}" for cell in cells)
            )
        return "\n".join(lines)


def evaluate(
    model: Callable[..., Any],
    posterior: PosteriorLike,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack] | Mapping[str, Attack],
    *,
    bounds: Bounds,
    source: PosteriorLike | None = None,
    source_model: Callable[..., Any] | None = None,
    scores: Sequence[str] = tuple(SCORES),
    num_draws: int = 100,
    seed: int = 0,
    batch_size: int = 500,
) -> Evaluation:
    """Accuracy under attacks, and how well scores tell attacked inputs from clean ones.

    :param callable model: a Pyro model of a classification, called as ``model(x)``.
    :param posterior: the one that predicts: draws ``(S, ...)`` by site, or an object with ``get_samples(num_samples)``.
    :param torch.Tensor x: clean inputs ``(N, ...)``.
    :param torch.Tensor y: their classes ``(N,)``.
    :param attacks: what to try; a mapping gives them names.
    :param tuple bounds: least and greatest value that an entry of an input can take.
    :param source: the posterior that attacks are made on, where it is not the one that predicts (*transfer*).
    :param callable source_model: the model of ``source``, where it is another.
    :param scores: names of functions of :mod:`pyro_apd.uncertainty` that score class probabilities.
    :param int num_draws: networks that predict and score.
    :param int seed: makes it reproducible; the global generators stay as they are.
    :param int batch_size: inputs attacked together.
    :raises ImportError: if foolbox is not installed.
    :raises ValueError: if inputs are out of bounds, classes are none, sizes disagree, or a score is not known.
    :raises ModelError: if the model's observed site is no classification.
    :raises ArtifactError: if a model has other frozen weights than the one that was sampled.
    """
    is_listed = isinstance(scores, Sequence) and not isinstance(scores, str)
    if not is_listed or not scores or not all(name in _KNOWN_SCORES for name in scores):
        raise ValueError(f"`scores` must be a list of names from {list(_KNOWN_SCORES)}; got {scores!r:.80}.")
    named = _named(attacks)
    bounds = checked_bounds(bounds, max((how.epsilon for how in named.values()), default=0.0))
    x, y = checked_data(x, y, bounds)
    num_draws = integer("num_draws", num_draws)
    seed = seed_or_fresh(seed)
    with seeded(seed, x.device):
        # Of stored draws a random choice. The attacker has other seeds, and so another choice.
        draws = take_draws(posterior, num_draws, derived_seed(seed, "predict"), x.device)
        check_frozen(posterior, model, draws, (x[:1],), {})
        clean = _Judged(model, draws, x, y, scores)
        rows = []
        for number, (name, how) in enumerate(named.items()):
            attacked = attack(
                source_model or model,
                posterior if source is None else source,
                x,
                y,
                how,
                bounds=bounds,
                seed=derived_seed(seed, "attack", number),
                batch_size=batch_size,
            )
            judged = _Judged(model, draws, attacked.x, y, scores)
            rows.append(_row(name, how, float(attacked.distance_N.mean()), clean, judged))
    count = len(next(iter(draws.values())))
    return Evaluation(clean.accuracy, len(x), count, (bounds[0], bounds[1]), source is not None, tuple(rows))


def _named(attacks: Sequence[Attack] | Mapping[str, Attack]) -> dict[str, Attack]:
    values = (
        attacks.values() if isinstance(attacks, Mapping) else attacks if isinstance(attacks, (list, tuple)) else None
    )
    if values is None or not all(isinstance(how, Attack) for how in values):
        raise ValueError(
            f"`attacks` must be a list of Attack, or a mapping of them by name; got {attacks!r:.80}. One is "
            "[Attack('pgd', epsilon=0.1)]."
        )
    named = dict(attacks) if isinstance(attacks, Mapping) else {how.name: how for how in attacks}
    if len(named) < len(attacks):
        raise ValueError("Two of `attacks` have the same name; give a mapping from names of your own to attacks.")
    return named


class _Judged:
    """Whether each prediction is right, and how unsure it is."""

    def __init__(
        self, model: Callable[..., Any], draws: Mapping[str, Tensor], x: Tensor, y: Tensor, scores: Sequence[str]
    ) -> None:
        found = outputs(model, draws, x)
        probs_SNK = found.probs_SNK
        if probs_SNK is None:
            raise not_classification(found.kind)
        checked_labels("`y`", y, len(x), probs_SNK.shape[-1])
        self.is_right_N = probs_SNK.mean(0).argmax(-1) == y
        self.accuracy = float(self.is_right_N.double().mean())
        # Confidence is high where a prediction is sure.
        signs = {name: -1.0 if name == "max_probability" else 1.0 for name in scores}
        self.scores = {name: sign * getattr(uncertainty, name)(probs_SNK) for name, sign in signs.items()}


def _row(name: str, how: Attack, distance: float, clean: _Judged, judged: _Judged) -> Row:
    is_success_N = clean.is_right_N & ~judged.is_right_N
    num_right, num_successes = int(clean.is_right_N.sum()), int(is_success_N.sum())
    return Row(
        name=name,
        epsilon=float(how.epsilon),
        distance=distance,
        robust_accuracy=judged.accuracy,
        success_rate=num_successes / num_right if num_right else math.nan,
        num_successes=num_successes,
        auroc={score: metrics.auroc(clean.scores[score], judged.scores[score]) for score in clean.scores},
        auroc_successes={
            score: metrics.auroc(clean.scores[score][clean.is_right_N], judged.scores[score][is_success_N])
            if num_successes
            else math.nan
            for score in clean.scores
        },
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
