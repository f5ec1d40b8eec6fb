# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A run in a few lines, and its summary by site where there are too many numbers for a row each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro.infer
import torch
from pyro.infer.mcmc.util import summary as pyro_summary
from torch import Tensor

from pyro_apd.chains.summary import sampler_summary, summary_lines

if TYPE_CHECKING:
    from pyro_apd.chains.driver import MCMC

#: Numbers of a draw up to which each has a row of Pyro's table.
MOST_ROWS = 50
# Draws of a chain of which Pyro has effective sizes and R-hats.
_FEWEST_DRAWS = 4
# Numbers of a site by which its effective sizes and R-hats are found, evenly spaced.
_MOST_ENTRIES = 200
_COLUMNS = ("mean", "sd", "n_eff, least", "median", "r_hat, median", "largest")


def shown(mcmc: MCMC) -> str:
    """Kernel, chains and draws; after a run also what it warned of."""
    lines = [
        f"{type(mcmc).__name__}: {mcmc.num_chains} x {mcmc.num_samples} draws after {mcmc.warmup_steps} of warm-up"
    ]
    # A kernel of others may show its address alone.
    kernel = repr(mcmc.kernel)
    if kernel == object.__repr__(mcmc.kernel):
        kernel = type(mcmc.kernel).__name__
    lines += [f"  {line}" for line in kernel.splitlines()]
    if mcmc.store is not None:
        missing = f", without chains {mcmc.missing_chains}" if mcmc.missing_chains else ""
        lines.append(
            f"  {mcmc.store.complete_part()[1]} draws of {mcmc.store.layout.size:,} numbers per chain{missing}"
        )
    elif getattr(mcmc, "_samples", None) is None:
        lines.append("  not run yet")
    return "\n".join(lines + [f"  {line}" for line in summary_lines(sampler_summary(mcmc))[1:]])


def print_summary(mcmc: MCMC, prob: float = 0.9) -> None:
    """Prints Pyro's table where a draw has few numbers, else a row per site, and the run in a few lines.

    :param float prob: of the intervals in Pyro's table.
    :raises ValueError: before ``run``.

    Example::

        mcmc.summary()
    """
    draws = mcmc.get_samples(group_by_chain=True)
    if sum(value[0, 0].numel() for value in draws.values()) <= MOST_ROWS:
        pyro.infer.MCMC.summary(mcmc, prob)
        return
    # Prints, as Pyro's method of this name does.
    sys.stdout.write(f"{mcmc!r}\n\n{site_table(draws)}\n")


def site_table(samples_by_site: Mapping[str, Tensor]) -> str:
    """A row per site: means and standard deviations of its numbers, on average, effective sizes and R-hats.

    :param samples_by_site: ``(C, S, ...)``.
    """
    width = max(10, *map(len, samples_by_site))
    lines = [f"{'site':<{width}} {'shape':>14}" + "".join(f"{name:>15}" for name in _COLUMNS)]
    for name, value in samples_by_site.items():
        shape = "x".join(map(str, value.shape[2:])) or "1"
        row = "".join(f"{number:>15.4g}" for number in _row(value))
        lines.append(f"{name:<{width}} {shape:>14}{row}")
    return "\n".join(lines)


def _row(value_CSX: Tensor) -> list[float]:
    value_CSE = value_CSX.reshape(*value_CSX.shape[:2], -1)
    num_draws, size = value_CSE.shape[1:]
    if size == 0:
        return [float("nan")] * len(_COLUMNS)
    mean, sd = float(value_CSE.mean()), float(value_CSE.flatten(0, 1).std(0).mean())
    entry_E = torch.linspace(0, size - 1, min(size, _MOST_ENTRIES), dtype=torch.float64).round().long()
    if num_draws < _FEWEST_DRAWS:
        return [mean, sd] + [float("nan")] * (len(_COLUMNS) - 2)
    found: dict[str, Any] = pyro_summary({"site": value_CSE[..., entry_E.to(value_CSE.device)]})["site"]
    # Of draws that hardly move, rounding makes Pyro's variances negative.
    n_eff, r_hat = found["n_eff"].float(), found["r_hat"].float()
    n_eff = n_eff.where(n_eff > 0, torch.nan)
    return [mean, sd, *map(float, (n_eff.min(), n_eff.median(), r_hat.median(), r_hat.max()))]
