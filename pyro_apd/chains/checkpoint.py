# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of a run: safetensors with a JSON description and a SHA-256; nothing in them is pickled.

A checkpoint holds the state from which every chain continues bit for bit, the progress of each chain, and the identity
of the run. Draws are not in it: they are in a :class:`~pyro_apd.chains.stores.disk.DiskStore` beside it, to which a run
only appends. Writes are atomic, and the checkpoint before stays as ``PATH.previous``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_apd.runtime import tensor_file
from pyro_apd.runtime.files import duplicate, remove_leftovers
from pyro_apd.runtime.tensor_file import FileKind

FORMAT_VERSION = 3
# In the JSON description, stands for a tensor by its name.
_TENSOR = "__tensor__"


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


def note_checkpoint(error: BaseException, path: Path | None, call: str) -> None:
    """Adds to an error that ends a run where its checkpoint is, if one was written, and how to resume.

    :param call: the function or method that resumes.
    """
    if path is not None and path.exists():
        error.add_note(f"What was done is in the checkpoint '{path}': the same call of {call} continues from it.")


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint; None where there is none yet.

    If the newest is damaged, a warning names it, the one before it is used, and the damaged one is moved to
    ``PATH.damaged``, so that the next checkpoint does not replace the undamaged one.

    :raises CheckpointError: if there are checkpoints, and none can be read, or something else than a file is there; and
        if there is only the one before, as where a user has removed the newest to start the run over.
    """
    remove_leftovers(path)
    failures = []
    for candidate in (path, previous_path(path)):
        if not _is_file(candidate):
            continue
        try:
            checkpoint = read_file(candidate)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        if candidate != path and not failures:
            raise CheckpointError(
                f"There is no checkpoint '{path}', but there is the one before it, '{candidate.name}'. To resume from "
                f"that one, rename it to '{path.name}'. To start the run over, move it away, too, or give another "
                "checkpoint=."
            )
        if failures:
            aside = _free_path(path)
            os.replace(path, aside)
            duplicate(candidate, path)
            warnings.warn(
                f"{failures[0]} Resuming from the one before it, '{candidate}'; the newest is now at '{aside}'.",
                RuntimeWarning,
            )
        return checkpoint
    if failures:
        raise CheckpointError(
            f"No checkpoint can be used: {' '.join(failures)} Nothing was changed. Give another checkpoint=, or move "
            "what is there away to start the run over."
        )
    return None


def _is_file(path: Path) -> bool:
    """Whether there is a file, which is read next.

    :raises CheckpointError: if there is something else, or it cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"checkpoint='{path}' cannot be read ({error.strerror}). Give another path.") from error
    if stat.S_ISDIR(mode):
        raise CheckpointError(
            f"checkpoint='{path}' is a folder, and must be a file. Give a path in it, such as '{path / 'run.ckpt'}'."
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"checkpoint='{path}' is a pipe or a device, and must be a file. Give another path.")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"checkpoint='{path}' cannot be read (no permission). Give another path.")
    return True


def _free_path(path: Path) -> Path:
    """Where a damaged checkpoint is put: a path at which there is nothing."""
    numbered = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    return next(candidate for candidate in numbered if not candidate.exists())


def previous_path(path: Path) -> Path:
    """Path of the checkpoint before the present one."""
    return path.with_name(path.name + ".previous")


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
        identity, notes = description["identity"], description["notes"]
        if not (isinstance(identity, dict) and isinstance(notes, dict)):
            raise ValueError("identity and notes must be tables")
        return Checkpoint(identity, chains, notes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{error!r}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged, or is no checkpoint: {reason}.") from error


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
