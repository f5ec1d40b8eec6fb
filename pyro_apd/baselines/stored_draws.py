# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A few draws of the chain itself: the baseline for a generator of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.baselines.descent import check_counts
from pyro_apd.distillation.probes import Probes
from pyro_apd.distillation.source import Source, read_source
from pyro_apd.predictive.draws import ChainsLike
from pyro_apd.predictive.predictive import function_values
from pyro_apd.runtime.checks import choice
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.seeds import checked_seed

_METHODS = ("thinned", "herded")
# Inputs at which draws are compared as functions.
_NUM_PROBES = 64


def stored_draws(
    source: ChainsLike,
    num_draws: int,
    *,
    method: str = "thinned",
    model: Callable[..., Any] | None = None,
    data: Sequence[Any] | None = None,
    group_by_chain: bool = False,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Chooses draws of a chain to keep.

    ``"thinned"``: evenly spaced in time, chains taking turns. ``"herded"``: by kernel herding (Chen, Welling & Smola,
    UAI 2010) with the energy distance in function space; each draw added makes the distance of those chosen to all
    draws, averaged over inputs near the data and far from them, as small as it can.

    :param source: an ``MCMC`` after ``run``; or draws by site, ``(S, ...)``, with ``group_by_chain`` ``(C, S, ...)``.
    :param int num_draws: K, how many to keep.
    :param str method: ``"thinned"`` or ``"herded"``.
    :param callable model: the Pyro model; by default that of the ``MCMC``'s kernel. ``"herded"`` needs it.
    :param tuple data: arguments of the model, with or without targets; by default those of the run.
    :param bool group_by_chain: whether a dict has a leading dimension for chains.
    :param int seed: of the inputs, without touching the global generator.
    :returns: values ``(K, ...)`` by site, in order of time.
    :raises ValueError: if there are fewer draws than that, ``method`` is not known, or the model is not.
    """
    check_counts(num_draws=num_draws)
    choice("method", method, _METHODS)
    seed = checked_seed(seed)
    draws = read_source(source, model, data, group_by_chain)
    theta_ND = draws.theta_CSD.transpose(0, 1).flatten(0, 1)
    if num_draws > len(theta_ND):
        raise ValueError(f"`num_draws` must be at most {len(theta_ND)}, the draws that there are; got {num_draws}.")
    if method == "thinned":
        index_K = torch.linspace(0, len(theta_ND) - 1, num_draws, dtype=torch.float64).round().long()
    else:
        with seeded(seed, theta_ND.device), preserved_param_store(), torch.no_grad():
            index_K = herded(_values(draws, theta_ND), num_draws).sort().values
    return draws.layout.constrain(theta_ND[index_K.to(theta_ND.device)])


def herded(values_SNF: Tensor, num_draws: int) -> Tensor:
    """Indices ``(K,)`` of draws in the order in which they are chosen, by what each computes: ``(S, N, F)``.

    Distances at an input are relative to their mean there, so that all inputs count alike.
    """
    distance_SS = values_SNF.new_zeros(len(values_SNF), len(values_SNF))
    for part_NSF in values_SNF.transpose(0, 1).split(8):
        distance_NSS = torch.cdist(part_NSF, part_NSF)
        distance_SS += (distance_NSS / distance_NSS.mean((1, 2), keepdim=True).clamp_min(1e-12)).sum(0)
    to_all_S, to_chosen_S = distance_SS.mean(1), torch.zeros_like(distance_SS[0])
    is_chosen_S = torch.zeros(len(distance_SS), dtype=torch.bool, device=distance_SS.device)
    chosen = []
    for k in range(num_draws):
        score_S = (to_all_S - to_chosen_S / (k + 1)).masked_fill(is_chosen_S, torch.inf)
        chosen.append(score_S.argmin())
        is_chosen_S[chosen[-1]] = True
        to_chosen_S = to_chosen_S + distance_SS[chosen[-1]]
    return torch.stack(chosen)


def _values(draws: Source, theta_ND: Tensor) -> Tensor:
    if draws.model is None or draws.args is None:
        raise ValueError("method='herded' compares draws as functions: give `model` and `data`, or an MCMC after run.")
    tensors = [value for value in draws.args if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors:
        raise ValueError("method='herded' needs a tensor of inputs among `data`; there is none.")
    inputs = Probes([tensors[0]]).draw(_NUM_PROBES)
    return function_values(draws.model, draws.layout.constrain(theta_ND), *inputs)
