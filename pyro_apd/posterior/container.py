# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The bytes of a file of tensors: a safetensors container whose table is checked before anything is allocated.

Besides what :mod:`safetensors` itself checks: sizes against those of the file, names that occur twice, and a SHA-256 of
everything that has a meaning. The digest finds damage; it is no signature, since whoever writes a file can compute it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pyro_apd.errors import ArtifactError

#: The one key of the safetensors metadata that is ours; its value is JSON.
METADATA_KEY = "pyro_apd"
#: Name of the tensor of 32 bytes that holds the digest.
DIGEST_NAME = "pyro_apd#sha256"

# A header longer than this describes no posterior; refusing it keeps a hostile file from filling memory.
_MAX_HEADER = 16 * 2**20
_MAX_DIMS = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One row of a file's table of tensors.

    :ivar str code: the dtype, as safetensors names it.
    :ivar tuple shape: of the tensor.
    :ivar int start: first byte, counted from the end of the header.
    :ivar int stop: one past the last byte.
    """

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """As torch names it."""
        return _DTYPES[self.code]


@dataclass(frozen=True)
class Header:
    """What stands before the tensors of a file.

    :ivar str text: our metadata.
    :ivar dict table: tensors by name, in order of their bytes; without the digest.
    :ivar Entry digest: where the digest stands, or None.
    :ivar int data_start: where tensors begin in the file, in bytes.
    :ivar int file_size: in bytes.
    """

    text: str
    table: dict[str, Entry]
    digest: Entry | None
    data_start: int
    file_size: int


def pack(tensors: Mapping[str, Tensor], text: str) -> bytes:
    """The file's contents, digest included: the same tensors and text always give the same bytes."""
    ready = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    contents = bytearray(save({**ready, DIGEST_NAME: torch.zeros(32, dtype=torch.uint8)}, {METADATA_KEY: text}))
    (length,) = struct.unpack("<Q", contents[:8])
    header = _parse(bytes(contents[8 : 8 + length]), 8 + length, len(contents), Path("the new file"))
    assert header.digest is not None
    place = slice(header.data_start + header.digest.start, header.data_start + header.digest.stop)
    contents[place] = digest_of(header, memoryview(contents)[header.data_start :])
    return bytes(contents)


def write(contents: bytes, path: str | os.PathLike[str]) -> None:
    """Writes the file at once or not at all: an interruption leaves what was there before."""
    path = Path(path)
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


def read_header(path: Path) -> Header:
    """The header, after checks that sizes and offsets are those of this very file.

    :raises ArtifactError: if the file is truncated, damaged or of another kind.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > min(size - 8, _MAX_HEADER):
            raise ArtifactError(
                f"{path} is not a safetensors file, or is truncated: it has {size} bytes, its header claims {length}."
            )
        return _parse(file.read(length), 8 + length, size, path)


def read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """The tensors of the table, on the CPU.

    :raises ArtifactError: if the file changed since ``header`` was read, or is damaged.
    """
    with path.open("rb") as file:
        contents = file.read(header.file_size + 1)
    if len(contents) != header.file_size:
        raise ArtifactError(f"{path} changed while it was read. Load it again.")
    if header.digest is not None:
        data = memoryview(contents)[header.data_start :]
        if bytes(data[header.digest.start : header.digest.stop]) != digest_of(header, data):
            raise ArtifactError(
                f"{path} is damaged: its contents do not have the SHA-256 that it states. Save the posterior again, or "
                "fetch the file anew."
            )
    try:
        tensors: dict[str, Tensor] = load(contents)
    except Exception as error:  # whatever safetensors finds wrong
        raise ArtifactError(f"{path} is damaged: {error}. Save the posterior again, or fetch the file anew.") from error
    tensors.pop(DIGEST_NAME, None)
    for name, entry in header.table.items():
        if name not in tensors or tensors[name].shape != entry.shape or tensors[name].dtype != entry.dtype:
            raise ArtifactError(f"{path} changed while it was read. Load it again.")
    return tensors


def parse_json(text: str | bytes) -> Any:
    """As :func:`json.loads`, but a key that occurs twice in a table raises instead of losing one.

    :raises ValueError: if it is not JSON.
    """
    return json.loads(text, object_pairs_hook=_table_of)


def _table_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _parse(text: bytes, data_start: int, file_size: int, path: Path) -> Header:
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} is damaged: its header is a {type(header).__name__}, not a table of tensors.")
    metadata = header.pop("__metadata__", None)
    ours = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(ours, str):
        raise ArtifactError(
            f"{path} is a safetensors file, but no distilled posterior. Accepted is what DistilledPosterior.save wrote."
        )
    table, position, available = {}, 0, file_size - data_start
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            table[name] = _entry(path, name, entry, position)
            position = table[name].stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged: its table of tensors is malformed ({error!r}).") from error
    if position != available:
        raise ArtifactError(
            f"{path} is truncated or damaged: its tensors take {position} bytes, and {available} are there. Save the "
            "posterior again, or fetch the file anew."
        )
    digest = table.pop(DIGEST_NAME, None)
    if digest is not None and (digest.code, digest.shape) != ("U8", (32,)):
        raise ArtifactError(f"{path} is damaged: its digest is {digest.code} of shape {digest.shape}.")
    return Header(ours, table, digest, data_start, file_size)


def _entry(path: Path, name: str, entry: Mapping[str, Any], position: int) -> Entry:
    start, stop = entry["data_offsets"]
    shape, code = tuple(entry["shape"]), entry["dtype"]
    if len(shape) > _MAX_DIMS or not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, stop)):
        raise ValueError(f"shape {list(shape)}, offsets {[start, stop]}")
    count = _DTYPES[code].itemsize
    for n in shape:
        count *= n
    if start != position or stop - start != count:
        raise ArtifactError(f"{path} is damaged: tensor '{name}' does not fill the bytes that it claims.")
    return Entry(code, shape, start, stop)


def digest_of(header: Header, data: memoryview) -> bytes:
    """SHA-256 of our metadata and of each tensor: a line that describes it, then its bytes."""
    digest = hashlib.sha256(header.text.encode(errors="surrogatepass"))
    for name, entry in header.table.items():
        digest.update(f"\n{json.dumps([name, entry.code, list(entry.shape)])}\n".encode())
        digest.update(data[entry.start : entry.stop])
    return digest.digest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
