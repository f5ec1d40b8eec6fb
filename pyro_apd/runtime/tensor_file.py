# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Files of tensors with a JSON description: safetensors, checked before anything is allocated, and never unpickled.

Besides the checks of :mod:`safetensors` itself: sizes against the size of the file, names that occur twice, and a
SHA-256 of description and tensors. The digest detects damage. It is no signature, since anyone who writes a file can
compute it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pyro_apd.errors import shortened
from pyro_apd.runtime.files import atomic_write, check_regular

#: Name of the tensor of 32 bytes that holds the digest.
DIGEST_NAME = "pyro_apd#sha256"

# No longer header is read or written, so that a hostile file can neither fill the memory nor take minutes.
_MAX_HEADER = 16 * 2**20
_MAX_DIMS = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFileError(ValueError):
    """A file of tensors is truncated, damaged, or of another kind."""


@dataclass(frozen=True)
class FileKind:
    """Kind of a file, for its metadata and for messages.

    :ivar str key: the key of our JSON description in the metadata of safetensors.
    :ivar str name: such as ``"distilled posterior"``.
    :ivar str accepted: which files are of this kind, such as ``"what DistilledPosterior.save wrote"``.
    :ivar str remedy: what to do about a damaged file, a sentence.
    :ivar type error: raised for a file that cannot be read.
    :ivar int header_allowance: bytes of a header that any file may have, and one more for each 64 bytes of tensors.
    """

    key: str
    name: str
    accepted: str
    remedy: str = "Write it again, or download it again."
    error: type[Exception] = TensorFileError
    header_allowance: int = _MAX_HEADER

    def failure(self, message: str) -> Exception:
        """The error with that message, shortened."""
        return self.error(shortened(message))

    def max_header(self, num_bytes: int) -> int:
        """Length of the longest header, in bytes, beside tensors of ``num_bytes``."""
        return min(_MAX_HEADER, self.header_allowance + num_bytes // 64)


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
    """Description and table of a file, which precede its tensors.

    :ivar str text: the description, JSON.
    :ivar dict table: tensors by name, in order of their bytes; without the digest.
    :ivar Entry digest: the place of the digest, or None.
    :ivar int data_start: where the tensors begin in the file, in bytes.
    :ivar int file_size: in bytes.
    """

    text: str
    table: dict[str, Entry]
    digest: Entry | None
    data_start: int
    file_size: int


def to_bytes(kind: FileKind, tensors: Mapping[str, Tensor], text: str) -> bytes:
    """The contents of a file, digest included: the same tensors and description always give the same bytes.

    :raises TypeError: if a tensor has a dtype that files do not hold.
    :raises ValueError: if description and table are too long to be read again.
    """
    return b"".join(_parts(kind, tensors, text))


def write(
    kind: FileKind,
    tensors: Mapping[str, Tensor],
    text: str,
    path: str | os.PathLike[str],
    previous: Path | None = None,
) -> None:
    """Writes a file, atomically; parameters and further errors as of :func:`~pyro_apd.runtime.files.atomic_write`.

    :raises TypeError: as :func:`to_bytes`; likewise ValueError.
    """
    parts = _parts(kind, tensors, text)
    with atomic_write(path, previous) as temporary, temporary.open("xb") as file:
        for part in parts:
            file.write(part)


def read(kind: FileKind, path: Path) -> tuple[str, dict[str, Tensor]]:
    """Description and tensors of a file, on the CPU.

    :raises FileNotFoundError: if there is none.
    :raises Exception: ``kind.error`` if the file is truncated, damaged or of another kind.
    """
    header = read_header(kind, path)
    return header.text, read_tensors(kind, path, header)


def read_header(kind: FileKind, path: Path) -> Header:
    """The header, after checks that sizes and offsets are those of this very file.

    :raises FileNotFoundError: if there is none.
    :raises Exception: ``kind.error`` if the file is truncated, damaged or of another kind.
    """
    try:
        size = check_regular(path).st_size
    except ValueError as error:
        raise kind.failure(f"{error} Accepted is {kind.accepted}.") from error
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > size - 8:
            raise kind.failure(
                f"{path} is not a safetensors file, or is truncated: it has {size} bytes, its header claims {length}."
            )
        longest = kind.max_header(size - 8 - length)
        if length > longest:
            raise kind.failure(
                f"{path} is damaged, or was made to be slow to read: its header has {length:,} bytes, and beside "
                f"{size - 8 - length:,} bytes of tensors at most {longest:,} are accepted."
            )
        return _parse(kind, file.read(length), 8 + length, size, path)


def read_tensors(kind: FileKind, path: Path, header: Header) -> dict[str, Tensor]:
    """The tensors of the table, on the CPU.

    :raises Exception: ``kind.error`` if the file changed since ``header`` was read, or is damaged.
    """
    if header.digest is None:
        raise kind.failure(f"{path} is damaged: it lacks a digest. {kind.remedy}")
    with path.open("rb") as file:
        contents = file.read(header.file_size + 1)
    if len(contents) != header.file_size:
        raise kind.failure(f"{path} changed while it was read. Load it again.")
    data = memoryview(contents)[header.data_start :]
    if bytes(data[header.digest.start : header.digest.stop]) != digest_of(header, data):
        raise kind.failure(f"{path} is damaged: its contents do not have the SHA-256 that it states. {kind.remedy}")
    try:
        tensors: dict[str, Tensor] = load(contents)
    except Exception as error:  # whatever safetensors finds wrong
        raise kind.failure(f"{path} is damaged: {error}. {kind.remedy}") from error
    del tensors[DIGEST_NAME]
    for name, entry in header.table.items():
        if name not in tensors or tensors[name].shape != entry.shape or tensors[name].dtype != entry.dtype:
            raise kind.failure(f"{path} changed while it was read. Load it again.")
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


def _parts(kind: FileKind, tensors: Mapping[str, Tensor], text: str) -> tuple[memoryview, bytes, memoryview]:
    """The contents of a file before, in and after the digest, without a second copy of the tensors."""
    for name, value in tensors.items():
        if value.dtype not in _DTYPES.values():
            raise TypeError(f"Tensor '{name}' is {value.dtype}, which files do not hold; it must be converted first.")
    ready = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    contents = memoryview(save({**ready, DIGEST_NAME: torch.zeros(32, dtype=torch.uint8)}, {kind.key: text}))
    (length,) = struct.unpack("<Q", contents[:8])
    longest = kind.max_header(len(contents) - 8 - length)
    if length > longest:
        raise ValueError(
            f"The description of a {kind.name} takes {length:,} bytes, and {longest:,} are accepted: metadata and "
            "notes are too long, or there are very many sites. Keep notes in a file of their own."
        )
    header = _parse(kind, bytes(contents[8 : 8 + length]), 8 + length, len(contents), Path("the new file"))
    assert header.digest is not None
    start, stop = header.data_start + header.digest.start, header.data_start + header.digest.stop
    return contents[:start], digest_of(header, contents[header.data_start :]), contents[stop:]


def _parse(kind: FileKind, text: bytes, data_start: int, file_size: int, path: Path) -> Header:
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise kind.failure(f"{path} is damaged: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise kind.failure(f"{path} is damaged: its header is a {type(header).__name__}, not a table of tensors.")
    metadata = header.pop("__metadata__", None)
    ours = metadata.get(kind.key) if isinstance(metadata, dict) else None
    if not isinstance(ours, str):
        raise kind.failure(f"{path} is a safetensors file, but no {kind.name}. Accepted is {kind.accepted}.")
    table: dict[str, Entry] = {}
    position = 0
    available = file_size - data_start
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            table[name] = _entry(kind, path, name, entry, position)
            position = table[name].stop
    except kind.error:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise kind.failure(f"{path} is damaged: its table of tensors is malformed ({error!r}).") from error
    if position != available:
        raise kind.failure(
            f"{path} is truncated or damaged: its tensors take {position} bytes, and {available} are there. "
            f"{kind.remedy}"
        )
    digest = table.pop(DIGEST_NAME, None)
    if digest is not None and (digest.code, digest.shape) != ("U8", (32,)):
        raise kind.failure(f"{path} is damaged: its digest is {digest.code} of shape {digest.shape}.")
    return Header(ours, table, digest, data_start, file_size)


def _entry(kind: FileKind, path: Path, name: str, entry: Mapping[str, Any], position: int) -> Entry:
    start, stop = entry["data_offsets"]
    shape, code = tuple(entry["shape"]), entry["dtype"]
    if len(shape) > _MAX_DIMS or not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, stop)):
        raise ValueError(f"shape {list(shape)}, offsets {[start, stop]}")
    count = _DTYPES[code].itemsize
    for n in shape:
        count *= n
    if start != position or stop - start != count:
        raise kind.failure(f"{path} is damaged: tensor '{name}' does not fill the bytes that it claims.")
    return Entry(code, shape, start, stop)


def digest_of(header: Header, data: memoryview) -> bytes:
    """SHA-256 of the description and of each tensor: a line with name, dtype and shape, then its bytes."""
    digest = hashlib.sha256(header.text.encode(errors="surrogatepass"))
    for name, entry in header.table.items():
        digest.update(f"\n{json.dumps([name, entry.code, list(entry.shape)])}\n".encode())
        digest.update(data[entry.start : entry.stop])
    return digest.digest()
