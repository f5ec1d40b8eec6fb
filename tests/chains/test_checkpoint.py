# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import os
from pathlib import Path

import pytest
import torch

from pyro_apd.chains.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    previous_path,
    read_checkpoint,
    read_file,
    write_checkpoint,
)
from pyro_apd.runtime.files import machine

IDENTITY = {"kernel": "SGLD", "seed": 3, "layout": ["w[3]"]}


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "theta": torch.randn(2, 3, generator=generator),
        "rng": generator.get_state(),
        "step": step,
        "best": 0.1 + step,
        "lost": math.nan,
        "is_warm": True,
        "name": "w",
        "none": None,
        "nested": {
            "list": [1, 2.5, torch.tensor(3.0, dtype=torch.bfloat16)],
            "empty": {},
            "flags": torch.tensor([True]),
        },
        "large": 2**62 + 1,
    }


def checkpoint_of(step):
    note = {"chain": 1, "step": 7, "message": "ran away"}
    return Checkpoint(IDENTITY, {0: Progress(step, state_of(step)), 1: Progress(10, None, [note])}, {"run": "abc"})


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other or (one != one and other != other)


@pytest.fixture
def path(tmp_path):
    write_checkpoint(tmp_path / "run.ckpt", checkpoint_of(4))
    write_checkpoint(tmp_path / "run.ckpt", checkpoint_of(5))
    return tmp_path / "run.ckpt"


def test_round_trip_is_exact(path):
    found = read_checkpoint(path)
    assert (found.identity, found.notes) == (IDENTITY, {"run": "abc"})
    assert found.chains[0].num_done == 5
    assert_same(found.chains[0].state, state_of(5))
    assert found.chains[1] == Progress(10, None, checkpoint_of(5).chains[1].divergences)
    generator = torch.Generator()
    generator.set_state(found.chains[0].state["rng"])


def test_the_one_before_is_kept(path):
    assert previous_path(path).name == "run.ckpt.previous"
    assert read_checkpoint(previous_path(path)).chains[0].num_done == 4
    write_checkpoint(path, checkpoint_of(6))
    assert read_checkpoint(previous_path(path)).chains[0].num_done == 5


def test_nothing_is_pickled(path):
    contents = path.read_bytes()
    assert b"torch" not in contents
    length = int.from_bytes(contents[:8], "little")
    description = json.loads(json.loads(contents[8 : 8 + length])["__metadata__"]["pyro_apd_checkpoint"])
    assert description["identity"] == IDENTITY


def test_no_checkpoint_yet(tmp_path):
    assert read_checkpoint(tmp_path / "run.ckpt") is None


@pytest.mark.parametrize("position", [3, 40, 300, -200, -1])
def test_a_flipped_bit_is_found_and_the_one_before_used(path, position):
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)
    with pytest.warns(RuntimeWarning, match=r"run.ckpt is .*(damaged|not|no).*one before it, '.*run.ckpt.previous'"):
        assert read_checkpoint(path).chains[0].num_done == 4


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated(path, length):
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    with pytest.warns(RuntimeWarning, match=r"is (truncated or )?damaged|is not a safetensors file"):
        assert read_checkpoint(path).chains[0].num_done == 4


def test_both_damaged(path):
    path.write_bytes(b"x" * 100)
    os.truncate(previous_path(path), 50)
    with pytest.raises(
        CheckpointError, match=r"No checkpoint can be used.*run.ckpt is.*previous is.*Nothing w"
    ) as error:
        read_checkpoint(path)
    assert "elete" not in str(error.value)
    assert (path.read_bytes(), previous_path(path).stat().st_size) == (b"x" * 100, 50)


def test_killed_between_the_two_renames(path, monkeypatch):
    """There is a checkpoint under its own name at every moment of a write."""
    rename, found = os.replace, []

    def watched(*names):
        found.append(read_file(path).chains[0].num_done)
        rename(*names)

    monkeypatch.setattr("pyro_apd.runtime.files.os.replace", watched)
    write_checkpoint(path, checkpoint_of(6))
    assert found == [5, 5]
    assert read_checkpoint(path).chains[0].num_done == 6


