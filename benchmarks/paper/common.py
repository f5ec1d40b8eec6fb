# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What the paper's experiments share: options, results that are stored one by one, and numbers in tables."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.common import RESULTS
from pyro_apd import datasets

PROTOCOLS = ("faithful", "corrected")
BUDGETS = ("smoke", "cpu", "full")

#: One piece of work: a key under which its results are stored, and the function that computes them.
Job = tuple[str, Callable[[], Mapping[str, Any]]]


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    :ivar str protocol: ``"faithful"``, the published settings with their errors, or ``"corrected"``.
    :ivar str budget: ``"smoke"`` (seconds, on the digits), ``"cpu"`` (an hour) or ``"full"``.
    :ivar str device: where to compute.
    :ivar seeds: instead of the budget's own.
    :ivar bool digits: use the digits even if MNIST is available.
    :ivar only: prefixes of names of methods, to run no others.
    :ivar bool again: also run what is already stored.
    :ivar Path results: where results, tables and figures are written.
    :ivar networks: hidden layers of the networks on MNIST, instead of the budget's own.
    """

    protocol: str = "corrected"
    budget: str = "cpu"
    device: str = "cpu"
    seeds: tuple[int, ...] | None = None
    digits: bool = False
    only: tuple[str, ...] | None = None
    again: bool = False
    results: Path = field(default=RESULTS)
    networks: tuple[tuple[int, ...], ...] | None = None

    @property
    def is_faithful(self) -> bool:
        """Whether to use the published settings."""
        return self.protocol == "faithful"

    @property
    def is_smoke(self) -> bool:
        """Whether only to check that everything runs."""
        return self.budget == "smoke"

    @property
    def has_images(self) -> bool:
        """Whether to run on MNIST: with any budget but smoke, if there is a folder with data; else on the digits."""
        return not (self.is_smoke or self.digits) and data_root() is not None

    @property
    def label(self) -> str:
        """Key of results: protocol, budget, and digits if they were requested."""
        return f"{self.protocol}_{self.budget}{'_digits' if self.digits else ''}"

    def by_budget(self, smoke: Any, cpu: Any, full: Any) -> Any:
        """The value for the budget."""
        return {"smoke": smoke, "cpu": cpu, "full": full}[self.budget]

    def wants(self, method: str) -> bool:
        """Whether a method is to be run."""
        return self.only is None or method.startswith(self.only)

    def seeds_or(self, smoke: Sequence[int], cpu: Sequence[int], full: Sequence[int]) -> tuple[int, ...]:
        """The requested seeds, else those of the budget."""
        return self.seeds if self.seeds is not None else tuple(self.by_budget(smoke, cpu, full))


class Results:
    """Results by key, in a file that is written after each: stored results are not computed again.

    :param str name: of the experiment.
    :param Options options: where to write, and whether to start again.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.path = options.results / f"paper_{name}_{options.label}.json"
        known = {} if options.again or not self.path.exists() else json.loads(self.path.read_text())
        self.figures: dict[str, dict[str, Any]] = known.get("figures", {})

    def run(self, jobs: Iterable[Job]) -> None:
        """Runs what is not stored yet, one after another, and stores each result."""
        missing = [(key, work) for key, work in jobs if key not in self.figures]
        for key, work in (bar := tqdm(missing, desc=f"{self.name}, {self.options.protocol}", leave=False)):
            bar.set_postfix_str(key)
            start = time.monotonic()
            found = dict(work())
            self.figures[key] = {**found, "seconds": round(time.monotonic() - start, 2)}
            self._write()
            bar.write(
                f"{self.name}, {self.options.protocol}: {key}, {self.figures[key]['seconds']:.0f} s{brief(found)}"
            )

    def under(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Results whose keys begin with ``prefix/``, by the rest of their keys."""
        return {key[len(prefix) + 1 :]: value for key, value in self.figures.items() if key.startswith(f"{prefix}/")}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = f'"protocol": {json.dumps(self.options.protocol)}, "budget": {json.dumps(self.options.budget)}'
        # One line per key: some results are whole surfaces, and one line per number would be too many.
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in self.figures.items())
        part = self.path.with_suffix(".part")
        part.write_text(f'{{{head}, "figures": {{\n{lines}\n}}}}\n')
        os.replace(part, self.path)  # an interrupt leaves the old file or the new one


@contextmanager
def warnings_noted() -> Iterator[list[str]]:
    """Collects warnings, so that short or faulty runs are reported with their results and do not stop."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield notes
        finally:
            notes += [f"{entry.category.__name__}: {entry.message}" for entry in caught]


def data_root() -> str | None:
    """The folder with real data, if there is one."""
    root = os.environ.get(datasets.DATA_VARIABLE, "../shared/data")
    return root if Path(root).is_dir() else None


def brief(figures: Mapping[str, Any]) -> str:
    """The first few numbers, for a line of progress."""
    numbers = [f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, (int, float))]
    return ": " + ", ".join(numbers[:4]) if numbers else ""


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1; the latter NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def plus_minus(values: Sequence[float], form: str = ".4f") -> str:
    """``mean ± sd``, or the value if there is only one."""
    if not values:
        return ""
    mean, sd = mean_and_sd(values)
    return f"{mean:{form}}" if math.isnan(sd) else f"{mean:{form}} ± {sd:{form}}"


def write_table(options: Options, name: str, text: str) -> Path:
    """Puts a table into ``paper_tables.md``, replacing that of an earlier run with these options."""
    path = options.results / "paper_tables.md"
    begin, end = (f"<!-- {edge} {name} {options.label} -->" for edge in ("begin", "end"))
    known = path.read_text() if path.exists() else "# The paper's experiments\n"
    before, found, rest = known.partition(begin)
    after = rest.partition(end)[2] if found else ""
    after = f"\n{after.lstrip()}" if after.strip() else ""
    path.write_text(f"{before.rstrip()}\n\n{begin}\n{text.strip()}\n{end}\n{after}")
    return path
