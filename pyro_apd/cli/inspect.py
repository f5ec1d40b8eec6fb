# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Description of a file of a distilled posterior, for ``pyro-apd inspect``."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from pyro_apd.chains.summary import summary_lines
from pyro_apd.generators import SubspaceGenerator
from pyro_apd.posterior import artifact, integers
from pyro_apd.posterior.artifact import Artifact
from pyro_apd.posterior.integers import CODE_NAME
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime.tensor_file import Entry

# Parts of the default generator, by the last names of their tensors.
_PARTS = {
    "frames": {"frame", "frame_step", "unit"},
    "means": {"mean", "offset", "offset_step"},
    "bases": {"basis", "reduction"},
    "null parts": {"null", "null_step", "null_reduction", "null_rows", "null_columns"},
    "modes": {"modes", "spread"},
    "noise": {"noise_rows", "noise_columns", "noise_cap"},
}
# Line of the description before which they are inserted.
_PARTS_LINE = 2
# Longer values are shortened, and of more frozen tensors the first are named.
_WIDTH, _NUM_NAMES = 100, 8
_WARNING_WIDTH = 1000
# Of tables in the metadata.
_MEANINGS = {
    "calibration": "factor of the spread around modes, and cap of noise",
    "residuals": "logarithms of draws' disagreement relative to the chain's, by inputs; 0 is the same",
    "metrics": "on held-out draws: distance in units of their spread, and ratios of generator to chain",
    "held_out": "of every so many draws, those from the start on",
}


def describe(path: str | os.PathLike[str]) -> str:
    """Several lines of text: format, versions, sites with their transforms, generator, tensors, metadata.

    The tensors are loaded too, so that a damaged file raises.

    :raises ArtifactError: if the file is truncated, damaged, of another kind, or of a newer format.
    :raises FileNotFoundError: if there is none.
    """
    contents, table = artifact.read_description(path), artifact.read_table(path)
    posterior = DistilledPosterior.load(path)
    lines = _lines(path, contents, table)
    if isinstance(posterior.generator, SubspaceGenerator):
        lines.insert(_PARTS_LINE, _parts(path, posterior.generator, table))
    return "\n".join(lines)


def _lines(path: str | os.PathLike[str], contents: Artifact, table: dict[str, Entry]) -> list[str]:
    versions = ", ".join(f"{_printable(name)} {_printable(value)}" for name, value in contents.versions.items())
    lines = [
        f"{path}: distilled posterior, format {contents.format}, {Path(path).stat().st_size:,} bytes, {contents.dtype}",
        f"written by  {versions}",
        f"draws       {contents.layout.size:,} numbers in {len(contents.layout)} sites; {contents.num_samples:,} by "
        "default",
    ]
    for site in contents.layout:
        transform = "" if site.is_real else f", {_printable(site.support)}, by {type(site.transform).__name__}"
        lines.append(f"  {_printable(site.name)} {list(site.shape)}{transform}")
    settings = ", ".join(f"{_printable(name)}={_printable(value)}" for name, value in contents.generator.items())
    lines.append(f"generator   {settings}")
    for name, entry in table.items():
        lines.append(f"  {_printable(name)} {list(entry.shape)} {entry.code}, {_num_bytes(entry):,} bytes")
    metadata = dict(contents.metadata)
    sampler = metadata.pop("sampler", None)
    if isinstance(sampler, dict):
        lines += _sampler(sampler)
    found = metadata.pop("warnings", None)
    if isinstance(found, list):
        lines += [f"warning     {_printable(text, width=_WARNING_WIDTH)}" for text in found]
    lines += [f"metadata    {'' if metadata else 'none'}".rstrip(), *_tree(metadata)]
    logs = ", ".join(f"{_printable(name)} ({len(values):,} numbers)" for name, values in contents.training_log.items())
    lines.append(f"training    {logs or 'no log'}")
    lines.append(f"frozen      {_frozen(contents, table)}")
    return lines


def _sampler(summary: dict[str, Any]) -> list[str]:
    """Kernel, step size and warnings of the run that was distilled; warnings are not shortened."""
    try:
        first, *others = summary_lines(summary)
    except (TypeError, ValueError):  # other entries than this package writes
        first, others = str(summary), []
    return [f"sampler     {_printable(first)}", *(f"  {_printable(text, width=_WARNING_WIDTH)}" for text in others)]


def _parts(path: str | os.PathLike[str], generator: SubspaceGenerator, table: dict[str, Entry]) -> str:
    """What each part of the default generator takes of the file."""
    stored, num_bytes = artifact.read(path).tensors, {name: float(_num_bytes(entry)) for name, entry in table.items()}
    if CODE_NAME in stored:
        del num_bytes[CODE_NAME]
        num_bytes |= integers.sizes(stored[CODE_NAME], generator.state_dict())
    costs = dict.fromkeys([*_PARTS, "rest"], 0.0)
    for name, size in num_bytes.items():
        own = name.rpartition(".")[2]
        costs[next((part for part, names in _PARTS.items() if own in names), "rest")] += size
    costs["rest"] += Path(path).stat().st_size - sum(num_bytes.values())
    shown = [f"{part} {round(size):,}" for part, size in costs.items()]
    return f"parts       in bytes: {', '.join(shown)}"


def _num_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _frozen(contents: Artifact, table: dict[str, Entry]) -> str:
    """What the file says about frozen parameters and buffers of the model."""
    if contents.frozen is None:
        return "not known, and not checked"
    names = ", ".join(_printable(name) for name in list(contents.frozen.read)[:_NUM_NAMES]) or "none"
    more = ", ..." if len(contents.frozen.read) > _NUM_NAMES else ""
    is_whole = any(name.startswith(artifact.FROZEN_PREFIX) for name in table)
    return f"{names}{more}; {'numbers' if is_whole else 'digests only'}" if contents.frozen.read else names


def as_json(path: str | os.PathLike[str]) -> str:
    """The description in a file as indented JSON, without the training log's numbers.

    :raises ArtifactError: as :func:`describe`, but for damage to the tensors.
    :raises FileNotFoundError: if there is none.
    """
    contents = artifact.read_description(path)
    description = {
        "format": contents.format,
        "versions": contents.versions,
        "dtype": contents.dtype,
        "layout": contents.layout.to_json(),
        "generator": contents.generator,
        "num_samples": contents.num_samples,
        "metadata": contents.metadata,
        "training_log": {name: len(values) for name, values in contents.training_log.items()},
        "compute_dtype": contents.compute_dtype,
        "frozen": None if contents.frozen is None else contents.frozen.to_json(),
    }
    return json.dumps(description, indent=1)


def _tree(value: dict[str, Any], indent: str = "  ") -> list[str]:
    """Nested tables line by line."""
    lines = []
    for name, item in value.items():
        if isinstance(item, dict) and item and len(indent) < 20:
            meaning = f" ({_MEANINGS[name]})" if name in _MEANINGS else ""
            lines += [f"{indent}{_printable(name)}{meaning}", *_tree(item, indent + "  ")]
        else:
            lines.append(f"{indent}{_printable(name)}: {_printable(item)}")
    return lines


def _printable(value: object, width: int = _WIDTH) -> str:
    """On one line, shortened, and without control characters: a file must not write to someone's terminal."""
    text = value if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= width else f"{text[: width - 3]}..."
