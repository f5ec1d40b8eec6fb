# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The file that a distilled posterior is: safetensors with a JSON description, as ``docs/format.md`` states it.

Nothing in a file is executed or unpickled, and nothing is allocated before its size was checked against the file's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_apd._version import __version__
from pyro_apd.errors import ArtifactError
from pyro_apd.generators import precision
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import container
from pyro_apd.posterior.container import METADATA_KEY, Entry

__all__ = [
    "FORMAT_VERSION",
    "MAX_NUM_SAMPLES",
    "METADATA_KEY",
    "Artifact",
    "read",
    "read_description",
    "read_table",
    "to_bytes",
    "write",
]

FORMAT_VERSION = 2

#: Largest default number of draws that a file may state: loading a file must not make its first use fill memory.
MAX_NUM_SAMPLES = 1_000_000

# What building something from a description raises where the description makes no sense.
_NONSENSE = (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, OverflowError, RecursionError)

#: From a generator's configuration, its parameters and buffers by name, on the meta device or any other.
Expect = Callable[[dict[str, Any]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Artifact:
    """What a file holds.

    :ivar Layout layout: the latent sites.
    :ivar dict generator: the generator's configuration, from which it is built.
    :ivar dict tensors: its parameters and buffers by name.
    :ivar int num_samples: how many draws the posterior gives by default.
    :ivar dict metadata: figures of the training, seed, notes: anything that JSON holds.
    :ivar dict training_log: a list of numbers by name.
    :ivar dict versions: of what wrote the file.
    :ivar str dtype: precision in which the file keeps the tensors, one of :data:`pyro_apd.generators.precision.DTYPES`.
    :ivar int format: version of the file that was read; what is written has :data:`FORMAT_VERSION`.
    """

    layout: Layout
    generator: dict[str, Any]
    tensors: dict[str, Tensor]
    num_samples: int = 100
    metadata: dict[str, Any] = field(default_factory=dict)
    training_log: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    format: int = FORMAT_VERSION


def to_bytes(artifact: Artifact) -> bytes:
    """The file's contents: the same artifact always gives the same bytes.

    :raises ValueError: if metadata do not fit into JSON, or ``num_samples`` is out of range.
    """
    if not 1 <= artifact.num_samples <= MAX_NUM_SAMPLES:
        raise ValueError(f"num_samples={artifact.num_samples} must be from 1 to {MAX_NUM_SAMPLES:,} to be saved.")
    description = {
        "format": FORMAT_VERSION,
        "versions": artifact.versions or _versions(),
        "dtype": artifact.dtype,
        "layout": artifact.layout.to_json(),
        "generator": artifact.generator,
        "num_samples": artifact.num_samples,
        "metadata": artifact.metadata,
        "training_log": artifact.training_log,
    }
    try:
        text = json.dumps(description, sort_keys=True, allow_nan=True)
    except TypeError as error:
        raise ValueError(f"metadata must be what JSON holds (numbers, strings, lists, dicts): {error}.") from error
    return container.pack(precision.encode(artifact.tensors, artifact.dtype), text)


def write(artifact: Artifact, path: str | os.PathLike[str]) -> None:
    """Writes the file at once or not at all: an interruption leaves what was there before.

    :raises ValueError: as :func:`to_bytes`.
    """
    container.write(to_bytes(artifact), path)


def read(path: str | os.PathLike[str], expect: Expect | None = None) -> Artifact:
    """Reads what :func:`write` wrote, and :func:`write` of older versions; tensors are on the CPU.

    :param expect: what tensors the generator takes; the file's are held to it before any is allocated.
    :raises ArtifactError: if the file is truncated, damaged, of another kind, or of a newer format.
    :raises FileNotFoundError: if there is none.
    """
    path = Path(path)
    header = container.read_header(path)
    description = _checked_description(header, path)
    table = _decoded_table(header.table, description["dtype"], path)
    if expect is not None:
        try:
            expected = expect(description["generator"])
        except _NONSENSE as error:
            raise ArtifactError(f"{path} describes a generator that cannot be built: {error}") from error
        _check_table(table, expected, path)
    tensors = container.read_tensors(path, header)
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArtifactError(f"{path}: tensor '{name}' holds NaN or infinite values.")
    return Artifact(tensors=precision.decode(tensors, description["dtype"]), **description)


def read_description(path: str | os.PathLike[str]) -> Artifact:
    """The same without the tensors, however large they are.

    :raises ArtifactError: as :func:`read`, but for damage to the tensors, which are not looked at.
    :raises FileNotFoundError: if there is none.
    """
    path = Path(path)
    return Artifact(tensors={}, **_checked_description(container.read_header(path), path))


def read_table(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Names, dtypes and shapes of the tensors as they are stored.

    :raises ArtifactError: as :func:`read_description`.
    :raises FileNotFoundError: if there is none.
    """
    return container.read_header(Path(path)).table


def _decoded_table(table: Mapping[str, Entry], dtype: str, path: Path) -> dict[str, Entry]:
    """The table without scales of rows, which belong to matrices of integers that stand for floating-point numbers."""
    if dtype != "int8":
        return dict(table)
    decoded = {}
    for name, entry in table.items():
        scale = table.get(name.removesuffix(precision.SCALE_SUFFIX) + precision.SCALE_SUFFIX)
        if scale is not None and precision.is_of_chunks(scale.shape):
            decoded[name] = entry
            continue
        scale = table.get(name + precision.SCALE_SUFFIX)
        if scale is not None:
            if (entry.code, len(entry.shape), scale.code, scale.shape) != ("I8", 2, "F32", entry.shape[:1]):
                raise ArtifactError(
                    f"{path} is damaged: tensor '{name}' is {entry.code} of shape {entry.shape}, with scales "
                    f"{scale.code} of shape {scale.shape}."
                )
            entry = replace(entry, code="F32")
        if not precision.is_scale(name, table):
            decoded[name] = entry
    return decoded


def _check_table(table: Mapping[str, Entry], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises :class:`ArtifactError` unless the tensors in a file have the names, shapes and kinds of ``expected``."""
    missing, surplus = sorted(set(expected) - set(table)), sorted(set(table) - set(expected))
    if missing or surplus:
        raise ArtifactError(f"{path} does not fit its own description: tensors missing {missing}, not known {surplus}.")
    for name, value in expected.items():
        entry = table[name]
        if entry.dtype.is_floating_point != value.is_floating_point() or entry.shape != tuple(value.shape):
            raise ArtifactError(
                f"{path}: tensor '{name}' is {entry.dtype} of shape {entry.shape}, but its description asks for "
                f"{value.dtype} of shape {tuple(value.shape)}."
            )


def _checked_description(header: container.Header, path: Path) -> dict[str, Any]:
    try:
        description = container.parse_json(header.text)
        version = description["format"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: its description cannot be read ({error!r}).") from error
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{path} is damaged: its format version is {version!r}.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}; this pyro_apd reads up to {FORMAT_VERSION}. Update it: pip install "
            "-U pyro-apd."
        )
    if (version > 1) != (header.digest is not None):
        raise ArtifactError(
            f"{path} is damaged: of version {version}, it {'lacks' if version > 1 else 'has'} a digest."
        )
    if version == 1:
        description.setdefault("dtype", "float32")
    kinds = {"layout": list, "generator": dict, "num_samples": int, "metadata": dict, "training_log": dict}
    kinds |= {"versions": dict, "dtype": str}
    for name, kind in kinds.items():
        if not isinstance(description.get(name), kind):
            raise ArtifactError(f"{path} is damaged: '{name}' in its description is not a {kind.__name__}.")
    if description["dtype"] not in precision.DTYPES or (version == 1 and description["dtype"] != "float32"):
        raise ArtifactError(
            f"{path} is damaged: its dtype {description['dtype']!r} is none of {', '.join(precision.DTYPES)}."
        )
    if isinstance(description["num_samples"], bool) or not 1 <= description["num_samples"] <= MAX_NUM_SAMPLES:
        raise ArtifactError(f"{path} is damaged: num_samples is {description['num_samples']!r:.40}.")
    layout = _checked_layout(description["layout"], header.file_size, path)
    return {**{name: description[name] for name in kinds}, "layout": layout, "format": version}


def _checked_layout(sites: list[Any], file_size: int, path: Path) -> Layout:
    try:
        layout = Layout.from_json(sites)
    except _NONSENSE as error:
        raise ArtifactError(f"{path} describes sites that cannot be: {error}") from error
    # A value may have a few times the numbers that determine it (a Cholesky factor of correlations has four times as
    # many at most), but a simplex of one class, say, has any number out of none.
    constrained = sum(math.prod(site.shape) for site in layout)
    if constrained > 4 * layout.size + file_size:
        raise ArtifactError(f"{path} describes sites of {constrained} numbers, far more than its generator determines.")
    return layout


def _versions() -> dict[str, str]:
    import pyro

    return {"pyro_apd": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
