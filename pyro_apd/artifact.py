# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The file that a distilled posterior is: safetensors with a JSON description, as ``docs/format.md`` states it.

Nothing in a file is executed or unpickled, and nothing is allocated before its size was checked against the file's.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pyro_apd.errors import ArtifactError
from pyro_apd.layout import Layout

#: The one key of the safetensors metadata that is ours; its value is JSON.
METADATA_KEY = "pyro_apd"
FORMAT_VERSION = 1

# A header longer than this describes no posterior; refusing it keeps a hostile file from filling memory.
_MAX_HEADER = 16 * 2**20
_DTYPES = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}


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
    """

    layout: Layout
    generator: dict[str, Any]
    tensors: dict[str, Tensor]
    num_samples: int = 100
    metadata: dict[str, Any] = field(default_factory=dict)
    training_log: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def to_bytes(artifact: Artifact) -> bytes:
    """The file's contents: the same artifact always gives the same bytes.

    :raises ValueError: if metadata do not fit into JSON.
    """
    description = {
        "format": FORMAT_VERSION,
        "versions": artifact.versions or _versions(),
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
    tensors = {name: value.detach().cpu().contiguous() for name, value in sorted(artifact.tensors.items())}
    return bytes(save(tensors, {METADATA_KEY: text}))


def write(artifact: Artifact, path: str | os.PathLike[str]) -> None:
    """Writes the file at once or not at all: an interruption leaves what was there before."""
    path, contents = Path(path), to_bytes(artifact)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Artifact:
    """Reads what :func:`write` wrote.

    :raises ArtifactError: if the file is truncated, damaged, of another kind, or of a newer format.
    :raises FileNotFoundError: if there is none.
    """
    path = Path(path)
    description = _checked_description(_header(path), path)
    try:
        tensors = load_file(path, device=str(device))
    except Exception as error:  # whatever safetensors finds wrong
        raise ArtifactError(f"{path} is damaged: {error}. Save the posterior again, or fetch the file anew.") from error
    return Artifact(tensors=tensors, **description)


def read_description(path: str | os.PathLike[str]) -> Artifact:
    """The same without the tensors, however large they are.

    :raises ArtifactError: as :func:`read`.
    """
    path = Path(path)
    return Artifact(tensors={}, **_checked_description(_header(path), path))


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raises :class:`ArtifactError` unless ``tensors`` have the names and shapes of ``expected``, and are finite."""
    missing, surplus = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or surplus:
        raise ArtifactError(f"{path} does not fit its own description: tensors missing {missing}, not known {surplus}.")
    for name, value in tensors.items():
        if value.shape != expected[name].shape or value.is_floating_point() != expected[name].is_floating_point():
            raise ArtifactError(
                f"{path}: tensor '{name}' is {value.dtype} of shape {tuple(value.shape)}, but its description asks for "
                f"{expected[name].dtype} of shape {tuple(expected[name].shape)}."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArtifactError(f"{path}: tensor '{name}' holds NaN or infinite values.")


def _header(path: Path) -> dict[str, Any]:
    """The safetensors header, after checks that sizes and offsets are those of this very file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > min(size - 8, _MAX_HEADER):
            raise ArtifactError(
                f"{path} is not a safetensors file, or is truncated: it has {size} bytes, its header claims {length}."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} is damaged: its header is a {type(header).__name__}, not a table of tensors.")
    available, position = size - 8 - length, 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    try:
        entries.sort(key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            position = _checked_span(path, name, entry, position)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: its table of tensors is malformed ({error!r}).") from error
    if position != available:
        raise ArtifactError(
            f"{path} is truncated or damaged: its tensors take {position} bytes, and {available} are there. Save the "
            "posterior again, or fetch the file anew."
        )
    return header


def _checked_span(path: Path, name: str, entry: Mapping[str, Any], position: int) -> int:
    start, stop = entry["data_offsets"]
    count, width = 1, _DTYPES[entry["dtype"]][1]
    for n in entry["shape"]:
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise ValueError(f"shape {entry['shape']}")
        count *= n
    if start != position or stop - start != count * width:
        raise ArtifactError(f"{path} is damaged: tensor '{name}' does not fill the bytes that it claims.")
    return int(stop)


def _checked_description(header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ArtifactError(
            f"{path} is a safetensors file, but no distilled posterior. Accepted is what DistilledPosterior.save wrote."
        )
    try:
        description = json.loads(text)
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
    kinds = {"layout": list, "generator": dict, "num_samples": int, "metadata": dict, "training_log": dict}
    kinds["versions"] = dict
    for name, kind in kinds.items():
        if not isinstance(description.get(name), kind):
            raise ArtifactError(f"{path} is damaged: '{name}' in its description is not a {kind.__name__}.")
    try:
        layout = Layout.from_json(description["layout"])
    except (ValueError, TypeError, RuntimeError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"{path} describes sites that cannot be: {error}") from error
    return {**{name: description[name] for name in kinds}, "layout": layout}


def _versions() -> dict[str, str]:
    import pyro

    import pyro_apd

    return {"pyro_apd": pyro_apd.__version__, "torch": torch.__version__, "pyro": pyro.__version__}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
