# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Averages and scores over networks, in operations that exported programs have.

They are those of :mod:`pyro_apd.uncertainty`, without its checks of values, which a program cannot make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_apd.runtime import checks

# Bisections of an interval's bounds: from the range of the distribution to a millionth of its width.
_BISECTIONS = 24
# Standard deviations around the means of networks that the bounds are sought within.
_REACH = 6.0

Score = Callable[[Tensor], Tensor]


def _centred(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over draws and the distances from it, counted from the first draw: equal draws have distances of zero."""
    offset_S = values_S - values_S[:1]
    offset = offset_S.mean(0)
    return values_S[0] + offset, offset_S - offset


def _mean(probs_SK: Tensor) -> Tensor:
    return _centred(probs_SK)[0]


def _entropy(probs_K: Tensor) -> Tensor:
    tiny = torch.finfo(probs_K.dtype).tiny
    return -(probs_K * probs_K.clamp(min=tiny).log()).sum(-1).clamp(max=0.0)


def _mutual_information(probs_SK: Tensor) -> Tensor:
    mean_K, excess_SK = _centred(probs_SK)
    info = torch.finfo(mean_K.dtype)
    relative_SK = (excess_SK / mean_K.clamp(min=info.tiny)).clamp(min=info.eps - 1)
    return (probs_SK * relative_SK.log1p() - excess_SK).sum(-1).mean(0).clamp(min=0.0)


def _variation_ratio(probs_SK: Tensor) -> Tensor:
    votes_S = probs_SK.argmax(-1)
    classes_K = torch.arange(probs_SK.shape[-1], device=probs_SK.device)
    counts_K = (votes_S.unsqueeze(-1) == classes_K).to(probs_SK.dtype).mean(0)
    return 1 - counts_K.amax(-1)


#: Of class probabilities ``(S, ..., K)``, by name.
OF_PROBABILITIES: dict[str, Score] = {
    "mean": _mean,
    "predictive_entropy": lambda probs_SK: _entropy(_mean(probs_SK)),
    "expected_entropy": lambda probs_SK: _entropy(probs_SK).mean(0),
    "mutual_information": _mutual_information,
    "max_probability": lambda probs_SK: _mean(probs_SK).amax(-1),
    "model_variance": lambda probs_SK: _centred(probs_SK)[1].square().mean(0).sum(-1),
    "variation_ratio": _variation_ratio,
    "networks": lambda probs_SK: probs_SK,
}
#: Of means and variances of observations, each ``(S, ...)``, by name.
OF_MOMENTS = ("mean", "variance", "expected_variance", "model_variance", "lower", "upper", "networks")


class Scores(nn.Module):
    """Averages and scores of the predictions of all networks.

    :param names: of :data:`OF_PROBABILITIES`, or of :data:`OF_MOMENTS`.
    :param bool is_class: whether predictions are class probabilities.
    :param float interval: probability between ``"lower"`` and ``"upper"``: of an observation whose distribution is the
        mixture of normal distributions of the networks.
    :param bool is_single: whether class probabilities are of two classes, of which the second is what ``"mean"`` and
        ``"networks"`` give.
    :raises ValueError: if a name is unknown, there is none, or the interval is not between 0 and 1.
    """

    def __init__(self, names: Sequence[str], *, is_class: bool, interval: float = 0.9, is_single: bool = False) -> None:
        super().__init__()
        known = tuple(OF_PROBABILITIES) if is_class else OF_MOMENTS
        self.names = checked_names(names, known)
        self.is_class, self.is_single = is_class, is_single
        self.interval = checks.number("interval", interval, above=0, below=1)

    @classmethod
    def of(cls, link: str, names: Sequence[str], interval: float = 0.9) -> Scores:
        """Those of networks whose outputs have a link of :data:`~pyro_apd.models.networks.LINKS`."""
        return cls(names, is_class=link != "identity", interval=interval, is_single=link == "sigmoid")

    def forward(self, *predictions_S: Tensor) -> tuple[Tensor, ...]:
        """One tensor per name.

        :param predictions_S: class probabilities ``(S, N, ..., K)``; or means and variances, ``(S, N, ...)`` each.
        """
        if self.is_class:
            return tuple(self._of_classes(name, predictions_S[0]) for name in self.names)
        mean_S, variance_S = predictions_S
        bounds = {}
        if {"lower", "upper"} & set(self.names):  # both by one bisection
            tail = 0.5 * (1 - self.interval)
            lower, upper = mixture_quantiles(mean_S, variance_S, [tail, 1 - tail])
            bounds = {"lower": lower, "upper": upper}
        return tuple(bounds[n] if n in bounds else _of_moments(n, mean_S, variance_S) for n in self.names)

    def _of_classes(self, name: str, probs_SK: Tensor) -> Tensor:
        score = OF_PROBABILITIES[name](probs_SK)
        return score[..., 1] if self.is_single and name in ("mean", "networks") else score


def _of_moments(name: str, mean_S: Tensor, variance_S: Tensor) -> Tensor:
    if name == "networks":
        return mean_S
    mean, offset_S = _centred(mean_S)
    if name == "mean":
        return mean
    if name == "expected_variance":
        return variance_S.mean(0)
    between = offset_S.square().mean(0)
    return between if name == "model_variance" else between + variance_S.mean(0)


def mixture_quantiles(mean_S: Tensor, variance_S: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles ``(Q, ...)`` of a mixture of normal distributions, one per draw, by bisection; of the means where
    variances are 0."""
    level_Q = torch.tensor(levels, dtype=mean_S.dtype, device=mean_S.device)
    level_Q = level_Q.reshape(-1, *[1] * (mean_S.dim() - 1))
    mean_S, variance_S = mean_S.unsqueeze(1), variance_S.unsqueeze(1)
    scale_S = variance_S.clamp(min=torch.finfo(variance_S.dtype).tiny).sqrt()
    low = (mean_S - _REACH * scale_S).amin(0)
    high = (mean_S + _REACH * scale_S).amax(0)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        share = (0.5 + 0.5 * torch.erf((middle - mean_S) / (math.sqrt(2.0) * scale_S))).mean(0)
        low, high = torch.where(share < level_Q, middle, low), torch.where(share < level_Q, high, middle)
    return 0.5 * (low + high)


def checked_names(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Names without repetition.

    :raises ValueError: if there is none, or one is not of ``known``.
    """
    found = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    unknown = [name for name in found if name not in known]
    if unknown or not found:
        raise ValueError(f"outputs={names!r} must name some of {', '.join(map(repr, known))}; not known: {unknown}.")
    return found
