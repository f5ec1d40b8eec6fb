# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tensors with a description: exact, bounded, and refused where they are damaged. Hostile files: tests/posterior."""

import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyro_apd.runtime import tensor_file
from pyro_apd.runtime.tensor_file import DIGEST_NAME, FileKind, TensorFileError

KIND = FileKind("some_key", "collection", "what collect() wrote", "Collect again.")
TENSORS = {
    "double": torch.randn(2, 3, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "bytes": torch.arange(5, dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "collection.safetensors"
    tensor_file.write(KIND, TENSORS, json.dumps({"name": "é"}), path)
    return path


def test_round_trip_is_exact(path):
    text, tensors = tensor_file.read(KIND, path)
    assert json.loads(text) == {"name": "é"}
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_the_same_contents_give_the_same_bytes_and_any_reader_of_safetensors_reads_them(path):
    assert path.read_bytes() == tensor_file.to_bytes(KIND, dict(reversed(TENSORS.items())), json.dumps({"name": "é"}))
    assert load_file(path).keys() == {*TENSORS, DIGEST_NAME}


def test_the_file_before_is_kept_where_it_is_asked_for(path):
    before = path.read_bytes()
    tensor_file.write(KIND, {}, "{}", path, previous=path.with_name("previous"))
    assert path.with_name("previous").read_bytes() == before
    assert tensor_file.read(KIND, path) == ("{}", {})


def test_a_failed_write_leaves_what_was_there(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"disk full. '.*collection.safetensors' is as it was"):
        tensor_file.write(KIND, {}, "{}", path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("position", [0, 7, 30, 400, -40, -1])
def test_every_changed_byte_is_found(path, position):
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)
    with pytest.raises(TensorFileError, match=r"damaged|not a safetensors file|no collection"):
        tensor_file.read(KIND, path)


def test_a_file_of_another_kind(path, tmp_path):
    other = FileKind("other_key", "checkpoint", "what a run wrote", error=KeyError)
    with pytest.raises(KeyError, match=r"no checkpoint. Accepted is what a run wrote"):
        tensor_file.read(other, path)
    save_file({"a": torch.zeros(2)}, tmp_path / "plain", {"some_key": "{}"})
    with pytest.raises(TensorFileError, match=r"lacks a digest. Collect again."):
        tensor_file.read(KIND, tmp_path / "plain")
    with pytest.raises(FileNotFoundError):
        tensor_file.read(KIND, tmp_path / "nowhere")


def test_a_header_that_is_too_long_is_neither_read_nor_written(path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_MAX_HEADER", 1000)
    with pytest.raises(ValueError, match=r"description of a collection takes .* bytes, and 1,000 are accepted"):
        tensor_file.to_bytes(KIND, {}, json.dumps("x" * 2000))
    contents = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**60) + contents[8:])
    with pytest.raises(TensorFileError, match="header claims"):
        tensor_file.read(KIND, path)


def test_longer_headers_take_more_tensors(tmp_path, path):
    kind = replace(KIND, header_allowance=2000)
    text = json.dumps("x" * 3000)
    with pytest.raises(ValueError, match=r"and 2,0\d\d are accepted"):
        tensor_file.to_bytes(kind, {}, text)
    tensor_file.write(kind, {"a": torch.zeros(64, 640)}, text, tmp_path / "p")
    assert tensor_file.read(kind, tmp_path / "p")[0] == text
    tensor_file.write(KIND, {}, text, tmp_path / "p")
    with pytest.raises(TensorFileError, match=r"has 3,.* bytes, and beside 32 bytes of tensors at most 2,000"):
        tensor_file.read(kind, tmp_path / "p")


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(TensorFileError, match=r"is a (folder|pipe or a device), not a file.*what collect"):
            tensor_file.read(KIND, path)


def test_dtypes_that_files_do_not_hold_are_named():
    with pytest.raises(TypeError, match=r"'z' is torch.complex64"):
        tensor_file.to_bytes(KIND, {"z": torch.zeros(2, dtype=torch.complex64)}, "{}")


def test_a_file_that_changes_while_it_is_read(path):
    header = tensor_file.read_header(KIND, path)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(TensorFileError, match="changed while it was read"):
        tensor_file.read_tensors(KIND, path, header)
