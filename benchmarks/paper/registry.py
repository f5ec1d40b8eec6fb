# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""List of experiments. One experiment is one file, with a constant ``EXPERIMENT``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.common import Options, Results

#: In the order in which ``all`` runs them.
NAMES = ("toy", "classification", "ood", "uci", "active_learning", "adversarial")


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    :ivar run: computes what is missing in the results; each job goes through :meth:`Results.run`.
    :ivar table: the results in Markdown, with a heading of the third level.
    :ivar figure: draws the results, and returns the files; None if there is nothing to draw.
    """

    run: Callable[[Options, Results], None]
    table: Callable[[Options, Results], str]
    figure: Callable[[Options, Results], list[Path]] | None = None


def available() -> list[str]:
    """Names of the experiments whose file exists."""
    return [name for name in NAMES if importlib.util.find_spec(f"benchmarks.paper.{name}") is not None]


def find(name: str) -> Experiment:
    """An experiment by its name."""
    experiment: Experiment = importlib.import_module(f"benchmarks.paper.{name}").EXPERIMENT
    return experiment
