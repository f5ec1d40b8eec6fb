# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How good a prediction is: figures of the draw-averaged class probabilities ``probs_NK`` against labels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "accuracy",
    "auroc",
    "brier_score",
    "calibration_bins",
    "expected_calibration_error",
    "negative_log_likelihood",
]


def accuracy(probs_NK: Tensor, labels_N: Tensor) -> float:
    """Share of data whose most probable class is the label.

    :param Tensor probs_NK: class probabilities, ``(N, K)``.
    :param Tensor labels_N: classes 0..K-1, ``(N,)``.
    :raises ValueError: if shapes disagree, or a label is not one of the classes.
    """
    labels_N = _checked(probs_NK, labels_N)
    return float((probs_NK.argmax(-1) == labels_N).double().mean())


def negative_log_likelihood(probs_NK: Tensor, labels_N: Tensor) -> float:
    """Mean of -log p(label), in nats; infinite where a label was given no probability.

    :param Tensor probs_NK: class probabilities, ``(N, K)``.
    :param Tensor labels_N: classes 0..K-1, ``(N,)``.
    :raises ValueError: if shapes disagree, or a label is not one of the classes.
    """
    labels_N = _checked(probs_NK, labels_N)
    return float(-probs_NK.double().gather(-1, labels_N.unsqueeze(-1)).log().mean())


def brier_score(probs_NK: Tensor, labels_N: Tensor) -> float:
    """Squared distance of the probabilities from the label's one-hot vector, summed over classes (Brier 1950).

    From 0 to 2; a proper score, so that it cannot be gained by misstating the probabilities.

    :param Tensor probs_NK: class probabilities, ``(N, K)``.
    :param Tensor labels_N: classes 0..K-1, ``(N,)``.
    :raises ValueError: if shapes disagree, or a label is not one of the classes.
    """
    labels_N = _checked(probs_NK, labels_N)
    one_hot_NK = torch.nn.functional.one_hot(labels_N, probs_NK.shape[1])
    return float((probs_NK.double() - one_hot_NK).square().sum(-1).mean())


def expected_calibration_error(probs_NK: Tensor, labels_N: Tensor, num_bins: int = 15) -> float:
    """Gap between confidence and accuracy, averaged over equal-width bins by their share of data.

    Guo et al. 2017, eq. 3: confidence is the largest probability, bin m holds ((m-1)/M, m/M].

    :param Tensor probs_NK: class probabilities, ``(N, K)``.
    :param Tensor labels_N: classes 0..K-1, ``(N,)``.
    :param int num_bins: the paper's M.
    :raises ValueError: if shapes disagree, a label is not one of the classes, or ``num_bins`` is below one.
    """
    count_B, confidence_B, accuracy_B = calibration_bins(probs_NK, labels_N, num_bins)
    return float((count_B * (confidence_B - accuracy_B).abs()).sum() / count_B.sum())


def calibration_bins(probs_NK: Tensor, labels_N: Tensor, num_bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """What a reliability diagram shows: data, mean confidence and accuracy in each of ``num_bins`` equal-width bins.

    :returns: three tensors ``(num_bins,)``; empty bins hold zeros.
    :raises ValueError: as :func:`expected_calibration_error`.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1; got {num_bins}.")
    labels_N = _checked(probs_NK, labels_N)
    confidence_N, class_N = probs_NK.double().max(-1)
    # Confidences of exactly m/M belong to bin m, the one they close.
    bin_N = (confidence_N * num_bins).ceil().long().clamp(1, num_bins) - 1
    sums = torch.zeros(3, num_bins, dtype=torch.float64, device=probs_NK.device)
    correct_N = (class_N == labels_N).double()
    sums.index_add_(1, bin_N, torch.stack([torch.ones_like(confidence_N), confidence_N, correct_N]))
    count_B = sums[0]
    return count_B, sums[1] / count_B.clamp_min(1), sums[2] / count_B.clamp_min(1)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Probability that a datum from outside scores above one from inside, ties counting half.

    The area under the ROC curve, as the Mann-Whitney statistic over mid-ranks: exact, also where scores tie.

    :param Tensor scores_in: scores of in-distribution data, any shape; higher means more out-of-distribution.
    :param Tensor scores_out: scores of out-of-distribution data, any shape.
    :raises ValueError: if either is empty or holds NaN.
    """
    inside, outside = scores_in.detach().flatten().double(), scores_out.detach().flatten().double()
    for name, scores in (("scores_in", inside), ("scores_out", outside)):
        if scores.numel() == 0 or scores.isnan().any():
            raise ValueError(f"{name} must hold at least one score and no NaN; got {scores.numel()} scores.")
    inside = inside.to(outside.device).sort().values
    below = torch.searchsorted(inside, outside, right=False)
    not_above = torch.searchsorted(inside, outside, right=True)
    return float((below + not_above).double().mean() / (2 * inside.numel()))


def _checked(probs_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Labels as indices on the device of the probabilities."""
    if probs_NK.dim() != 2 or tuple(labels_N.shape) != (probs_NK.shape[0],) or probs_NK.shape[0] == 0:
        raise ValueError(
            f"probs_NK must be (data, classes) and labels_N (data,), with at least one datum; got "
            f"{tuple(probs_NK.shape)} and {tuple(labels_N.shape)}."
        )
    labels = labels_N.to(probs_NK.device, torch.long)
    if not bool(((labels >= 0) & (labels < probs_NK.shape[1]) & (labels == labels_N.to(labels.device))).all()):
        raise ValueError(
            f"labels_N must be whole numbers from 0 to {probs_NK.shape[1] - 1}; got values from "
            f"{float(labels_N.min()):g} to {float(labels_N.max()):g}."
        )
    return labels
