# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The verdict in words: label of each metric, its direction of loss, and what a difference means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

INDISTINGUISHABLE = "indistinguishable at this chain's resolution"
POORLY_MIXED = "chain too poorly mixed to tell"
TOO_FEW = "too few independent draws to tell"
NO_PREDICTIONS = (
    "Predictions were not compared, and weights of a network are not identified: give the model and inputs x."
)

#: With a larger share of the variance between half-chains there is no reference to compare with.
POORLY_MIXED_SHARE = 0.5
# A metric decides nothing where its resolution exceeds half of its value (a quarter, where it lies between 0 and 1).
_COARSE_RELATIVE, _COARSE_ABSOLUTE = 0.5, 0.25
# The metric that a collapsed generator cannot pass. Without it there is no verdict; others may stay unresolved.
_KEY_METRICS = ("disagreement",)


@dataclass(frozen=True)
class Metric:
    """Label and direction of a metric.

    :ivar str label: its name in print.
    :ivar str worse: the direction of loss: ``lower``, ``higher``, or ``either`` where only the chain's value is right.
    :ivar bool relative: whether differences are stated in per cent of the chain's value; else as they are.
    """

    label: str
    worse: str
    relative: bool


METRICS = {
    "accuracy": Metric("accuracy", "lower", False),
    "one_draw_accuracy": Metric("accuracy of one draw", "lower", False),
    "rmse": Metric("RMSE", "higher", True),
    "nll": Metric("NLL (nats)", "higher", True),
    "ece": Metric("ECE", "higher", False),
    "mean_entropy": Metric("mean entropy (nats)", "either", True),
    "mean_mi": Metric("mean MI (nats)", "either", True),
    "mean_sd": Metric("mean predictive sd", "either", True),
    "mean_epistemic": Metric("mean epistemic variance", "either", True),
    "disagreement": Metric("distance between two draws", "either", True),
    "spread": Metric("spread in main directions", "either", True),
    "energy": Metric("energy distance from the chain", "higher", False),
    "new_draws": Metric("draws that copy no other", "lower", False),
    "mi_correlation": Metric("correlation of MI by input", "lower", False),
    "epistemic_correlation": Metric("correlation of epistemic variance by input", "lower", False),
    "agreement": Metric("agreement with the chain", "lower", False),
    "total_variation": Metric("total variation from the chain", "higher", False),
    "mean_shift": Metric("shift from the chain (predictive sd)", "higher", False),
    "auroc_entropy": Metric("AUROC by entropy", "lower", False),
    "auroc_mi": Metric("AUROC by MI", "lower", False),
    "auroc_sd": Metric("AUROC by predictive sd", "lower", False),
    "auroc_epistemic": Metric("AUROC by epistemic variance", "lower", False),
    "weight_sd_ratio_5": Metric("weight sd ratio, 5 %", "either", False),
    "weight_sd_ratio_50": Metric("weight sd ratio, 50 %", "either", False),
    "weight_sd_ratio_95": Metric("weight sd ratio, 95 %", "either", False),
}


def lookup(name: str) -> Metric:
    """The metric of a row called ``name`` or ``name[set]``."""
    return METRICS[name.partition("[")[0]]


@dataclass(frozen=True)
class Row:
    """One metric of a comparison.

    :ivar str name: ``accuracy``, ``mean_mi[noise]``, ...
    :ivar str label: the same in print.
    :ivar str group: ``function space``, ``out of distribution: noise``, ``memory`` or ``weight space``.
    :ivar float chain: the chain's own value; of a similarity, that between two halves of the chain.
    :ivar float generator: the generator's.
    :ivar float stored: that of stored draws of the same bytes; NaN where not even one fits.
    :ivar float resolution: differences up to this are within the Monte-Carlo error of chain and generator.
    :ivar str status: ``indistinguishable``, ``loses``, ``departs`` (not for the worse) or ``unclear``.
    :ivar str verdict: the same in words.
    :ivar dict baselines: those of other draws, by the names that :func:`~pyro_apd.diagnostics.compare` was given.
    """

    name: str
    label: str
    group: str
    chain: float
    generator: float
    stored: float
    resolution: float
    status: str
    verdict: str
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def severity(self) -> float:
        """The difference in units of the resolution."""
        difference = abs(self.generator - self.chain)
        return difference / self.resolution if self.resolution > 0 else math.copysign(math.inf, difference)


