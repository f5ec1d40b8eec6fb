# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributions import constraints

from pyro_apd.errors import ArtifactError
from pyro_apd.models.frozen import FrozenTensors, digest
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import artifact
from pyro_apd.posterior.artifact import METADATA_KEY, Artifact
from pyro_apd.runtime import tensor_file
from pyro_apd.runtime.tensor_file import DIGEST_NAME


def example():
    layout = Layout({"w": (2, 3), "scale": ()}, {"scale": constraints.positive})
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([1, 2], dtype=torch.int64),
        "c": torch.ones(2, 3),
    }
    return Artifact(layout, {"kind": "some", "size": 3}, tensors, 50, {"seed": 3, "note": "é"}, {"loss": [1.0, 0.5]})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "posterior.safetensors"
    artifact.write(example(), path)
    return path


def edited(path, change):
    """The file with its header, and the description in it, changed; tensors as they were."""
    contents = path.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    description = json.loads(header["__metadata__"][METADATA_KEY])
    change(header, description)
    if METADATA_KEY in header.get("__metadata__", {}):
        header["__metadata__"][METADATA_KEY] = json.dumps(description)
    text = json.dumps(header).replace('"twice": null', '"a": {}').encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + contents[8 + length :])
    return path


def test_round_trip(path):
    again, expected = artifact.read(path), example()
    assert again.layout == expected.layout
    assert again.generator == expected.generator
    assert again.metadata == expected.metadata
    assert again.training_log == expected.training_log
    assert again.num_samples == 50
    assert again.versions["torch"] == torch.__version__
    for name, value in expected.tensors.items():
        assert torch.equal(again.tensors[name], value)
        assert again.tensors[name].dtype == value.dtype


