# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The strongest baseline at equal bytes: draws of the chain in two bits a weight, with error feedback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from pyro_apd.baselines.stored_draws import StoredDraws, stored_draws
from pyro_apd.diagnostics.comparison.evaluation import Inputs
from pyro_apd.diagnostics.comparison.split import Split
from pyro_apd.diagnostics.draws import posterior_bytes
from pyro_apd.predictive.chain_draws import ChainDraws
from pyro_apd.predictive.draws import PosteriorLike

logger = logging.getLogger("pyro_apd")

_DTYPE = "int2"


def few_bits(
    chain: ChainDraws,
    posterior: PosteriorLike,
    split: Split,
    model: Callable[..., Any] | None,
    inputs: Inputs | None,
    seed: int | None,
) -> dict[str, StoredDraws]:
    """Stored draws of the bytes of the generator's file, from between those that are compared where there are enough.

    None where the model or its inputs are not known, where ``posterior`` is itself a dict of draws, and where its bytes
    hold no draw.
    """
    if model is None or inputs is None or inputs.kwargs or isinstance(posterior, Mapping):
        return {}
    compared = set(split.steps)
    pool = [step for step in range(chain.num_draws) if split.overlap or step not in compared]
    values = {name: value[:, pool] for name, value in chain.values.items()}
    try:
        kept = stored_draws(
            values,
            byte_budget=posterior_bytes(posterior),
            dtype=_DTYPE,
            model=model,
            data=inputs.args,
            group_by_chain=True,
            seed=seed,
        )
    except ValueError as error:
        logger.info("Stored draws in %s are not shown: %s", _DTYPE, error)
        return {}
    return {_DTYPE: kept}
