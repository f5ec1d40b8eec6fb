# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""All integers of a generator in one code, whose length bounds what is decoded."""

import pytest
import torch

from pyro_apd.errors import ArtifactError
from pyro_apd.generators import SubspaceGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import artifact, integers
from pyro_apd.posterior.integers import CODE_NAME, decoded_table, packed, unpacked
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime import tensor_file
from pyro_apd.runtime.tensor_file import Entry

OWN = {
    "b": torch.arange(-6, 6, dtype=torch.int8).view(2, 3, 2),
    "a": torch.tensor([300, -300], dtype=torch.int16),
    "count": torch.tensor(3),
    "x": torch.ones(2),
}


def meta(tensors):
    return {name: value.to("meta") for name, value in tensors.items()}


def table_of(tensors):
    codes = {torch.uint8: "U8", torch.float32: "F32", torch.int64: "I64", torch.int8: "I8", torch.int16: "I16"}
    return {name: Entry(codes[value.dtype], tuple(value.shape), 0, 0) for name, value in tensors.items()}


def test_integers_come_back():
    stored = packed(OWN, OWN)
    assert set(stored) == {CODE_NAME, "count", "x"}
    again = unpacked(stored, meta(OWN))
    assert again.keys() == OWN.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in OWN.items())
    assert decoded_table(table_of(stored), meta(OWN)) == table_of(OWN)


def test_without_integers_there_is_no_code():
    own = {"x": torch.ones(2), "count": torch.tensor(3)}
    assert packed(own, own) == own
    assert decoded_table(table_of(own), meta(own)) == table_of(own)
    assert unpacked(own, meta(own)) == own


def test_without_expectations_the_code_stays():
    stored = packed(OWN, OWN)
    assert unpacked(stored, {}) == stored


def test_what_a_code_may_not_hold_is_stored_without_it(monkeypatch):
    monkeypatch.setattr(integers, "_ALWAYS", 0)
    zeros = {"a": torch.zeros(100, 100, dtype=torch.int8)}
    assert packed(zeros, zeros) == zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CODE_NAME: Entry("I8", (40,), 0, 0)}, "is I8 of shape"),
        ({CODE_NAME: Entry("U8", (4, 10), 0, 0)}, r"is U8 of shape \(4, 10\)"),
        ({"a": Entry("I16", (2,), 0, 0)}, r"integers without it are \['a'\]"),
    ],
)
def test_tables_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        decoded_table({**table_of(packed(OWN, OWN)), **change}, meta(OWN))


def test_a_code_of_nothing_is_refused():
    with pytest.raises(ValueError, match="integers without it are not described"):
        decoded_table(table_of(packed(OWN, OWN)), {"x": torch.ones(2)})


def test_no_more_is_decoded_than_the_length_of_the_code_permits():
    huge = {"a": torch.empty(2**20, 2**20, dtype=torch.int8, device="meta")}
    with pytest.raises(ValueError, match=r"1,000 bytes is stated to hold 1,099,511,627,776 integers, too many"):
        decoded_table({CODE_NAME: Entry("U8", (1000,), 0, 0)}, huge)


@pytest.fixture
def path(tmp_path):
    generator = SubspaceGenerator(6, [(0, 2, 3, -1, 0, 1)], 1, 1, rank=1, path_rank=0)
    posterior = DistilledPosterior(Layout({"w": (2, 3)}), generator)
    posterior.generator.requires_grad_(False).parts[0].frame.fill_(3)
    posterior.save(tmp_path / "p")
    return tmp_path / "p"


def test_a_damaged_code_is_refused_as_a_damaged_file(path, monkeypatch):
    assert CODE_NAME in artifact.read_table(path)
    contents = bytearray(path.read_bytes())
    header = tensor_file.read_header(artifact.KIND, path)
    contents[header.data_start + header.table[CODE_NAME].stop - 1] ^= 1
    start = header.data_start + header.digest.start
    contents[start : start + 32] = tensor_file.digest_of(header, memoryview(contents)[header.data_start :])
    path.write_bytes(contents)
    with pytest.raises(ArtifactError, match=r"is damaged: the code of integers .*\. Save the posterior again"):
        DistilledPosterior.load(path)


def test_sizes_are_checked_before_the_file_is_read(path, monkeypatch):
    monkeypatch.setattr(integers, "_ALWAYS", 0)
    monkeypatch.setattr(integers, "_PER_BYTE", 0)
    monkeypatch.setattr(tensor_file, "read_tensors", lambda *args: pytest.fail("tensors were read"))
    with pytest.raises(ArtifactError, match=r"is damaged: a code of .* too many for it"):
        DistilledPosterior.load(path)


def test_integers_keep_the_dtype_that_is_described(path):
    original = DistilledPosterior.load(path)
    wrong = original._artifact()
    wrong.tensors["parts.0.frame"] = wrong.tensors["parts.0.frame"].long()
    artifact.write(wrong, path)
    with pytest.raises(ArtifactError, match=r"integers|'parts\.0\.frame' is torch\.int64"):
        DistilledPosterior.load(path)
