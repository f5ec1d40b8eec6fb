# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How the draws of a run were made: kernel, step size, excursions, warnings. Files and reports say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_apd.predictive.draws import kernel_of


def sampler_summary(mcmc: object) -> dict[str, Any]:
    """Kernel, step size, excursions and warnings of an ``MCMC`` after ``run``, as JSON values; else empty.

    :param mcmc: a :class:`pyro.infer.MCMC`, a run read from a file, or anything else, of which nothing is known.
    :returns: ``kernel``, its name; ``step_size``, of the last draw of the first chain; ``is_automatic``, whether it was
        chosen during warm-up; ``excursions``, the number of draws that are
        :mod:`excursions <pyro_apd.kernels.adaptation.excursions>`, over all chains; and ``warnings``, what the run
        warned of, each text once. A kernel of others has only its name.

    Example::

        sampler_summary(mcmc)
        # {"kernel": "SGHMC", "step_size": 3.1e-4, "is_automatic": True, "excursions": 0, "warnings": []}
    """
    kernel = kernel_of(mcmc)
    if kernel is None:
        stored = getattr(mcmc, "sampler_summary", None)
        return dict(stored) if isinstance(stored, Mapping) else {}
    found: dict[str, Any] = {"kernel": type(kernel).__name__}
    # The driver's own record: its public diagnostics() would first compute R-hat of every weight.
    records = getattr(mcmc, "_diagnostics", None)
    records = [record for record in records or () if isinstance(record, Mapping)] if _is_list(records) else []
    sizes = [record["step_size"] for record in records if _has_values(record.get("step_size"))]
    if sizes:
        found["step_size"] = float(sizes[0][-1])
        found["is_automatic"] = getattr(kernel, "schedule", None) is None
    marked = [record["excursions"] for record in records if _is_list(record.get("excursions"))]
    if marked:
        found["excursions"] = sum(len(draws) for draws in marked)
    texts = [str(text) for record in records for text in record.get("warnings", ())]
    diverged = list(getattr(mcmc, "diverged_chains", ()))
    if diverged:
        texts.append(f"Chains {diverged} diverged, and what they drew from there on is left out.")
    if hasattr(kernel, "schedule"):
        found["warnings"] = list(dict.fromkeys(texts))
    return found


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The same for people: one line about kernel, step size and excursions, and one per warning."""
    if not summary:
        return []
    text = str(summary.get("kernel"))
    if "step_size" in summary:
        chosen = ", chosen during warm-up" if summary.get("is_automatic") else ""
        text += f", step size {summary['step_size']:.3g}{chosen}"
    if "excursions" in summary:
        text += f"; {summary['excursions'] or 'no'} excursion{'s' * (summary['excursions'] != 1)}"
    if "warnings" not in summary:
        return [text]
    return [text if summary["warnings"] else f"{text}; no warnings", *(f"warning: {w}" for w in summary["warnings"])]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _has_values(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and len(value) > 0