def test_same_artifact_same_bytes(path, tmp_path):
    artifact.write(example(), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes() == artifact.to_bytes(example())


def test_description_without_tensors(path):
    assert artifact.read_description(path).metadata["seed"] == 3
    assert artifact.read_description(path).tensors == {}


def test_failed_write_leaves_what_was_there(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        artifact.write(Artifact(example().layout, {}, {}), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(ValueError, match="metadata must be what JSON holds"):
        artifact.write(Artifact(example().layout, {}, {}, metadata={"a": torch.ones(1)}), tmp_path / "x")


@pytest.mark.parametrize("kept", [0, 4, 8, 50, -1])
def test_truncated(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"truncated|damaged"):
        artifact.read(path)


def test_surplus_bytes(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        artifact.read(path)


def test_other_files(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a posterior, but long enough to have a header")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        artifact.read(text)
    foreign = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(ArtifactError, match="no distilled posterior"):
        artifact.read(foreign)
    with pytest.raises(FileNotFoundError):
        artifact.read(tmp_path / "nowhere")


WIDE = [{"name": "w", "shape": [10_000], "support": {"kind": "real"}}]


def set_format(value):
    return lambda header, description: description.update(format=value)


CHANGES = {
    "newer format": (set_format(4), "reads up to 3. Update it"),
    "format is text": (set_format("1"), "format version is '1'"),
    "no format": (lambda h, d: d.pop("format"), "cannot be read"),
    "no generator": (lambda h, d: d.pop("generator"), "'generator'"),
    "layout is a table": (lambda h, d: d.update(layout={}), "'layout'"),
    "unknown support": (lambda h, d: d["layout"][0].update(support={"kind": "x"}), "sites that cannot be"),
    "enormous tensor": (lambda h, d: h["a"].update(shape=[2**40, 2**40]), "does not fill"),
    "negative shape": (lambda h, d: h["a"].update(shape=[-2, -3]), "malformed"),
    "overlap": (lambda h, d: h["b"].update(data_offsets=h["a"]["data_offsets"]), r"does not fill|truncated"),
    "unknown dtype": (lambda h, d: h["a"].update(dtype="PICKLE"), "malformed"),
    "tensor is text": (lambda h, d: h.update(a="x"), "malformed"),
    "offsets are text": (lambda h, d: h["a"].update(data_offsets="x"), "malformed"),
    "name twice": (lambda h, d: h.update(twice=None), "name occurs twice"),
    "version of before the first release": (set_format(1), "format version 1, of before the first release.*Distil"),
    "digest of another kind": (lambda h, d: h[DIGEST_NAME].update(shape=[4, 8]), "its digest is U8"),
    "no digest": (lambda h, d: h.update(other=h.pop(DIGEST_NAME)), "it lacks a digest"),
    "tensors swapped": (lambda h, d: h.update(a=h["c"], c=h["a"]), "SHA-256"),
    "tensor renamed": (lambda h, d: h.update(z=h.pop("a")), "SHA-256"),
    "other notes": (lambda h, d: d["metadata"].update(note="e"), "SHA-256"),
    "dtype unknown": (lambda h, d: d.update(dtype="int4"), "dtype 'int4' is none of"),
    "no draws by default": (lambda h, d: d.update(num_samples=0), "num_samples is 0"),
    "endless draws by default": (lambda h, d: d.update(num_samples=10**12), "num_samples is 1000000000000"),
    "more draws by default than memory": (lambda h, d: d.update(num_samples=10**6, layout=WIDE), "40,000 MB"),
    "blocks without end": (lambda h, d: d["generator"].update(noise=[[0, 1, 1, 1]] * 2000), "2,000 entries in 'noise'"),
    "layers without end": (lambda h, d: d["generator"].update(layers=[[0, 1, 1, 1]] * 999), "999 entries in 'layers'"),
    "blocks without tensors": (lambda h, d: d["generator"].update(noise=[[0, 1, 1, 1]]), "1 entries .* 3 tensors"),
    "a header as long as many files": (lambda h, d: d["metadata"].update(n="x" * 2**19), "made to be slow to read"),
    "versions are numbers": (lambda h, d: d["versions"].update(torch=2), "'versions'"),
    "training log is a number": (lambda h, d: d["training_log"].update(loss=3), "'training_log'"),
    "unknown compute dtype": (lambda h, d: d.update(compute_dtype="int64"), "compute_dtype is 'int64'"),
    "frozen is a list": (lambda h, d: d.update(frozen=[]), "two tables of digests"),
    "frozen numbers that are not described": (
        lambda h, d: h.update({"frozen#a": h.pop("a")}),
        "holds 1 frozen tensors",
    ),
    "sites of more digits than Python writes": (
        lambda h, d: d["layout"].append({"name": "m", "shape": [16] * 5000, "support": {"kind": "real"}}),
        "draws by default would take",
    ),
    "true draws by default": (lambda h, d: d.update(num_samples=True), "num_samples is True"),
    "sites out of nothing": (
        lambda h, d: d["layout"].append({"name": "m", "shape": [10**9, 1], "support": {"kind": "simplex"}}),
        "sites of 1000000007 numbers",
    ),
    "sites whose size overflows": (
        lambda h, d: d["layout"].append({"name": "m", "shape": [2**32, 2**32], "support": {"kind": "real"}}),
        "draws by default would take",
    ),
    "many dimensions": (lambda h, d: h["a"].update(shape=[1] * 10_000), "malformed"),
    "no metadata": (lambda h, d: h.pop("__metadata__"), "no distilled posterior"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_or_hostile_headers(path, name):
    change, message = CHANGES[name]
    with pytest.raises(ArtifactError, match=message):
        artifact.read(edited(path, change))


def test_messages_are_short(path):
    """Whatever they quote; a path may be long as well."""
    expected = {"x" * 10**5: torch.zeros(1), **{f"tensor {i}": torch.zeros(1) for i in range(10**4)}}
    with pytest.raises(ArtifactError, match=r"does not fit its own description.* \[\.\.\.\] ") as caught:
        artifact.read(path, lambda config: expected)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ArtifactError, match=r"a\\u202eb\\x1b\[31m"):
        raise ArtifactError("a\u202eb\x1b[31m")


def test_frozen_numbers_are_exact_whatever_the_precision(tmp_path):
    values = {"net.0.weight": torch.tensor([[1e300, 0.1]], dtype=torch.float64), "mask": torch.tensor([-torch.inf])}
    values["count"] = torch.tensor(3)
    contents = replace(example(), dtype="float16", frozen=FrozenTensors({n: digest(v) for n, v in values.items()}))
    artifact.write(contents, tmp_path / "p", values)
    again = artifact.read(tmp_path / "p")
    assert again.tensors.keys() == example().tensors.keys()
    assert {name: torch.equal(value, values[name]) for name, value in again.frozen.values.items()} == {
        name: True for name in values
    }
    artifact.write(contents, tmp_path / "digests")
    assert artifact.read(tmp_path / "digests").frozen == contents.frozen
    other = {**values, "count": torch.tensor(4)}
    artifact.write(contents, tmp_path / "p", other)
    with pytest.raises(ArtifactError, match="frozen tensors do not have the digests"):
        artifact.read(tmp_path / "p")
    with pytest.raises(ValueError, match=r"cannot be saved: Tensor 'frozen#count' is torch\.complex64"):
        artifact.write(contents, tmp_path / "p", {"count": torch.zeros(1, dtype=torch.complex64)})


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="training_log must be lists"):
        artifact.write(replace(example(), training_log={"loss": 3.0}), tmp_path / "p")
    with pytest.raises(ValueError, match=r"takes .* bytes, and 524,.* are accepted: metadata and notes are too long"):
        artifact.write(replace(example(), metadata={"notes": "x" * 2**20}), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_enormous_header_is_not_read(path):
    contents = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**60) + contents[8:])
    with pytest.raises(ArtifactError, match="header claims"):
        artifact.read(path)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_read_right_or_are_refused(path, data):
    contents = bytearray(artifact.to_bytes(example()))
    for _ in range(data.draw(st.integers(1, 3))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents)
    try:
        again = artifact.read(path)
    except ArtifactError:
        return
    assert artifact.to_bytes(again) == artifact.to_bytes(example())


def test_tensors_are_held_to_what_is_expected(path):
    expected = {n: torch.empty_like(v, device="meta") for n, v in example().tensors.items()}
    assert set(artifact.read(path, lambda config: expected).tensors) == set(expected)
    meta = {"device": "meta"}
    for change, message in (
        ({"d": torch.zeros(2, **meta)}, r"missing \['d'\]"),
        ({"a": torch.zeros(3, 2, **meta)}, r"asks for torch.float32 of shape \(3, 2\)"),
        ({"b": torch.zeros(2, **meta)}, "'b' is torch.int64"),
    ):
        with pytest.raises(ArtifactError, match=message):
            artifact.read(path, lambda config, change=change: {**expected, **change})
    with pytest.raises(ArtifactError, match=r"not known \['a'\]"):
        artifact.read(path, lambda config: {n: v for n, v in expected.items() if n != "a"})


def test_expectations_are_checked_before_anything_is_read(path, monkeypatch):
    monkeypatch.setattr(tensor_file, "read_tensors", lambda *args: pytest.fail("tensors were read"))
    with pytest.raises(ArtifactError, match="missing"):
        artifact.read(path, lambda config: {"z": torch.zeros(1)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(tmp_path, value):
    artifact.write(Artifact(example().layout, {}, {"a": torch.tensor([1.0, value])}), tmp_path / "p")
    with pytest.raises(ArtifactError, match="'a' holds NaN or infinite"):
        artifact.read(tmp_path / "p")


@pytest.mark.parametrize("num_samples", [0, -1, 10**7])
def test_unusable_default_numbers_of_draws_are_not_written(num_samples):
    with pytest.raises(ValueError, match="num_samples="):
        artifact.to_bytes(Artifact(example().layout, {}, {}, num_samples))


def test_scales_belong_to_integers(tmp_path):
    wrong = Artifact(example().layout, {}, {"a": torch.ones(2, 3), "a#scale": torch.ones(2)}, dtype="int8")
    artifact.write(wrong, tmp_path / "p")
    with pytest.raises(ArtifactError, match="with scales"):
        artifact.read(tmp_path / "p")
