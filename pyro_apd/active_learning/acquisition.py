# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which data to have labelled next: scores, and the choice of a batch by them.

**References**

Gal, Islam and Ghahramani, *Deep Bayesian Active Learning with Image Data*, ICML 2017, section 3.
Houlsby, Huszar, Ghahramani and Lengyel, *Bayesian Active Learning for Classification and Preference Learning*, 2011.
Kirsch, van Amersfoort and Gal, *BatchBALD*, NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_apd import uncertainty
from pyro_apd.runtime.checks import integer
from pyro_apd.runtime.seeds import derived_generator, seed_or_fresh
from pyro_apd.runtime.tensor_checks import checked_probabilities, is_dense


def mean_sd(probs_SNK: Tensor) -> Tensor:
    """Mean over classes of the standard deviation over draws (Gal et al. 2017, section 3, *Mean STD*).

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``.
    :returns: ``(N,)``, with 1/S in the variance; zero for a single draw.
    """
    probs_SNK = checked_probabilities("probs_SNK", probs_SNK)
    # From the first draw, so that equal draws have a deviation of exactly zero.
    return (probs_SNK - probs_SNK[0]).std(0, correction=0).mean(-1)


#: Scores ``(N,)`` from ``probs_SNK``, by name: the highest are labelled.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_entropy": uncertainty.predictive_entropy,
    "bald": uncertainty.mutual_information,
    "variation_ratio": uncertainty.variation_ratio,
    "mean_sd": mean_sd,
}
#: Every acquisition that :func:`select` and the loop know by name.
ACQUISITIONS = ("random", *SCORES, "batch_bald")

#: A rule of one's own: from ``probs_SNK`` to scores ``(N,)``.
Acquisition = str | Callable[[Tensor], Tensor]


def select(acquisition: Acquisition, probs_SNK: Tensor, batch_size: int, *, seed: int = 0) -> Tensor:
    """Positions of the data to have labelled next, ``(batch_size,)``, the most wanted first.

    :param acquisition: one of :data:`ACQUISITIONS`, or a function from ``probs_SNK`` to scores ``(N,)``.
    :param Tensor probs_SNK: class probabilities of the unlabelled data, ``(S, N, K)``; ``"random"`` looks at N only.
    :param int batch_size: how many; of fewer data, all.
    :param int seed: of the order among equal scores, of ``"random"``, and of what ``"batch_bald"`` samples.
    :raises ValueError: if the acquisition is not known, ``batch_size`` is not positive, probabilities are none, or a
        function's scores are not ``(N,)`` finite numbers.
    """
    check_acquisition(acquisition)
    if acquisition != "random" or not is_dense(probs_SNK) or probs_SNK.dim() != 3:
        probs_SNK = checked_probabilities("probs_SNK", probs_SNK)
    num_data = probs_SNK.shape[1]
    batch_size = min(integer("batch_size", batch_size), num_data)
    seed = seed_or_fresh(seed)
    # On the CPU whatever the device, so that a seed means the same on each.
    generator = derived_generator(seed, "order")
    shuffled_N = torch.randperm(num_data, generator=generator)
    if acquisition == "random":
        return shuffled_N[:batch_size]
    if acquisition == "batch_bald":
        return batch_bald(probs_SNK, batch_size, seed=seed)[0].cpu()
    score = SCORES[acquisition] if isinstance(acquisition, str) else acquisition
    scores_N = _checked_scores(score(probs_SNK), num_data)
    # Ties are the rule for variation ratios; a stable sort of shuffled data breaks them by the seed.
    order_N = scores_N[shuffled_N].sort(descending=True, stable=True).indices
    return shuffled_N[order_N[:batch_size]]


