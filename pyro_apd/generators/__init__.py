# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What ships: generators of weight vectors, pure modules without training code, rebuilt from a JSON-able ``config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_apd.generators.chunked import ChunkedGenerator
from pyro_apd.generators.dropout import DropoutGenerator
from pyro_apd.generators.low_rank import LowRankGenerator
from pyro_apd.generators.network import CoordinateGenerator, Generator
from pyro_apd.generators.paper import PaperGenerator

#: Generators by the name that ``distill(generator=...)`` and files use.
GENERATORS: dict[str, type[Generator]] = {
    "chunked": ChunkedGenerator,
    "coordinates": CoordinateGenerator,
    "paper": PaperGenerator,
}
#: Those that files hold besides: what :mod:`pyro_apd.baselines` fits.
BASELINES: dict[str, type[Generator]] = {"dropout": DropoutGenerator, "low-rank": LowRankGenerator}

__all__ = [
    "BASELINES",
    "GENERATORS",
    "ChunkedGenerator",
    "CoordinateGenerator",
    "DropoutGenerator",
    "Generator",
    "LowRankGenerator",
    "PaperGenerator",
    "build_generator",
]


def build_generator(config: Mapping[str, Any]) -> Generator:
    """A generator with the architecture of ``config``, and parameters still to be loaded.

    :param dict config: ``kind`` and the settings of that kind, as a generator's ``config`` gives them.
    :raises ValueError: if the kind is not known, a setting is missing or surplus, or a size is not a positive integer.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    known = {**GENERATORS, **BASELINES}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"Unknown generator {kind!r}; known are {sorted(known)}.")
    try:
        return known[kind](**settings)
    except TypeError as error:
        raise ValueError(f"Settings {sorted(settings)} are not those of a '{kind}' generator: {error}.") from error