@pytest.mark.parametrize("has_links", [True, False])
def test_a_run_that_was_removed_is_not_resumed_from_the_one_before(path, has_links, monkeypatch):
    if not has_links:

        def no_link(*names):
            raise OSError("no links here")

        monkeypatch.setattr("pyro_apd.runtime.files.os.link", no_link)
        write_checkpoint(path, checkpoint_of(5))
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint '.*run.ckpt'.*rename it to 'run.ckpt'.*move it away, too"
    ):
        read_checkpoint(path)
    previous_path(path).rename(path)
    assert read_checkpoint(path).chains[0].num_done == (4 if has_links else 5)


def test_after_a_damaged_checkpoint_the_one_before_has_its_name(path):
    """A run that is killed before its next checkpoint is resumed again."""
    path.write_bytes(b"x" * 100)
    with pytest.warns(RuntimeWarning, match="the newest is now at"):
        read_checkpoint(path)
    assert read_checkpoint(path).chains[0].num_done == 4
    write_checkpoint(path, checkpoint_of(6))
    assert read_checkpoint(previous_path(path)).chains[0].num_done == 4


def test_newer_format(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pyro_apd.chains.checkpoint.FORMAT_VERSION", 9)
        write_checkpoint(path, checkpoint_of(6))
    with pytest.warns(RuntimeWarning, match="format 9, newer"):
        assert read_checkpoint(path).chains[0].num_done == 5


def test_a_failed_write_leaves_what_was_there(path):
    before = sorted(os.listdir(path.parent)), path.read_bytes()
    with pytest.raises(TypeError, match="got a function"):
        write_checkpoint(path, Checkpoint(IDENTITY, {0: Progress(6, {"f": test_no_checkpoint_yet})}))
    with pytest.raises(TypeError, match="keys must be strings"):
        write_checkpoint(path, Checkpoint(IDENTITY, {0: Progress(6, {"f": {1: 2}})}))
    assert (sorted(os.listdir(path.parent)), path.read_bytes()) == before


def test_an_interrupted_write_leaves_what_was_there(path, monkeypatch):
    before = sorted(os.listdir(path.parent)), path.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, checkpoint_of(6))
    assert (sorted(os.listdir(path.parent)), path.read_bytes()) == before


def test_leftovers_of_a_killed_writer_are_swept(path):
    (path.parent / f".run.ckpt.{machine()}-999999999-01234567.tmp").write_bytes(b"half")
    assert read_checkpoint(path).chains[0].num_done == 5
    assert sorted(os.listdir(path.parent)) == ["run.ckpt", "run.ckpt.previous"]


def test_a_damaged_checkpoint_is_put_aside_and_not_in_place_of_the_undamaged_one(path):
    os.truncate(path, 100)
    path.with_name("run.ckpt.damaged").write_text("of another day")
    with pytest.warns(RuntimeWarning, match=r"newest is now at '.*run.ckpt.damaged1'"):
        read_checkpoint(path)
    write_checkpoint(path, checkpoint_of(6))
    assert read_checkpoint(path).chains[0].num_done == 6
    assert path.with_name("run.ckpt.damaged").read_text() == "of another day"
    assert path.with_name("run.ckpt.damaged1").stat().st_size == 100


@pytest.mark.parametrize("name", ["run.ckpt", "run.ckpt.previous"])
@pytest.mark.parametrize(("make", "what"), [(Path.mkdir, "is a folder"), (os.mkfifo, "is a pipe or a device")])
def test_what_is_no_file_is_left_alone(name, make, what, tmp_path):
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint='.*{name}' {what}, and must be a file. Give") as error:
        read_checkpoint(tmp_path / "run.ckpt")
    assert "elete" not in str(error.value)
    assert os.listdir(tmp_path) == [name]


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "table.csv").write_text("1,2,3\n" * 100)
    with pytest.raises(CheckpointError, match=r"table.csv is not a safetensors.*Give another checkpoint=") as error:
        read_checkpoint(tmp_path / "table.csv")
    assert "elete" not in str(error.value)
    assert (tmp_path / "table.csv").read_text() == "1,2,3\n" * 100


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run.ckpt' cannot be read \(Not a directory\)"):
        read_checkpoint(tmp_path / "file" / "run.ckpt")


@pytest.mark.parametrize("part", ["identity", "notes"])
def test_identity_and_notes_are_tables(part, path):
    write_checkpoint(path, Checkpoint(**{"identity": {}, "chains": {}, "notes": {}, part: [1]}))
    with pytest.raises(CheckpointError, match="must be tables"):
        read_file(path)
