# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Averages over draws that are computed while draws are made, in constant memory.

Each agrees with the function of :mod:`pyro_apd.uncertainty` of the same name on all draws at once, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_apd.predictive import likelihoods
from pyro_apd.predictive.draws import Draws
from pyro_apd.predictive.observed_site import ObservedSite, Piece
from pyro_apd.uncertainty.accumulators import OF_MOMENTS, OF_PROBABILITIES, MomentReduction, ProbabilityReduction


def check_names(names: Collection[str], known: Iterable[str], argument: str = "reduce") -> None:
    """:raises ValueError: unless each of ``names`` is known."""
    surplus = [name for name in names if name not in known]
    if surplus or not names:
        raise ValueError(f"`{argument}` must name some of {', '.join(known)}; got {surplus or names!r}.")


def reduce_outputs(
    model: Callable[..., Any],
    draws: Draws,
    *args: Any,
    names: Collection[str] | str,
    site: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Averages over draws of what :func:`outputs` gives, in memory that does not grow with the number of draws.

    For a categorical or Bernoulli site: ``mean_probability`` ``(N, K)``, and the scores of
    :mod:`pyro_apd.uncertainty`, ``(N,)``, entropies in nats: ``predictive_entropy``, ``expected_entropy``,
    ``mutual_information``, ``max_probability``, ``model_variance``, ``variation_ratio``. For another site, ``(N,)``:
    ``mean`` and ``variance`` of the observation, and the latter's two parts, ``expected_variance`` (over data, given
    the weights) and ``model_variance`` (of the mean, over weights). Other parameters as in :func:`outputs`.

    :param names: which of these, a name or several.
    :raises ValueError: if draws are malformed, ``site`` is not one of the model's, or a name is not known or has no
        meaning for the model's site.
    :raises ModelError: if there is not one observed site, or its distribution has no mean and variance.
    """
    names = reduction_names(names, "names") or ()
    with torch.no_grad():
        observed = ObservedSite(model, draws, args, kwargs, site)
        kind = likelihoods.kind(observed.fn)
        if kind == "other" and not likelihoods.has_moments(observed.fn):
            raise likelihoods.without_moments(observed)
        of_classes = kind in ("categorical", "bernoulli")
        check_names(names, OF_PROBABILITIES if of_classes else OF_MOMENTS, "names")
        reduction: list[ProbabilityReduction | MomentReduction] = []

        def add(piece: Piece) -> None:
            if not reduction:
                make = ProbabilityReduction if of_classes else MomentReduction
                reduction.append(make(piece.num_data, names))
            reduction[0].add(piece.data, _log_odds(piece.value) if kind == "bernoulli" else piece.value)

        observed.stream(
            add, likelihoods.function if of_classes else likelihoods.moments, draws, args, kwargs, chunk_size=chunk_size
        )
    return reduction[0].result()


def reduction_names(reduce: Collection[str] | str | None, argument: str = "reduce") -> tuple[str, ...] | None:
    """Names of averages as a tuple, and None as it is; ``argument`` is what the caller's user gave.

    :raises ValueError: if one is known for no kind of site, or there are none.
    """
    if reduce is None:
        return None
    if not isinstance(reduce, Collection):
        raise ValueError(f"`{argument}` must be the name of an average, or a list of names; got {reduce!r:.80}.")
    names = (reduce,) if isinstance(reduce, str) else tuple(reduce)
    check_names(names, dict.fromkeys((*OF_PROBABILITIES, *OF_MOMENTS)), argument)
    return names


def _log_odds(logit: Tensor) -> Tensor:
    """Log-probabilities of failure and success, from the logit ``(..., 1)``."""
    return torch.nn.functional.logsigmoid(torch.cat([-logit, logit], dim=-1))
