# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The file of a distilled posterior: safetensors with a JSON description, see ``docs/format.md``.

Nothing in a file is executed or unpickled, and nothing is allocated before its size is checked against the file's.
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
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import integers
from pyro_apd.runtime import tensor_file
from pyro_apd.runtime.checks import is_integer
from pyro_apd.runtime.tensor_file import Entry, FileKind, Header

__all__ = [
    "FORMAT_VERSION",
    "FROZEN_PREFIX",
    "KIND",
    "MAX_NUM_SAMPLES",
    "METADATA_KEY",
    "Artifact",
    "read",
    "read_description",
    "read_table",
    "to_bytes",
    "write",
]

FORMAT_VERSION = 3
_FIRST_VERSION = 2  # the first one that is read

#: The key of the description in the metadata of safetensors.
METADATA_KEY = "pyro_apd"
KIND = FileKind(
    METADATA_KEY,
    "distilled posterior",
    "what DistilledPosterior.save wrote",
    "Save the posterior again, or download the file again.",
    ArtifactError,
    header_allowance=2**19,
)
#: Before the name of a frozen tensor of the model, in the table of tensors.
FROZEN_PREFIX = "frozen#"

#: Largest default number of draws that a file may state.
MAX_NUM_SAMPLES = 1_000_000
# So that drawing by default from a file does not fill memory: bytes of these draws, by byte of the file's tensors, and
# for any file. A hundred draws take up to 400 times the bytes of one network in a byte per weight.
_DRAWN_PER_BYTE, _DRAWN_ALWAYS = 1000, 256 * 2**20
# Larger numbers are not shown: Python writes none of more than 4,300 digits.
_MOST_SHOWN = 10**30
# Tensors that each block of noise, layer or matrix of a generator has in the file, at least.
_TENSORS_EACH = {"noise": 4, "layers": 0, "matrices": 5}
# How many of these a generator may have, by site and in any file.
_PARTS_PER_SITE, _PARTS_ALWAYS = 4, 256
_COMPUTE_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Errors of building something from a description that makes no sense.
_NONSENSE = (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, OverflowError, RecursionError)

