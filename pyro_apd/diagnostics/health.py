# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Does the chain mix? R-hat and effective sizes of a few scalars that have a meaning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd import predictive
from pyro_apd.diagnostics import arviz_compat
from pyro_apd.diagnostics.draws import ChainDraws, evenly_spaced
from pyro_apd.diagnostics.evaluation import Inputs
from pyro_apd.pyro_state import preserved_param_store

_MAX_DRAWS = 1000
_NUM_INPUTS, _NUM_WEIGHTS = 6, 4


@dataclass(frozen=True)
class Health:
    """Mixing of one scalar.

    :ivar str name: what it is.
    :ivar str group: ``function value``, ``weight`` or ``kernel``.
    :ivar float rhat: rank-normalised split R-hat (Vehtari et al. 2021); NaN for a single chain.
    :ivar float ess_bulk: effective draws for the centre of the distribution.
    :ivar float ess_tail: effective draws for its 5 and 95 % quantiles.
    """

    name: str
    group: str
    rhat: float
    ess_bulk: float
    ess_tail: float


def chain_health(
    chain: ChainDraws,
    stats: Mapping[str, np.ndarray],
    model: Callable[..., Any] | None = None,
    inputs: Inputs | None = None,
) -> list[Health]:
    """Mixing of function values on six inputs, of four weights and of the potential; never of all weights.

    Weights of a network are unidentified: chains in modes that mirror each other have a large R-hat and the same
    predictions. More than a thousand draws in all are thinned to that.

    :param chain: all draws.
    :param stats: per-draw figures ``(C, S)`` of the kernel.
    :param model: the Pyro model; without it there are no function values.
    :param inputs: what it is called with.
    """
    steps = evenly_spaced(chain.num_draws, max(100, _MAX_DRAWS // chain.num_chains))
    scalars: list[tuple[str, str, np.ndarray]] = []
    if model is not None and inputs is not None:
        scalars += _function_values(chain, steps, model, inputs)
    scalars += _weights(chain, steps)
    if "potential" in stats:
        scalars.append(("potential", "kernel", stats["potential"][:, steps]))
    arviz = arviz_compat.import_arviz()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [Health(name, group, *_statistics(arviz, values)) for name, group, values in scalars]


def _statistics(arviz: Any, values_CS: np.ndarray) -> tuple[float, float, float]:
    num_chains, num_draws = values_CS.shape
    if num_draws < 4 or not np.isfinite(values_CS).all():
        return math.nan, math.nan, math.nan
    rhat = float(arviz.rhat(values_CS)) if num_chains > 1 else math.nan
    return rhat, float(arviz.ess(values_CS, method="bulk")), float(arviz.ess(values_CS, method="tail"))


def _function_values(
    chain: ChainDraws, steps: list[int], model: Callable[..., Any], inputs: Inputs
) -> list[tuple[str, str, np.ndarray]]:
    args, rows = _few_rows(inputs.args)
    with preserved_param_store(), torch.no_grad():
        out = predictive.outputs(model, chain.pooled(steps), *args, **inputs.kwargs)
    if out.probs_SNK is not None:
        # The class that the chain holds for the most probable; R-hat of ranks does not mind that it is a probability.
        classes_N = out.probs_SNK.mean(0).argmax(-1)
        values = out.probs_SNK.gather(-1, classes_N[None, :, None].expand(len(out.probs_SNK), -1, 1)).squeeze(-1)
        names = [f"p(class {int(c)})" for c in classes_N]
    elif out.mean_SN is not None:
        values, names = out.mean_SN, ["mean"] * out.mean_SN.shape[1]
    else:
        return []
    by_chain = values.reshape(chain.num_chains, len(steps), -1).double().cpu().numpy()
    shown = evenly_spaced(values.shape[1], _NUM_INPUTS)
    labels = rows if len(rows) == values.shape[1] else range(values.shape[1])
    return [(f"{names[i]} at input {labels[i]}", "function value", by_chain[:, :, i]) for i in shown]


def _few_rows(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int]]:
    """Six rows of the inputs and which these are, where there is one tensor of rows; else all, and no numbers."""
    if len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() > 0:
        rows = evenly_spaced(len(args[0]), _NUM_INPUTS)
        return (args[0][rows],), rows
    return args, []


def _weights(chain: ChainDraws, steps: list[int]) -> list[tuple[str, str, np.ndarray]]:
    sizes = {name: int(torch.Size(value.shape[2:]).numel()) for name, value in chain.values.items()}
    found = []
    for position in evenly_spaced(sum(sizes.values()), _NUM_WEIGHTS):
        for name, value in chain.values.items():
            if position >= sizes[name]:
                position -= sizes[name]
                continue
            index = tuple(int(i) for i in np.unravel_index(position, tuple(value.shape[2:]))) if value.dim() > 2 else ()
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            entry_CS = value.movedim((0, 1), (-2, -1))[index][:, steps]
            found.append((label, "weight", entry_CS.double().cpu().numpy()))
            break
    return found
