# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How unsure a posterior is about each datum: scores from the class probabilities of many draws.

Every function takes ``probs_SNK``, probabilities of ``K`` classes for ``N`` data under each of ``S`` draws, and
returns one score a datum, ``(N,)``. Entropies are in nats. Half-precision input is computed in ``float32``.

Each raises :exc:`ValueError` if ``probs_SNK`` is not a floating-point tensor of three dimensions with at least one
draw and one class, holds NaN or negative entries, or has classes that do not sum to one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "expected_entropy",
    "max_probability",
    "model_variance",
    "mutual_information",
    "predictive_entropy",
    "variation_ratio",
]


def predictive_entropy(probs_SNK: Tensor) -> Tensor:
    """Entropy of the averaged prediction, H[E_s p_s]: all the uncertainty there is.

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``.
    :returns: nats, ``(N,)``, between 0 and log K.
    """
    return _entropy(_checked(probs_SNK).mean(0))


def expected_entropy(probs_SNK: Tensor) -> Tensor:
    """Mean entropy of single draws, E_s H[p_s]: what would remain if the weights were known.

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``.
    :returns: nats, ``(N,)``, at most :func:`predictive_entropy`.
    """
    return _entropy(_checked(probs_SNK)).mean(0)


def mutual_information(probs_SNK: Tensor) -> Tensor:
    """Mutual information of label and weights, H[E_s p_s] - E_s H[p_s]: how far the draws disagree.

    The acquisition score of BALD (Houlsby et al. 2011, eq. 2). It is summed as the mean divergence of the draws from
    their average, which keeps more digits than the difference of two entropies where the draws nearly agree.

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``.
    :returns: nats, ``(N,)``, never negative; zero for a single draw.
    """
    probs_SNK = _checked(probs_SNK)
    mean_NK, excess_SNK = _centred(probs_SNK)
    relative_SNK = excess_SNK / mean_NK.clamp_min(torch.finfo(mean_NK.dtype).tiny)
    relative_SNK = relative_SNK.clamp_min(torch.finfo(mean_NK.dtype).eps - 1)  # a p below eps would give log(0)
    # The excesses average to zero over draws; taking them off leaves terms of second order, none of them negative.
    terms_SNK = probs_SNK * relative_SNK.log1p() - excess_SNK
    return terms_SNK.sum(-1).mean(0).clamp_min(0.0)


def variation_ratio(probs_SNK: Tensor) -> Tensor:
    """Share of draws that do not vote for the most frequent class, 1 - f/S (Gal 2016, section 3.3.1).

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``; each draw votes for its most probable class, the
        first of equals.
    :returns: ``(N,)``, from 0 to 1 - 1/min(S, K).
    """
    probs_SNK = _checked(probs_SNK)
    votes_SN = probs_SNK.argmax(-1)
    modal_N = votes_SN.mode(0).values
    return (votes_SN != modal_N).to(probs_SNK.dtype).mean(0)


def max_probability(probs_SNK: Tensor) -> Tensor:
    """Largest class probability of the averaged prediction; a confidence, so low means unsure.

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``.
    :returns: ``(N,)``, from 1/K to 1.
    """
    return _checked(probs_SNK).mean(0).amax(-1)


def model_variance(probs_SNK: Tensor) -> Tensor:
    """Variance of the probabilities over draws, summed over classes (Feinman et al. 2017, eq. 6).

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``.
    :returns: ``(N,)``, with 1/S in the variance; zero for a single draw.
    """
    return _centred(_checked(probs_SNK))[1].square().mean(0).sum(-1)


def _entropy(probs: Tensor) -> Tensor:
    """Entropy over the last dimension, with 0 log 0 = 0; a sum of 1 + eps must not make it negative."""
    entropy: Tensor = torch.special.entr(probs).sum(-1).clamp_min(0.0)
    return entropy


def _centred(probs_SNK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over draws and the distances from it, counted from the first draw: equal draws have a distance of exactly 0.

    Otherwise the scores of a collapsed posterior would be rounding errors, which rank data as if they meant something.
    """
    offset_SNK = probs_SNK - probs_SNK[0]
    offset_NK = offset_SNK.mean(0)
    return probs_SNK[0] + offset_NK, offset_SNK - offset_NK


def _checked(probs_SNK: Tensor) -> Tensor:
    if not isinstance(probs_SNK, Tensor) or not probs_SNK.is_floating_point():
        kind = probs_SNK.dtype if isinstance(probs_SNK, Tensor) else type(probs_SNK).__name__
        raise ValueError(f"probs_SNK must be a floating-point tensor of class probabilities; got {kind}.")
    if probs_SNK.dim() != 3 or probs_SNK.shape[0] < 1 or probs_SNK.shape[2] < 1:
        raise ValueError(
            f"probs_SNK must have shape (draws, data, classes) with at least one draw and one class; got "
            f"{tuple(probs_SNK.shape)}. For a single draw pass probs.unsqueeze(0)."
        )
    if probs_SNK.dtype in (torch.float16, torch.bfloat16):
        tolerance, probs_SNK = torch.finfo(probs_SNK.dtype).eps ** 0.5, probs_SNK.float()
    else:
        tolerance = max(1e-5, torch.finfo(probs_SNK.dtype).eps ** 0.5)
    total_SN = probs_SNK.sum(-1)
    # One read from the device where all is well; NaN fails both comparisons.
    if not bool((probs_SNK >= 0).all() & ((total_SN - 1).abs() <= tolerance).all()):
        _explain(probs_SNK, total_SN)
    return probs_SNK


def _explain(probs_SNK: Tensor, total_SN: Tensor) -> None:
    if probs_SNK.isnan().any():
        raise ValueError(
            f"probs_SNK holds {int(probs_SNK.isnan().sum())} NaN; look at the draws or inputs they are of."
        )
    if (probs_SNK < 0).any():
        raise ValueError(
            f"probs_SNK holds negative entries, the least {float(probs_SNK.min()):.4g}; probabilities are wanted, not "
            f"logits or log-probabilities: use softmax(-1) or exp()."
        )
    worst = total_SN.flatten()[(total_SN - 1).abs().argmax()]
    raise ValueError(
        f"probs_SNK must sum to one over the last dimension; a sum of {float(worst):.6g} was found. Classes belong in "
        f"the last dimension, and a single probability p of a binary label as (1 - p, p)."
    )
