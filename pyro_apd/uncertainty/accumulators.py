# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Sums over draws from which scores are had at the end, whatever the number of draws that passed by.

Distances are counted from the first draw, so that draws that agree give scores of exactly zero, and sums are kept in
double precision. The public interface is :mod:`pyro_apd.uncertainty` and :func:`pyro_apd.reduce_outputs`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

#: Of class probabilities: the first ``(N, K)``, the others ``(N,)``.
OF_PROBABILITIES = (
    "mean_probability",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "max_probability",
    "model_variance",
    "variation_ratio",
)
#: Of means and variances of the observations, each ``(N,)``.
OF_MOMENTS = ("mean", "variance", "expected_variance", "model_variance")

# Below this log-probability a class adds nothing to any entropy in single precision.
_LOWEST = -87.0


class ProbabilityReduction:
    """Scores of class probabilities.

    :param int num_data: N.
    :param names: of :data:`OF_PROBABILITIES`.
    """

    def __init__(self, num_data: int, names: Collection[str]) -> None:
        self._num_data, self._names = num_data, frozenset(names)
        self._count = torch.zeros(num_data, dtype=torch.int64)
        self._first_NK: Tensor | None = None

    def add(self, data: slice, log_probs_SBK: Tensor) -> None:
        """Takes in some draws of some data, as normalised log-probabilities."""
        if self._first_NK is None:
            self._start(log_probs_SBK)
        assert self._first_NK is not None
        if bool(self._count[data].eq(0).all()):
            self._first_NK[data] = log_probs_SBK[0].exp()
        probs_SBK, log_probs_SBK = log_probs_SBK.exp(), log_probs_SBK.clamp(min=_LOWEST)
        if self._votes_NK is not None:
            winners_BS = log_probs_SBK.argmax(-1).T
            ones = torch.ones_like(winners_BS, dtype=self._votes_NK.dtype)
            self._votes_NK[data] = self._votes_NK[data].scatter_add(1, winners_BS, ones)
        self._entropy_N[data] -= (probs_SBK * log_probs_SBK).sum(-1).sum(0, dtype=torch.float64)
        offset_SBK = probs_SBK - self._first_NK[data]
        self._relative_N[data] += _divergence(probs_SBK, offset_SBK, self._first_NK[data]).sum(0, dtype=torch.float64)
        self._offset_NK[data] += offset_SBK.sum(0, dtype=torch.float64)
        self._square_N[data] += offset_SBK.square_().sum(-1).sum(0, dtype=torch.float64)
        self._count[data] += len(log_probs_SBK)

    def result(self) -> dict[str, Tensor]:
        """What was asked for, by name."""
        assert self._first_NK is not None
        count_N = self._count.to(self._entropy_N.device)
        offset_NK = self._offset_NK / count_N.unsqueeze(1)
        mean_NK = self._first_NK.double() + offset_NK
        entropy_N = self._entropy_N / count_N
        # mean_s D(p_s, q) - D(mean, q) is the same for every q, and the first draw's is near to all.
        relative_N = _divergence(mean_NK, offset_NK, self._first_NK)
        information_N = (self._relative_N / count_N - relative_N).clamp_min(0.0)
        scores = {
            "mean_probability": mean_NK,
            "predictive_entropy": torch.special.entr(mean_NK).sum(-1).clamp_min(0.0),
            "expected_entropy": entropy_N.clamp_min(0.0),
            "mutual_information": information_N,
            "max_probability": mean_NK.amax(-1),
            "model_variance": (self._square_N / count_N - offset_NK.square().sum(-1)).clamp_min(0.0),
        }
        if self._votes_NK is not None:
            scores["variation_ratio"] = 1 - self._votes_NK.amax(-1) / count_N
        return {name: scores[name].to(self._first_NK.dtype) for name in OF_PROBABILITIES if name in self._names}

    def _start(self, like: Tensor) -> None:
        shape = (self._num_data, like.shape[-1])
        self._first_NK = like.new_zeros(shape)
        self._offset_NK = like.new_zeros(shape, dtype=torch.float64)
        self._entropy_N, self._relative_N, self._square_N = (
            like.new_zeros(self._num_data, dtype=torch.float64) for _ in range(3)
        )
        self._votes_NK = like.new_zeros(shape, dtype=torch.int64) if "variation_ratio" in self._names else None


def _divergence(probs: Tensor, offset: Tensor, reference: Tensor) -> Tensor:
    """KL divergence of ``probs = reference + offset`` from ``reference``, over the last dimension.

    Every term is of second order in the offset and none is negative, so that nothing cancels between classes.
    """
    ratio = offset / reference.clamp_min(torch.finfo(reference.dtype).tiny)
    ratio = ratio.clamp_min_(torch.finfo(ratio.dtype).eps - 1)  # a p below eps would give log(0)
    return ratio.log1p_().mul_(probs).sub_(offset).sum(-1)


class MomentReduction:
    """Mean and variance of a mixture, one component per draw: the law of total variance.

    :param int num_data: N.
    :param names: of :data:`OF_MOMENTS`.
    """

    def __init__(self, num_data: int, names: Collection[str]) -> None:
        self._num_data, self._names = num_data, frozenset(names)
        self._count = torch.zeros(num_data, dtype=torch.int64)
        self._first_N: Tensor | None = None

    def add(self, data: slice, moments_SB2: Tensor) -> None:
        """Takes in some draws of some data: means and variances."""
        mean_SB, variance_SB = moments_SB2.unbind(-1)
        if self._first_N is None:
            self._first_N = mean_SB.new_zeros(self._num_data)
            self._offset_N, self._square_N, self._variance_N = (
                mean_SB.new_zeros(self._num_data, dtype=torch.float64) for _ in range(3)
            )
        if bool(self._count[data].eq(0).all()):
            self._first_N[data] = mean_SB[0]
        offset_SB = (mean_SB - self._first_N[data]).double()
        self._offset_N[data] += offset_SB.sum(0)
        self._square_N[data] += offset_SB.square_().sum(0)
        self._variance_N[data] += variance_SB.sum(0, dtype=torch.float64)
        self._count[data] += len(mean_SB)

    def result(self) -> dict[str, Tensor]:
        """What was asked for, by name."""
        assert self._first_N is not None
        count_N = self._count.to(self._first_N.device)
        offset_N, expected_N = self._offset_N / count_N, self._variance_N / count_N
        between_N = (self._square_N / count_N - offset_N.square()).clamp_min(0.0)
        moments = {
            "mean": self._first_N.double() + offset_N,
            "variance": expected_N + between_N,
            "expected_variance": expected_N,
            "model_variance": between_N,
        }
        return {name: moments[name].to(self._first_N.dtype) for name in OF_MOMENTS if name in self._names}
