# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior in a few lines, for ``print``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_apd.posterior.posterior import DistilledPosterior

# Sites that are named; numbers from which on the file is not encoded, which takes seconds, only to say its size.
_NUM_NAMES, _MANY = 4, 3_000_000


def shown(posterior: DistilledPosterior) -> str:
    """Sites, size of the file, generator, draws that it was fitted to, metrics on held-out draws, and warnings."""
    layout, metadata = posterior.layout, posterior.metadata
    names = ", ".join(layout.names[:_NUM_NAMES]) + (", ..." if len(layout) > _NUM_NAMES else "")
    settings = {name: value for name, value in posterior.generator.config.items() if isinstance(value, int)}
    lines = [
        f"{type(posterior).__name__}: {layout.size:,} numbers in {len(layout)} sites ({names})",
        f"  file       {_size(posterior)}",
        f"  generator  {type(posterior.generator).__name__}, "
        + ", ".join(f"{name}={value}" for name, value in settings.items() if name != "output_size"),
    ]
    if "num_draws" in metadata:
        lines.append(f"  fitted to  {metadata.get('num_chains')} chains of {metadata['num_draws']} draws")
    if isinstance(metadata.get("distinct_draws"), int):
        lines.append(f"  draws      {metadata['distinct_draws']:,} distinct networks, up to noise")
    metrics = metadata.get("metrics")
    if isinstance(metrics, dict):
        lines.append(f"  held out   {', '.join(f'{name} {value}' for name, value in sorted(metrics.items()))}")
    warnings = metadata.get("warnings")
    if isinstance(warnings, list):
        lines += [f"  warning    {text}" for text in warnings]
    return "\n".join(lines)


def _size(posterior: DistilledPosterior) -> str:
    if posterior.layout.size > _MANY:
        return posterior.storage_dtype
    try:
        size = posterior.num_bytes
    except (TypeError, ValueError):  # metadata that cannot be saved
        return posterior.storage_dtype
    networks = size / (posterior.layout.size * posterior.dtype.itemsize)
    return f"{size:,} bytes ({networks:.3g} networks), {posterior.storage_dtype}"
