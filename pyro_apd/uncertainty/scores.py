# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Scores of uncertainty: from tensors, at once and as a stream. Conventions are in :mod:`pyro_apd.uncertainty`."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pyro_apd.runtime.tensor_checks import checked_probabilities, is_dense, shape_of
from pyro_apd.uncertainty.accumulators import OF_MOMENTS, OF_PROBABILITIES, MomentReduction, ProbabilityReduction


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


def aleatoric_variance(variance_SN: Tensor) -> Tensor:
    """Mean variance of an observation given the weights, E_s Var[y | s]: noise, which more data do not remove.

    :param Tensor variance_SN: variances, ``(S, N)``, in squared units of the targets.
    :returns: ``(N,)``.
    """
    return _checked_moments(variance_SN=variance_SN)[0].mean(0)


def epistemic_variance(mean_SN: Tensor) -> Tensor:
    """Variance over draws of the mean of an observation, Var_s E[y | s]: what is not known about the weights.

    :param Tensor mean_SN: means, ``(S, N)``.
    :returns: ``(N,)`` with 1/S in the variance; zero for a single draw.
    """
    return _centred(_checked_moments(mean_SN=mean_SN)[0])[1].square().mean(0)


def total_variance(mean_SN: Tensor, variance_SN: Tensor) -> Tensor:
    """Variance of an observation under all draws: :func:`aleatoric_variance` plus :func:`epistemic_variance`.

    :param Tensor mean_SN: means, ``(S, N)``.
    :param Tensor variance_SN: variances, ``(S, N)``.
    :returns: ``(N,)``.
    """
    mean_SN, variance_SN = _checked_moments(mean_SN=mean_SN, variance_SN=variance_SN)
    return variance_SN.mean(0) + _centred(mean_SN)[1].square().mean(0)


class ClassificationStream:
    """Scores of class probabilities that come some draws at a time, in memory that does not grow with their number.

    :param names: which of ``mean_probability`` ``(N, K)``, ``predictive_entropy``, ``expected_entropy``,
        ``mutual_information``, ``max_probability``, ``model_variance`` and ``variation_ratio``; by default all.
    :raises ValueError: if a name is not one of these.

    Example::

        stream = ClassificationStream(["mutual_information"])
        for probs_SNK in chunks:
            stream.add(probs_SNK)
        scores = stream.result()
    """

    def __init__(self, names: Collection[str] | str | None = None) -> None:
        self._names = _checked_names(names, OF_PROBABILITIES)
        self._reduction: ProbabilityReduction | None = None
        self._shape: tuple[int, ...] = ()

    def add(self, probs_SNK: Tensor) -> ClassificationStream:
        """Takes in some draws, ``(S, N, K)``, with the same data and classes as before.

        :raises ValueError: as the scores' own functions, or if data or classes differ from those before.
        """
        probs_SNK = _checked(probs_SNK)
        self._shape = _checked_like(tuple(probs_SNK.shape[1:]), self._shape, "probs_SNK")
        if self._reduction is None:
            self._reduction = ProbabilityReduction(probs_SNK.shape[1], self._names)
        self._reduction.add(slice(None), probs_SNK.log())
        return self

    def result(self) -> dict[str, Tensor]:
        """The scores so far, by name; more draws may follow.

        :raises ValueError: if no draws were added yet.
        """
        return _result(self._reduction)


class RegressionStream:
    """Means and variances that come some draws at a time, in memory that does not grow with their number.

    :param names: which of ``mean`` and ``variance`` of an observation and the latter's parts, ``expected_variance``
        (aleatoric) and ``model_variance`` (epistemic), each ``(N,)``; by default all.
    :raises ValueError: if a name is not one of these.
    """

    def __init__(self, names: Collection[str] | str | None = None) -> None:
        self._names = _checked_names(names, OF_MOMENTS)
        self._reduction: MomentReduction | None = None
        self._shape: tuple[int, ...] = ()

    def add(self, mean_SN: Tensor, variance_SN: Tensor) -> RegressionStream:
        """Takes in some draws, ``(S, N)`` each, of the same data as before.

        :raises ValueError: as :func:`total_variance`, or if the data differ in number from those before.
        """
        mean_SN, variance_SN = _checked_moments(mean_SN=mean_SN, variance_SN=variance_SN)
        self._shape = _checked_like(tuple(mean_SN.shape[1:]), self._shape, "mean_SN")
        if self._reduction is None:
            self._reduction = MomentReduction(mean_SN.shape[1], self._names)
        self._reduction.add(slice(None), torch.stack([mean_SN, variance_SN], -1))
        return self

    def result(self) -> dict[str, Tensor]:
        """The variances so far, by name; more draws may follow.

        :raises ValueError: if no draws were added yet.
        """
        return _result(self._reduction)


def _result(reduction: ProbabilityReduction | MomentReduction | None) -> dict[str, Tensor]:
    if reduction is None:
        raise ValueError("The stream has no draws yet; add(...) some first.")
    return reduction.result()


def _checked_names(names: Collection[str] | str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if names is not None and not isinstance(names, Collection):
        raise ValueError(f"`names` must name some of {', '.join(known)}; got {names!r}.")
    chosen = known if names is None else (names,) if isinstance(names, str) else tuple(names)
    surplus = [name for name in chosen if name not in known]
    if surplus or not chosen:
        raise ValueError(f"`names` must name some of {', '.join(known)}; got {surplus or names!r}.")
    return chosen


def _checked_like(shape: tuple[int, ...], before: tuple[int, ...], name: str) -> tuple[int, ...]:
    if before and shape != before:
        raise ValueError(
            f"{name} must be of the same data as the draws before, {before} after the dimension of draws; got {shape}."
        )
    return shape


def _checked_moments(**moments: Tensor) -> list[Tensor]:
    """Each as a tensor ``(S, N)`` in single precision at least."""
    for name, value in moments.items():
        if not is_dense(value) or not value.is_floating_point() or value.dim() != 2 or not len(value):
            raise ValueError(
                f"{name} must be a floating-point tensor of shape (draws, data) with at least one draw; got "
                f"{shape_of(value)}. For a single draw pass it with unsqueeze(0)."
            )
    shapes = {name: tuple(value.shape) for name, value in moments.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Means and variances must have the same shape (draws, data); got {shapes}.")
    for name, value in moments.items():
        allowed = value.isfinite() & (value >= 0) if name == "variance_SN" else value.isfinite()
        if not bool(allowed.all()):
            fix = "; variances are wanted, not their logarithms" if name == "variance_SN" else ""
            raise ValueError(
                f"{name} holds {int((~allowed).sum())} entries that are not finite or not allowed{fix}; look at the "
                "draws or inputs they are of."
            )
    return [value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in moments.values()]


def _entropy(probs: Tensor) -> Tensor:
    """Entropy over the last dimension, with 0 log 0 = 0; a sum of 1 + eps must not make it negative."""
    entropy: Tensor = torch.special.entr(probs).sum(-1).clamp_min(0.0)
    return entropy


def _centred(value_S: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over draws and the distances from it, counted from the first draw: equal draws have a distance of exactly 0.

    Otherwise the scores of a collapsed posterior would be rounding errors, which rank data as if they meant something.
    """
    offset_S = value_S - value_S[0]
    offset = offset_S.mean(0)
    return value_S[0] + offset, offset_S - offset


def _checked(probs_SNK: Tensor) -> Tensor:
    return checked_probabilities("probs_SNK", probs_SNK)