def judge(name: str, chain: float, generator: float, resolution: float, poorly_mixed: bool) -> tuple[str, str]:
    """Status and verdict of one metric."""
    metric = lookup(name)
    if not (math.isfinite(chain) and math.isfinite(resolution)):
        return "unclear", "not defined for this chain"
    coarse = resolution > (_COARSE_RELATIVE * abs(chain) if metric.relative else _COARSE_ABSOLUTE)
    difference = generator - chain
    if abs(difference) <= resolution:
        if poorly_mixed or coarse:
            return "unclear", POORLY_MIXED if poorly_mixed else TOO_FEW
        return "indistinguishable", INDISTINGUISHABLE
    status, words = _difference(metric, chain, generator)
    if poorly_mixed:
        return "unclear", f"{POORLY_MIXED} ({words} against these draws)"
    return status, words


def _difference(metric: Metric, chain: float, generator: float) -> tuple[str, str]:
    difference = generator - chain
    if not math.isfinite(difference):
        return "loses", f"loses: {generator} for the generator"
    if metric.relative and chain != 0:
        size = f"{abs(difference / chain):.0%}" if abs(difference / chain) >= 0.1 else f"{abs(difference / chain):.1%}"
    else:
        size = f"{abs(difference):.2g}"
    if metric.worse == "either":
        return "loses", f"loses {size}" if difference < 0 else f"overstates by {size}"
    if (difference < 0) == (metric.worse == "lower"):
        return "loses", f"loses {size}"
    return "departs", f"departs by {size}, to the better"


def overall(rows: Sequence[Row], mixing: float, spread: bool, doubts: Sequence[str] = ()) -> tuple[str, str]:
    """Status and verdict of a comparison. Function space decides. Weights alone can show a loss, and not that there is
    none.

    :param mixing: share of the predictive variance between half-chains; NaN where unknown.
    :param spread: whether the chain's draws differ at all.
    :param doubts: sentences that say why the chain is no good reference, or the generator not good; with them there is
        no verdict without a loss.
    """
    deciding = [row for row in rows if row.group != "weight space"]
    if all(row.group == "memory" for row in deciding):
        deciding = list(rows)
        doubts = [*doubts, NO_PREDICTIONS]
    status, words = _undoubted(deciding, mixing, spread)
    if not doubts or status in ("loses", "unclear"):
        return status, words
    return "unclear", f"{' '.join(doubts)} Apart from that: {words}"


def _undoubted(deciding: Sequence[Row], mixing: float, spread: bool) -> tuple[str, str]:
    by_status: dict[str, list[Row]] = {}
    for row in sorted(deciding, key=lambda row: (_named_after(row.name), -row.severity)):
        by_status.setdefault(row.status, []).append(row)
    if not spread:
        return "unclear", f"{POORLY_MIXED}: its draws are all the same."
    if mixing > POORLY_MIXED_SHARE:
        differing = sum(row.severity > 1 for row in deciding)
        return "unclear", (
            f"{POORLY_MIXED}: {mixing:.0%} of the variation of its predictions is between half-chains; 0% is ideal. On "
            f"these draws the generator differs in {differing} of {len(deciding)} metrics."
        )
    if "loses" in by_status:
        named = "; ".join(_named(row) for row in by_status["loses"][:3])
        more = len(by_status["loses"]) - 3
        return "loses", f"{named}{f'; and {more} more' if more > 0 else ''}."
    blind = [row for row in by_status.get("unclear", []) if row.name in _KEY_METRICS]
    if blind:
        return "unclear", (
            f"{TOO_FEW}: {blind[0].label} is {blind[0].chain:.3g}, resolved to {blind[0].resolution:.2g}. A larger "
            "num_samples or a longer chain would resolve it."
        )
    if "departs" in by_status:
        named = "; ".join(_named(row) for row in by_status["departs"][:3])
        return "departs", f"{named}: not worse, yet not the chain's posterior."
    passed = len(by_status.get("indistinguishable", []))
    rest = "" if passed == len(deciding) else "; the others are not resolved"
    return "indistinguishable", f"{INDISTINGUISHABLE}, in {passed} of {len(deciding)} metrics{rest}."


def _named_after(name: str) -> int:
    """Order in the verdict: copies first, since they explain the rest; distances after better known metrics."""
    return {"new_draws": 0, "disagreement": 2, "spread": 2, "energy": 2}.get(name, 1)


def _named(row: Row) -> str:
    where = row.group.partition(": ")[2]
    return f"{row.label.partition(' (')[0]}{f' on {where}' if where else ''} {row.verdict}"
