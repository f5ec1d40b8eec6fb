# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whether draws are evaluated with the model that they were sampled with, as far as what they came from knows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine

from pyro_apd.models.frozen import FrozenTensors, has_frozen, reading
from pyro_apd.predictive.draws import Draws, draws_between
from pyro_apd.predictive.messengers import Substitute
from pyro_apd.runtime.global_state import preserved_param_store, seeded

logger = logging.getLogger("pyro_apd")


def known_frozen(source: object) -> FrozenTensors | None:
    """Frozen parameters and buffers of the model that was sampled, as a posterior, a run or its store notes them."""
    holders = (source, getattr(source, "store", None))
    return next((f for f in (getattr(h, "frozen", None) for h in holders) if isinstance(f, FrozenTensors)), None)


def check_frozen(
    source: object, model: Callable[..., Any], draws: Draws, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Compares frozen parameters and buffers of ``model``, which is run once, with those that ``source`` notes.

    :param source: a posterior, a run or a store. One that notes nothing, such as a dict of draws, is accepted.
    :param draws: of the model's latents; the first is substituted.
    :raises ArtifactError: if they differ.
    """
    frozen = known_frozen(source)
    if frozen is None or (not frozen.read and not has_frozen(model)):
        return
    example = {name: value[0] for name, value in draws_between(draws, 0, 1).items()}
    try:
        with preserved_param_store(), poutine.block(), torch.no_grad(), seeded(0), reading(model) as read:
            Substitute(example)(model)(*args, **kwargs)
    except Exception as error:  # whoever evaluates the model next explains it
        logger.debug("Frozen tensors of the model were not compared: %s.", error)
        return
    frozen.check(model, read)
