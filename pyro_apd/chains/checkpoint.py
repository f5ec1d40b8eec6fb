# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of a run: safetensors with a JSON description and a SHA-256; nothing in them is pickled.

A checkpoint holds the state from which every chain continues bit for bit, the progress of each chain, and the identity
of the run. Draws are not in it: they are in a :class:`~pyro_apd.chains.stores.disk.DiskStore` beside it, to which a run
only appends. Writes are atomic, and the checkpoint before stays as ``PATH.previous``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.chains.stores.base import as_bytes
from pyro_apd.data.row_reader import is_stored
from pyro_apd.runtime import tensor_file
from pyro_apd.runtime.files import remove_leftovers
from pyro_apd.runtime.tensor_file import FileKind
from pyro_apd.runtime.trees import tree_flatten_with_path

FORMAT_VERSION = 2
# In the JSON description, stands for a tensor by its name.
_TENSOR = "__tensor__"
# Rows of a file of data that are part of the digest of a run's arguments.
_DIGEST_ROWS = 1000


class CheckpointError(ValueError):
    """A checkpoint cannot be used: it is damaged, or belongs to another run."""


_KIND = FileKind(
    "pyro_apd_checkpoint",
    "checkpoint",
    "what a run with checkpoint= wrote",
    "No run can be resumed from it.",
    CheckpointError,
)


@dataclass
class Progress:
    """Progress of a chain, or of a group of vectorised chains.

    :ivar int num_done: draws so far, warm-up included.
    :ivar state: the chain's ``state_dict()``; None before the first step, and when it is finished.
    :ivar list divergences: for each chain that diverged, its :class:`~pyro_apd.errors.DivergenceError` as JSON values.
    :ivar dict report: the kernel's diagnostics at the end, as JSON values.
    """

    num_done: int = 0
    state: dict[str, Any] | None = None
    divergences: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """Contents of a file.

    :ivar dict identity: settings and data that determine the run, by name; JSON values.
    :ivar dict chains: progress by the number of the (first) chain.
    :ivar dict notes: anything else that JSON holds.
    """

    identity: dict[str, Any]
    chains: dict[int, Progress]
    notes: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint to ``path``; the one before becomes ``PATH.previous``.

    Durable on return. A process that is killed at any moment leaves a complete checkpoint under one of the two names.

    :raises OSError: if it cannot be written; the checkpoint that was there stays.
    """
    tensors: dict[str, Tensor] = {}
    description = {
        "format": FORMAT_VERSION,
        "identity": checkpoint.identity,
        "notes": checkpoint.notes,
        "chains": {
            str(chain): _encoded(dataclasses.asdict(dataclasses.replace(progress, state=None)), tensors)
            | {"state": _encoded(progress.state, tensors)}
            for chain, progress in checkpoint.chains.items()
        },
    }
    tensor_file.write(_KIND, tensors, json.dumps(description), path, previous_path(path))


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint; None where there is none yet.

    If the newest is damaged, a warning names it, and the one before it is used.

    :raises CheckpointError: if there are checkpoints, and none can be read.
    """
    remove_leftovers(path)
    failures = []
    for candidate in (path, previous_path(path)):
        try:
            checkpoint = read_file(candidate)
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            failures.append(str(error))
            continue
        if failures:
            warnings.warn(f"{failures[0]} Resuming from the one before it, '{candidate}'.", RuntimeWarning)
        return checkpoint
    if failures:
        raise CheckpointError(
            f"No checkpoint can be used: {' '.join(failures)} Delete '{path}' and '{previous_path(path)}' to start the "
            "run over, or give another checkpoint=."
        )
    return None


def previous_path(path: Path) -> Path:
    """Path of the checkpoint before the present one."""
    return path.with_name(path.name + ".previous")


def check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares the run of a checkpoint with the present one.

    :raises CheckpointError: if they differ; the message names the differences.
    """
    # Through JSON, as the file's: tuples become lists.
    expected = json.loads(json.dumps(expected))
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if differing:
        what = "; ".join(
            f"{name} was {_short(found.get(name))}, now {_short(expected.get(name))}" for name in differing
        )
        raise CheckpointError(
            f"The checkpoint '{path}' belongs to another run: {what}. Run with the same model, data and "
            "settings to resume it, or give another checkpoint=."
        )


def read_file(path: Path) -> Checkpoint:
    """Reads one file.

    :raises FileNotFoundError: if there is none.
    :raises CheckpointError: if it is truncated, damaged, of another kind, or of another format version.
    """
    text, tensors = tensor_file.read(_KIND, path)
    try:
        description = json.loads(text)
        if description["format"] != FORMAT_VERSION:
            newer = ", newer than this version's" if description["format"] > FORMAT_VERSION else "; accepted is"
            raise ValueError(f"it has format {description['format']}{newer} {FORMAT_VERSION}")
        chains = {
            int(chain): Progress(**_decoded(progress, tensors)) for chain, progress in description["chains"].items()
        }
        return Checkpoint(description["identity"], chains, description["notes"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{error!r}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged, or is no checkpoint: {reason}.") from error


def arguments_digest(values: Any) -> str:
    """A digest of the arguments of a run: of tensors the contents, of loaders the settings and known data.

    Of arrays, which may be files larger than memory, it takes shape, type and evenly spaced rows; of other values, such
    as functions, the type.
    """
    digest = hashlib.sha256()
    for path, leaf in tree_flatten_with_path(values)[0]:
        digest.update(repr([str(key) for key in path]).encode())
        _add_leaf(digest, leaf)
    return digest.hexdigest()[:16]


def describe(value: Any) -> Any:
    """A setting as a JSON value that is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Tensor):
        return arguments_digest(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _add_leaf(digest: Any, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        digest.update(as_bytes(leaf))
    elif isinstance(leaf, DataLoader):
        known = (leaf.batch_size, leaf.drop_last, type(leaf.sampler).__name__, type(leaf.dataset).__name__)
        digest.update(repr(known).encode())
        digest.update(str(len(leaf.dataset) if hasattr(leaf.dataset, "__len__") else None).encode())
        if isinstance(leaf.dataset, TensorDataset):
            for tensor in leaf.dataset.tensors:
                _add_leaf(digest, tensor)
    elif isinstance(leaf, np.ndarray):
        digest.update(f"{leaf.dtype.str}{leaf.shape}".encode())
        if leaf.size and not leaf.dtype.hasobject:
            rows = leaf if leaf.ndim == 0 else leaf[:: max(1, len(leaf) // _DIGEST_ROWS)]
            digest.update(rows.tobytes())
    elif leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
        digest.update(repr(leaf).encode())
    else:
        digest.update(type(leaf).__qualname__.encode())
        if is_stored(leaf):
            digest.update(str(len(leaf)).encode())


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested state whose tensors are moved into ``tensors`` under new names.

    :raises TypeError: if it holds what JSON does not.
    """
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"A state's keys must be strings; got {[k for k in value if not isinstance(k, str)]}.")
        return {key: _encoded(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A checkpoint holds tensors, numbers, strings, lists and dicts; got a {type(value).__name__}.")


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _decoded(item, tensors) for key, item in value.items()}
    return [_decoded(item, tensors) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