def batch_bald(
    probs_SNK: Tensor, batch_size: int, *, max_configurations: int = 2_000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""The batch whose labels, *together*, say most about the weights, chosen greedily (Kirsch et al. 2019).

    .. math::

        I(y_1, \dots, y_b; \theta) = H(y_1, \dots, y_b) - \sum_i \mathbb{E}_\theta H(y_i \mid \theta)

    The joint entropy is exact while the labels of the batch have at most ``max_configurations`` values together;
    from there on it is estimated from as many configurations sampled from the draws (their section 3.2). The greedy
    batch is within 1 - 1/e of the best, since the mutual information is submodular.

    :param Tensor probs_SNK: class probabilities, ``(S, N, K)``.
    :param int batch_size: data to choose, at most N.
    :param int max_configurations: label configurations summed over, or sampled.
    :param int seed: of the sampled ones; torch's generators are not touched.
    :returns: positions ``(batch_size,)`` in the order of choice, and the mutual information of the batch after each,
        nats, ``(batch_size,)``.
    :raises ValueError: if probabilities are none, or a number is out of range.
    """
    expected_N = uncertainty.expected_entropy(probs_SNK)
    num_draws, num_data = probs_SNK.shape[:2]
    batch_size = integer("batch_size", batch_size, at_most=num_data)
    max_configurations = integer("max_configurations", max_configurations)
    probs_SNK = probs_SNK.double()
    expected_N = expected_N.double()
    generator = derived_generator(seed_or_fresh(seed), "labels", device=probs_SNK.device)
    joint = _Joint(num_draws, max_configurations, probs_SNK)
    chosen, information = [], []
    spent = probs_SNK.new_zeros(())
    is_free_N = torch.ones(num_data, dtype=torch.bool, device=probs_SNK.device)
    for _ in range(batch_size):
        gain_N = joint.entropy_with(probs_SNK) - expected_N - spent
        best = gain_N.masked_fill(~is_free_N, -torch.inf).argmax()
        chosen.append(best)
        information.append(gain_N[best].clamp_min(0.0))
        spent = spent + expected_N[best]
        is_free_N[best] = False
        joint.add(probs_SNK[:, best], generator)
    return torch.stack(chosen), torch.stack(information)


class _Joint:
    """Label configurations of the data chosen so far, with their probabilities under each draw, ``(M, S)``.

    All of them, while they are few; beyond, samples, each with its weight in an average over the joint distribution.
    """

    def __init__(self, num_draws: int, most: int, like: Tensor) -> None:
        self.probs_MS = like.new_ones(1, num_draws)
        self.is_exact, self.most = True, most
        self._history: list[Tensor] = []

    def entropy_with(self, probs_SNK: Tensor) -> Tensor:
        """Joint entropy of the chosen and each datum, nats, ``(N,)``."""
        num_draws, num_classes = probs_SNK.shape[0], probs_SNK.shape[2]
        # p(y, y_n) = E_s p(y | s) p(y_n | s). Samples of y weigh 1/M each, so that their p(y) is divided out.
        weight_MS = self.probs_MS / num_draws
        marginal_M1 = weight_MS.sum(1, keepdim=True)
        columns = max(1, int(4e6) // (len(weight_MS) * num_classes))
        parts = []
        for part_SPK in probs_SNK.split(columns, dim=1):
            joint_MPK = (weight_MS @ part_SPK.flatten(1)).unflatten(1, part_SPK.shape[1:])
            if self.is_exact:
                parts.append(torch.special.entr(joint_MPK).sum((0, 2)))
                continue
            ratio_MPK = joint_MPK / marginal_M1.unsqueeze(-1)
            terms_MPK = -torch.special.xlogy(ratio_MPK, joint_MPK)
            parts.append(terms_MPK.sum(2).mean(0))
        return torch.cat(parts)

    def add(self, probs_SK: Tensor, generator: torch.Generator) -> None:
        """Takes the labels of one more datum in."""
        self._history.append(probs_SK)
        if self.is_exact and len(self.probs_MS) * probs_SK.shape[1] <= self.most:
            # (M, S) and (S, K) to (M K, S)
            self.probs_MS = (self.probs_MS.unsqueeze(1) * probs_SK.T).flatten(0, 1)
            return
        self.is_exact = False
        self._sample(generator)

    def _sample(self, generator: torch.Generator) -> None:
        """Configurations from the mixture: a draw, evenly, and a label of each datum under it."""
        num_draws = self.probs_MS.shape[1]
        # Every draw as often as any other: less noise than drawing them.
        draw_M = torch.arange(self.most, device=self.probs_MS.device) % num_draws
        self.probs_MS = self.probs_MS.new_ones(self.most, num_draws)
        for probs_SK in self._history:
            label_M = torch.multinomial(probs_SK[draw_M], 1, generator=generator).squeeze(1)
            self.probs_MS = self.probs_MS * probs_SK[:, label_M].T


def check_acquisition(acquisition: object) -> None:
    """:raises ValueError: if it is neither known by name nor callable."""
    if not callable(acquisition) and acquisition not in ACQUISITIONS:
        raise ValueError(
            f"`acquisition` must be one of {', '.join(map(repr, ACQUISITIONS))}, or a function from probabilities "
            f"(S, N, K) to scores (N,); got {acquisition!r}."
        )


def _checked_scores(scores: object, num_data: int) -> Tensor:
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (num_data,) or not bool(scores.isfinite().all()):
        what = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"The acquisition must give {num_data} finite scores, one per datum; it gives {what}.")
    return scores.detach().cpu()