#: From a generator's configuration to its parameters and buffers by name, on the meta device or any other.
Expect = Callable[[dict[str, Any]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Artifact:
    """Contents of a file.

    :ivar Layout layout: the latent sites.
    :ivar dict generator: the generator's configuration.
    :ivar dict tensors: its parameters and buffers by name.
    :ivar int num_samples: default number of draws.
    :ivar dict metadata: metrics of the training, seed, notes: anything that JSON holds.
    :ivar dict training_log: a list of numbers by name.
    :ivar dict versions: of the software that wrote the file.
    :ivar str dtype: precision in which the file keeps the tensors, one of :data:`pyro_apd.generators.precision.DTYPES`.
    :ivar int format: version of the file that was read; files are written with :data:`FORMAT_VERSION`.
    :ivar compute_dtype: dtype in which the generator computes, that of the model; None in files that do not say it.
    :ivar frozen: frozen tensors of the model; None where they are not known.
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
    compute_dtype: str | None = None
    frozen: FrozenTensors | None = None


def to_bytes(artifact: Artifact) -> bytes:
    """The contents of the file: the same artifact always gives the same bytes.

    :raises ValueError: if metadata do not fit into JSON, or ``num_samples`` is out of range.
    """
    return tensor_file.to_bytes(KIND, *_contents(artifact, {}))


def write(artifact: Artifact, path: str | os.PathLike[str], frozen_values: Mapping[str, Tensor] | None = None) -> None:
    """Writes the file, atomically: a failure or interruption leaves an existing file unchanged.

    :param frozen_values: frozen tensors of the model whose numbers are to be in the file, by name.
    :raises ValueError: as :func:`to_bytes`, or if a frozen tensor has a dtype that files do not hold.
    :raises OSError: if the file cannot be written.
    """
    try:
        tensor_file.write(KIND, *_contents(artifact, frozen_values or {}), path)
    except TypeError as error:
        raise ValueError(f"The posterior cannot be saved: {error}") from error


def _contents(artifact: Artifact, frozen_values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Tensors and description as the file keeps them."""
    if not 1 <= artifact.num_samples <= MAX_NUM_SAMPLES:
        raise ValueError(f"num_samples={artifact.num_samples} must be from 1 to {MAX_NUM_SAMPLES:,} to be saved.")
    if not all(isinstance(values, (list, tuple)) for values in artifact.training_log.values()):
        raise ValueError("training_log must be lists of numbers by name.")
    tensors = integers.packed(artifact.tensors, precision.encode(artifact.tensors, artifact.dtype))
    problem = _endless_draws(artifact.layout, artifact.num_samples, _num_bytes(tensors))
    if problem:
        raise ValueError(f"{problem} Set posterior.num_samples lower, and ask get_samples() for more where needed.")
    tensors |= {FROZEN_PREFIX + name: value for name, value in frozen_values.items()}
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
    if artifact.compute_dtype is not None:
        description["compute_dtype"] = artifact.compute_dtype
    if artifact.frozen is not None:
        description["frozen"] = artifact.frozen.to_json()
    try:
        text = json.dumps(description, sort_keys=True, allow_nan=True)
    except TypeError as error:
        raise ValueError(f"metadata must be what JSON holds (numbers, strings, lists, dicts): {error}.") from error
    return tensors, text


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _endless_draws(layout: Layout, num_samples: int, num_bytes: int) -> str | None:
    """What is wrong if draws by default would take far more memory than a file with so many bytes of tensors."""
    drawn = 4 * num_samples * sum(math.prod(site.shape) for site in layout)
    accepted = max(_DRAWN_ALWAYS, _DRAWN_PER_BYTE * num_bytes)
    if drawn <= accepted:
        return None
    drawn = min(drawn, _MOST_SHOWN)
    return (
        f"num_samples is {num_samples:,}: draws by default would take {drawn / 1e6:,.0f} MB, and {accepted / 1e6:,.0f} "
        f"MB are accepted for {num_bytes:,} bytes of tensors."
    )


def read(path: str | os.PathLike[str], expect: Expect | None = None) -> Artifact:
    """Reads a file that :func:`write` wrote; tensors are on the CPU.

    :param expect: the tensors that the generator takes; those of the file are compared before any is allocated.
    :raises ArtifactError: if the file is truncated, damaged, of another kind, or of another format version.
    :raises FileNotFoundError: if there is none.
    """
    path = Path(path)
    header = tensor_file.read_header(KIND, path)
    description = _checked_description(header, path)
    own, frozen = _without_frozen(header.table, description["frozen"], path)
    table = _decoded_table(own, description["dtype"], path)
    _check_blocks(description["generator"], len(table), len(description["layout"]), path)
    expected: Mapping[str, Tensor] = {}
    if expect is not None:
        try:
            expected = expect(description["generator"])
        except _NONSENSE as error:
            raise ArtifactError(f"{path} describes a generator that cannot be built: {error}") from error
        try:
            table = integers.decoded_table(table, expected)
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged: {error}.") from error
        _check_table(table, expected, path)
    tensors = tensor_file.read_tensors(KIND, path, header)
    values = {name.removeprefix(FROZEN_PREFIX): tensors.pop(name) for name in frozen}
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArtifactError(f"{path}: tensor '{name}' holds NaN or infinite values.")
    if values:
        description["frozen"] = replace(description["frozen"], values=values)
        _check_frozen(description["frozen"], path)
    try:
        tensors = integers.unpacked(tensors, expected)
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}. {KIND.remedy}") from error
    return Artifact(tensors=precision.decode(tensors, description["dtype"]), **description)


def read_description(path: str | os.PathLike[str]) -> Artifact:
    """The same without the tensors, which are not read.

    :raises ArtifactError: as :func:`read`, except for damage to the tensors.
    :raises FileNotFoundError: if there is none.
    """
    path = Path(path)
    return Artifact(tensors={}, **_checked_description(tensor_file.read_header(KIND, path), path))


def read_table(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Names, dtypes and shapes of the tensors as they are stored.

    :raises ArtifactError: as :func:`read_description`.
    :raises FileNotFoundError: if there is none.
    """
    return tensor_file.read_header(KIND, Path(path)).table


def _without_frozen(
    table: Mapping[str, Entry], frozen: FrozenTensors | None, path: Path
) -> tuple[dict[str, Entry], list[str]]:
    """The generator's part of the table, and the names in it of frozen tensors."""
    names = [name for name in table if name.startswith(FROZEN_PREFIX)]
    stated = set() if frozen is None else {FROZEN_PREFIX + name for name in frozen.read}
    if names and set(names) != stated:
        raise ArtifactError(
            f"{path} does not fit its own description: it holds {len(names)} frozen tensors, such as {names[0]!r:.80}, "
            f"and describes {len(stated)}."
        )
    return {name: entry for name, entry in table.items() if not name.startswith(FROZEN_PREFIX)}, names


def _check_frozen(frozen: FrozenTensors, path: Path) -> None:
    if not frozen.intact_values():
        raise ArtifactError(f"{path} is damaged: frozen tensors do not have the digests that it states. {KIND.remedy}")


def _check_blocks(config: Mapping[str, Any], num_tensors: int, num_sites: int, path: Path) -> None:
    """Parts of a generator take longer to build than to write into a hostile file. They are of matrices of weights."""
    for name, tensors_each in _TENSORS_EACH.items():
        parts = config.get(name)
        count = len(parts) if isinstance(parts, list) else 0
        if count > _PARTS_ALWAYS + _PARTS_PER_SITE * num_sites or count * tensors_each > num_tensors:
            raise ArtifactError(
                f"{path} describes a generator with {count:,} entries in '{name}', too many for {num_sites:,} sites "
                f"and {num_tensors:,} tensors."
            )


def _decoded_table(table: Mapping[str, Entry], dtype: str, path: Path) -> dict[str, Entry]:
    """The table after decoding: without scales of rows, and with their matrices in floating point."""
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
        is_kind = entry.dtype.is_floating_point if value.is_floating_point() else entry.dtype == value.dtype
        if not is_kind or entry.shape != tuple(value.shape):
            raise ArtifactError(
                f"{path}: tensor '{name}' is {entry.dtype} of shape {entry.shape}, but its description asks for "
                f"{value.dtype} of shape {tuple(value.shape)}."
            )


def _checked_description(header: Header, path: Path) -> dict[str, Any]:
    try:
        description = tensor_file.parse_json(header.text)
        version = description["format"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: its description cannot be read ({error!r}).") from error
    if not is_integer(version) or version < 1:
        raise ArtifactError(f"{path} is damaged: its format version is {version!r}.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}; this pyro_apd reads up to {FORMAT_VERSION}. Update it: pip install "
            "-U pyro-apd."
        )
    if version < _FIRST_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, of before the first release; this pyro_apd reads from "
            f"{_FIRST_VERSION} on. Distil the posterior again."
        )
    if header.digest is None:
        raise ArtifactError(f"{path} is damaged: it lacks a digest. {KIND.remedy}")
    kinds = {"layout": list, "generator": dict, "num_samples": int, "metadata": dict, "training_log": dict}
    kinds |= {"versions": dict, "dtype": str}
    for name, kind in kinds.items():
        if not isinstance(description.get(name), kind):
            raise ArtifactError(f"{path} is damaged: '{name}' in its description is not a {kind.__name__}.")
    if description["dtype"] not in precision.DTYPES:
        raise ArtifactError(
            f"{path} is damaged: its dtype {description['dtype']!r} is none of {', '.join(precision.DTYPES)}."
        )
    _check_notes(description, path)
    layout = _checked_layout(description["layout"], header.file_size, path)
    num_samples = description["num_samples"]
    if not is_integer(num_samples) or not 1 <= num_samples <= MAX_NUM_SAMPLES:
        raise ArtifactError(f"{path} is damaged: num_samples is {num_samples!r:.40}.")
    problem = _endless_draws(layout, num_samples, header.file_size - header.data_start)
    if problem:
        raise ArtifactError(f"{path} is damaged: {problem}")
    compute_dtype = description.get("compute_dtype")
    if compute_dtype not in (None, *_COMPUTE_DTYPES):
        raise ArtifactError(f"{path} is damaged: its compute_dtype is {compute_dtype!r:.40}.")
    try:
        frozen = FrozenTensors.from_json(description["frozen"]) if "frozen" in description else None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    checked = {name: description[name] for name in kinds}
    return {**checked, "layout": layout, "format": version, "compute_dtype": compute_dtype, "frozen": frozen}


def _check_notes(description: Mapping[str, Any], path: Path) -> None:
    """Versions and training log are for people and plots, which expect them in their form."""
    if not all(isinstance(value, str) for value in description["versions"].values()):
        raise ArtifactError(f"{path} is damaged: 'versions' in its description are not texts.")
    if not all(isinstance(values, list) for values in description["training_log"].values()):
        raise ArtifactError(f"{path} is damaged: 'training_log' in its description is not a table of lists.")


def _checked_layout(sites: list[Any], file_size: int, path: Path) -> Layout:
    try:
        layout = Layout.from_json(sites)
    except _NONSENSE as error:
        raise ArtifactError(f"{path} describes sites that cannot be: {error}") from error
    # A constrained value may have a few times as many numbers as its unconstrained one (a Cholesky factor of
    # correlations at most four times), but simplexes of one class have any number of ones for none.
    constrained = sum(math.prod(site.shape) for site in layout)
    if constrained > 4 * layout.size + file_size:
        shown = min(constrained, _MOST_SHOWN)
        raise ArtifactError(f"{path} describes sites of {shown} numbers, far more than its generator determines.")
    return layout


def _versions() -> dict[str, str]:
    import pyro

    return {"pyro_apd": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
