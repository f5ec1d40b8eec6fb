# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Generators of weight vectors: modules without training code, rebuilt from a ``config`` that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_apd.generators.base import Generator
from pyro_apd.generators.dropout import DropoutGenerator
from pyro_apd.generators.low_rank import LowRankGenerator
from pyro_apd.generators.paper import PaperGenerator
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.generators.version_2 import ChunkedGenerator, CoordinateGenerator

#: Generators by the name that ``distill(generator=...)`` and files use.
GENERATORS: dict[str, type[Generator]] = {"paper": PaperGenerator, "subspace": SubspaceGenerator}
#: Further generators that files may hold: those that :mod:`pyro_apd.baselines` fits, and those of earlier files.
BASELINES: dict[str, type[Generator]] = {"dropout": DropoutGenerator, "low-rank": LowRankGenerator}
_EARLIER: dict[str, type[Generator]] = {"chunked": ChunkedGenerator, "coordinates": CoordinateGenerator}

__all__ = [
    "BASELINES",
    "GENERATORS",
    "DropoutGenerator",
    "Generator",
    "LowRankGenerator",
    "PaperGenerator",
    "SubspaceGenerator",
    "build_generator",
]


def build_generator(config: Mapping[str, Any]) -> Generator:
    """A generator with the architecture of ``config``, whose parameters are still to be loaded.

    :param dict config: ``kind`` and the settings of that kind, as a generator's ``config`` gives them.
    :raises ValueError: if the kind is not known, a setting is missing or surplus, or a size is not a positive integer.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    known = {**GENERATORS, **BASELINES, **_EARLIER}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"Unknown generator {kind!r:.80}; known are {sorted(known)}.")
    try:
        return known[kind](**settings)
    except TypeError as error:
        raise ValueError(
            f"Settings {sorted(settings)!s:.200} are not those of a '{kind}' generator: {error}."
        ) from error
