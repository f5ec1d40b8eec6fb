# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Mixing of the chain: R-hat and effective sizes of a few identified scalars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.diagnostics.comparison.evaluation import Inputs
from pyro_apd.diagnostics.mixing.convergence import statistics
from pyro_apd.diagnostics.mixing.function_space import FunctionProbe
from pyro_apd.predictive.chain_draws import ChainDraws
from pyro_apd.predictive.draws import evenly_spaced

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

    Weights of a network are unidentified: chains in symmetric modes have a large R-hat and the same
    predictions. More than a thousand draws in all are thinned to that.

    :param chain: all draws.
    :param stats: per-draw statistics ``(C, S)`` of the kernel.
    :param model: the Pyro model; without it there are no function values.
    :param inputs: what it is called with.
    """
    steps = evenly_spaced(chain.num_draws, max(100, _MAX_DRAWS // chain.num_chains))
    scalars: list[tuple[str, str, Tensor]] = []
    if model is not None and inputs is not None:
        scalars += _function_values(chain, steps, model, inputs)
    scalars += _weights(chain, steps)
    if "potential" in stats:
        scalars.append(("potential", "kernel", torch.as_tensor(stats["potential"])[:, steps]))
    if not scalars:
        return []
    found = statistics(torch.stack([values_CS.double().cpu() for _, _, values_CS in scalars], -1))
    columns = [found[name].tolist() for name in ("rhat", "ess_bulk", "ess_tail")]
    return [Health(name, group, *row) for (name, group, _), *row in zip(scalars, *columns, strict=True)]


@dataclass(frozen=True)
class LayerHealth:
    """Mixing of the weights of one layer, each by itself.

    :ivar str layer: what comes before the last dot of its sites.
    :ivar int num_weights: weights that the statistics are of.
    :ivar float rhat_50: median R-hat; NaN for a single chain.
    :ivar float rhat_95: R-hat that 95 % of the weights do not exceed.
    :ivar float ess_50: median of the effective draws for the centre.
    :ivar float ess_5: effective draws that 95 % of the weights exceed.
    """

    layer: str
    num_weights: int
    rhat_50: float
    rhat_95: float
    ess_50: float
    ess_5: float


def layer_health(chain: ChainDraws, max_weights: int = 4000) -> list[LayerHealth]:
    """Mixing of weights by layer: quantiles over all, or over ``max_weights`` at even distances.

    :param chain: all draws.
    :param int max_weights: weights of all layers together; :func:`~pyro_apd.diagnostics.mixing.convergence` takes all.
    """
    layers: dict[str, list[Tensor]] = {}
    total = sum(value[0, 0].numel() for value in chain.values.values())
    for name, value in chain.values.items():
        entries_CSD = value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1)
        kept = evenly_spaced(
            entries_CSD.shape[2], max(1, entries_CSD.shape[2] * max_weights // max(total, max_weights))
        )
        layers.setdefault(name.rpartition(".")[0] or name, []).append(entries_CSD[:, :, kept])
    found = []
    for layer, parts in layers.items():
        of_layer = statistics(torch.cat([part.double() for part in parts], 2))
        rhat = of_layer["rhat"].sort().values
        ess = of_layer["ess_bulk"].sort().values
        number = len(rhat)
        found.append(
            LayerHealth(
                layer,
                number,
                *(float(rhat[min(number - 1, int(q * number))]) for q in (0.5, 0.95)),
                *(float(ess[int(q * number)]) for q in (0.5, 0.05)),
            )
        )
    return found


def _function_values(
    chain: ChainDraws, steps: list[int], model: Callable[..., Any], inputs: Inputs
) -> list[tuple[str, str, Tensor]]:
    probe = FunctionProbe(model, inputs, _NUM_INPUTS)
    values_SF = probe(chain.pooled(steps))
    if values_SF is None:
        return []
    by_chain = values_SF.reshape(chain.num_chains, len(steps), -1)
    return [(name, "function value", by_chain[:, :, i]) for i, name in enumerate(probe.names)]


def _weights(chain: ChainDraws, steps: list[int]) -> list[tuple[str, str, Tensor]]:
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
            found.append((label, "weight", entry_CS))
            break
    return found
