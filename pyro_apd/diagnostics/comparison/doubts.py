# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Reasons not to trust a comparison that shows no loss: what the run and the distillation warned of."""

from __future__ import annotations

from typing import Any

from pyro_apd.chains.summary import sampler_summary

# Warnings are cut after so many characters: their first sentence, mostly.
_WIDTH = 240


def doubts(mcmc: object, posterior: object) -> list[str]:
    """Sentences, the chain's first; empty if nothing is known against either.

    :param mcmc: chains, of which only an ``MCMC`` and a stored run know how they were made. In place of others counts
        what the posterior notes about the run that was distilled.
    :param posterior: its ``metadata`` are looked at, where it has some.
    """
    metadata = getattr(posterior, "metadata", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    own = sampler_summary(mcmc) or metadata.get("sampler")
    found = _of_run(own) if isinstance(own, dict) else []
    warnings = metadata.get("warnings")
    if isinstance(warnings, list):
        found += [f"The distillation warned: {_first(text)}" for text in warnings]
    return found


def _of_run(summary: dict[str, Any]) -> list[str]:
    found = []
    excursions, warnings = summary.get("excursions"), summary.get("warnings")
    if isinstance(warnings, list):
        found += [f"The run warned: {_first(text)}" for text in warnings]
    if isinstance(excursions, int) and excursions and not found:
        found.append(f"The chains made {excursions} excursion{'s' * (excursions != 1)} to where they do not belong.")
    return found


def _first(text: object) -> str:
    """The first sentence of a warning."""
    first = str(text).partition(". ")[0]
    first = first if len(first) <= _WIDTH else f"{first[: _WIDTH - 3]}..."
    return first if first.endswith(".") else f"{first}."
