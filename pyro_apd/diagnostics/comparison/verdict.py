# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""From figures to words: what each figure is called, which way it is worse, and what a difference means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

INDISTINGUISHABLE = "indistinguishable at this chain's resolution"
POORLY_MIXED = "chain too poorly mixed to tell"
TOO_FEW = "too few independent draws to tell"

#: Half-chains that differ more than their insides vary leave nothing to compare with.
POORLY_MIXED_SHARE = 0.5
# A figure that is not known to half of itself (or, where it lies between 0 and 1, to a quarter) decides nothing.
_COARSE_RELATIVE, _COARSE_ABSOLUTE = 0.5, 0.25
# Where a collapsed generator cannot hide. Without it there is no verdict; others may stay unresolved.
_KEY_FIGURES = ("disagreement",)


@dataclass(frozen=True)
class Figure:
    """What a figure is.

    :ivar str label: its name in print.
    :ivar str worse: the direction of loss: ``lower``, ``higher``, or ``either`` where only the chain's value is right.
    :ivar bool relative: whether differences are stated in per cent of the chain's value; else as they are.
    """

    label: str
    worse: str
    relative: bool


FIGURES = {
    "accuracy": Figure("accuracy", "lower", False),
    "one_draw_accuracy": Figure("accuracy of one draw", "lower", False),
    "rmse": Figure("RMSE", "higher", True),
    "nll": Figure("NLL (nats)", "higher", True),
    "ece": Figure("ECE", "higher", False),
    "mean_entropy": Figure("mean entropy (nats)", "either", True),
    "mean_mi": Figure("mean MI (nats)", "either", True),
    "mean_sd": Figure("mean predictive sd", "either", True),
    "mean_epistemic": Figure("mean epistemic variance", "either", True),
    "disagreement": Figure("distance between two draws", "either", True),
    "spread": Figure("spread in main directions", "either", True),
    "energy": Figure("energy distance from the chain", "higher", False),
    "new_draws": Figure("draws that copy no other", "lower", False),
    "mi_correlation": Figure("correlation of MI by input", "lower", False),
    "epistemic_correlation": Figure("correlation of epistemic variance by input", "lower", False),
    "agreement": Figure("agreement with the chain", "lower", False),
    "total_variation": Figure("total variation from the chain", "higher", False),
    "mean_shift": Figure("shift from the chain (predictive sd)", "higher", False),
    "auroc_entropy": Figure("AUROC by entropy", "lower", False),
    "auroc_mi": Figure("AUROC by MI", "lower", False),
    "auroc_sd": Figure("AUROC by predictive sd", "lower", False),
    "auroc_epistemic": Figure("AUROC by epistemic variance", "lower", False),
    "weight_sd_ratio_5": Figure("weight sd ratio, 5 %", "either", False),
    "weight_sd_ratio_50": Figure("weight sd ratio, 50 %", "either", False),
    "weight_sd_ratio_95": Figure("weight sd ratio, 95 %", "either", False),
}


def lookup(name: str) -> Figure:
    """The figure of a row called ``name`` or ``name[set]``."""
    return FIGURES[name.partition("[")[0]]


@dataclass(frozen=True)
class Row:
    """One figure of a comparison.

    :ivar str name: ``accuracy``, ``mean_mi[noise]``, ...
    :ivar str label: the same in print.
    :ivar str group: ``function space``, ``out of distribution: noise``, ``memory`` or ``weight space``.
    :ivar float chain: the chain's own value; of a likeness, that of one half of the chain to the other.
    :ivar float generator: the generator's.
    :ivar float stored: that of stored draws of the same bytes; NaN where not even one fits.
    :ivar float resolution: differences up to this lie within the Monte-Carlo error of chain and generator.
    :ivar str status: ``indistinguishable``, ``loses``, ``departs`` (not for the worse) or ``unclear``.
    :ivar str verdict: the same in words.
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

    @property
    def severity(self) -> float:
        """The difference in units of the resolution."""
        difference = abs(self.generator - self.chain)
        return difference / self.resolution if self.resolution > 0 else math.copysign(math.inf, difference)


def judge(name: str, chain: float, generator: float, resolution: float, poorly_mixed: bool) -> tuple[str, str]:
    """Status and verdict of one figure."""
    figure = lookup(name)
    if not (math.isfinite(chain) and math.isfinite(resolution)):
        return "unclear", "not defined for this chain"
    coarse = resolution > (_COARSE_RELATIVE * abs(chain) if figure.relative else _COARSE_ABSOLUTE)
    difference = generator - chain
    if abs(difference) <= resolution:
        if poorly_mixed or coarse:
            return "unclear", POORLY_MIXED if poorly_mixed else TOO_FEW
        return "indistinguishable", INDISTINGUISHABLE
    status, words = _difference(figure, chain, generator)
    if poorly_mixed:
        return "unclear", f"{POORLY_MIXED} ({words} against these draws)"
    return status, words


def _difference(figure: Figure, chain: float, generator: float) -> tuple[str, str]:
    difference = generator - chain
    if not math.isfinite(difference):
        return "loses", f"loses: {generator} for the generator"
    if figure.relative and chain != 0:
        size = f"{abs(difference / chain):.0%}" if abs(difference / chain) >= 0.1 else f"{abs(difference / chain):.1%}"
    else:
        size = f"{abs(difference):.2g}"
    if figure.worse == "either":
        return "loses", f"loses {size}" if difference < 0 else f"overstates by {size}"
    if (difference < 0) == (figure.worse == "lower"):
        return "loses", f"loses {size}"
    return "departs", f"departs by {size}, to the better"


def overall(rows: Sequence[Row], mixing: float, spread: bool) -> tuple[str, str]:
    """Status and verdict of a comparison. Function space decides; weights do where nothing else is known.

    :param mixing: share of the predictive variance between half-chains; NaN where unknown.
    :param spread: whether the chain's draws differ at all.
    """
    deciding = [row for row in rows if row.group != "weight space"]
    if all(row.group == "memory" for row in deciding):
        deciding = list(rows)
    by_status: dict[str, list[Row]] = {}
    for row in sorted(deciding, key=lambda row: (_named_after(row.name), -row.severity)):
        by_status.setdefault(row.status, []).append(row)
    if not spread:
        return "unclear", f"{POORLY_MIXED}: its draws are all the same."
    if mixing > POORLY_MIXED_SHARE:
        differing = sum(row.severity > 1 for row in deciding)
        return "unclear", (
            f"{POORLY_MIXED}: {mixing:.0%} of the spread of its predictions lies between half-chains. From the draws "
            f"as they are, the generator differs in {differing} of {len(deciding)} figures."
        )
    if "loses" in by_status:
        named = "; ".join(_named(row) for row in by_status["loses"][:3])
        more = len(by_status["loses"]) - 3
        return "loses", f"{named}{f'; and {more} more' if more > 0 else ''}."
    blind = [row for row in by_status.get("unclear", []) if row.name in _KEY_FIGURES]
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
    return "indistinguishable", f"{INDISTINGUISHABLE}, in {passed} of {len(deciding)} figures{rest}."


def _named_after(name: str) -> int:
    """Copies explain all else; distances come after the figures that users know, and see the same loss."""
    return {"new_draws": 0, "disagreement": 2, "spread": 2, "energy": 2}.get(name, 1)


def _named(row: Row) -> str:
    where = row.group.partition(": ")[2]
    return f"{row.label.partition(' (')[0]}{f' on {where}' if where else ''} {row.verdict}"
