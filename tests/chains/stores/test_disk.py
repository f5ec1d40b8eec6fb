# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import pickle
import resource
import struct

import numpy as np
import pytest
import torch

from pyro_apd.chains.stores.base import STATISTICS
from pyro_apd.chains.stores.disk import DiskStore, open_store
from pyro_apd.models.layout import Layout
from tests.chains.stores.test_base import LAYOUT, draw_of, expected_theta, fill, resident


@pytest.fixture
def path(tmp_path):
    fill(DiskStore.create(tmp_path / "store", LAYOUT, 2, 5, torch.float32, {"note": 1})).close()
    return tmp_path / "store"


def test_anybody_can_read_the_files(path):
    theta = np.load(path / "theta.npy", mmap_mode="r")
    np.testing.assert_array_equal(theta, expected_theta().numpy())
    figures = np.load(path / "statistics.npy")
    description = json.loads((path / "draws.json").read_text())
    assert description["statistics"] == ["is_kept", *STATISTICS]
    assert figures.shape == (2, 5, 4)
    assert (figures[..., 0] == 1).all()
    assert Layout.from_json(description["layout"]) == LAYOUT


def test_reopened(path):
    store = open_store(path)
    assert (store.num_chains, store.num_draws, store.counts, store.info) == (2, 5, [5, 5], {"note": 1})
    assert torch.equal(store.unconstrained(), expected_theta())
    torch.testing.assert_close(store.get_samples()["mix"], LAYOUT.constrain(expected_theta())["mix"].flatten(0, 1))


def test_another_process_sees_what_was_written_so_far(tmp_path):
    store = fill(DiskStore.create(tmp_path / "store", LAYOUT, 2, 5, torch.float32), 3)
    reader = open_store(tmp_path / "store")
    assert reader.counts == [3, 3]
    assert torch.equal(reader.unconstrained(), expected_theta(3))
    store.write(0, 3, draw_of(0, 3).unsqueeze(0), dict.fromkeys(STATISTICS, 1.0))
    assert reader.counts == [4, 3]
    assert torch.equal(reader.theta_CSD[0, 3], draw_of(0, 3))


def test_a_draw_counts_only_once_it_is_whole(tmp_path):
    store = fill(DiskStore.create(tmp_path / "store", LAYOUT, 1, 5, torch.float32), 2, chains=(0,))
    store._put("theta.npy", 0, 2, draw_of(0, 2))  # killed between the draw and what says that it is there
    assert open_store(tmp_path / "store").counts == [2]


def test_changing_a_tensor_does_not_change_the_files(path):
    samples = open_store(path).get_samples(group_by_chain=True)
    samples["w"].zero_()
    assert torch.equal(open_store(path).unconstrained(), expected_theta())


def test_a_replaced_store_leaves_tensors_that_were_read(tmp_path):
    path = tmp_path / "own"
    fill(DiskStore.create(path, LAYOUT, 2, 5, torch.float32, {"run": "a"})).close()
    opened = open_store(path)
    before = opened.get_samples(group_by_chain=True)["w"]
    store = DiskStore.create(path, LAYOUT, 1, 1, torch.float32, replacing="a")
    assert store.counts == [0]
    assert torch.equal(before, LAYOUT.split(expected_theta())["w"])
    for stale in (opened, pickle.loads(pickle.dumps(opened))):
        with pytest.raises(ValueError, match=r"was replaced by that of another run.*open_store"):
            stale.get_samples()


def test_draws_of_another_run_are_not_replaced(path):
    for replacing in (None, "another"):
        with pytest.raises(FileExistsError, match=r"store_path=.* earlier run, \[5, 5\] by chain.*Give another path"):
            DiskStore.create(path, LAYOUT, 1, 1, torch.float32, replacing=replacing)
    assert open_store(path).counts == [5, 5]
    os.truncate(path / "theta.npy", 10)
    with pytest.raises(FileExistsError, match=r"store_path=.* cannot be read .*Give another path"):
        DiskStore.create(path, LAYOUT, 1, 1, torch.float32)


def test_a_store_without_draws_is_replaced(tmp_path):
    for num_draws in (5, 2):
        DiskStore.create(tmp_path / "store", LAYOUT, 1, num_draws, torch.float32).close()
    assert open_store(tmp_path / "store").num_draws == 2


def test_a_removed_store_leaves_tensors_that_were_read(path):
    store = open_store(path)
    theta = store.theta_CSD
    store.remove()
    assert not path.exists()
    assert torch.equal(theta, expected_theta())


def test_pickles_by_its_path(path):
    store = pickle.loads(pickle.dumps(open_store(path)))
    assert torch.equal(store.unconstrained(), expected_theta())
    assert len(pickle.dumps(store)) < 10_000


def test_files_are_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for i in range(5):
        fill(DiskStore.create(tmp_path / str(i), LAYOUT, 2, 5, torch.float32)).samples()
    store = fill(DiskStore.create(tmp_path / "closed", LAYOUT, 2, 5, torch.float32))
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"store_path=.*is no store"):
        DiskStore.create(tmp_path, LAYOUT, 1, 1, torch.float32)
    with pytest.raises(FileExistsError, match="store_path="):
        DiskStore.create(tmp_path / "thesis.tex", LAYOUT, 1, 1, torch.float32)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_no_room_is_said_before_the_run(tmp_path):
    with pytest.raises(OSError, match=r"The draws take .* MB .* has .* MB left"):
        DiskStore.create(tmp_path / "store", LAYOUT, 1000, 10**12, torch.float32)


def damage_json(path):
    (path / "draws.json").write_text("{")


def damage_kind(path):
    (path / "draws.json").write_text("[]")


def damage_shape(path):
    description = json.loads((path / "draws.json").read_text())
    (path / "draws.json").write_text(json.dumps(description | {"shape": [2, 5, 3]}))


def damage_dtype(path):
    description = json.loads((path / "draws.json").read_text())
    (path / "draws.json").write_text(json.dumps(description | {"dtype": "load"}))


def newer(path):
    description = json.loads((path / "draws.json").read_text())
    (path / "draws.json").write_text(json.dumps(description | {"format": 99}))


def truncate(path):
    os.truncate(path / "theta.npy", 200)


def other_array(path):
    np.save(path / "theta.npy", np.zeros((2, 5, 4), np.float32))


def no_array(path):
    (path / "statistics.npy").write_bytes(b"nothing")


def missing_array(path):
    (path / "statistics.npy").unlink()


def set_description(**changes):
    def damage(path):
        description = json.loads((path / "draws.json").read_text())
        (path / "draws.json").write_text(json.dumps(description | changes))

    return damage


def with_contents(name, contents):
    return lambda path: (path / name).write_bytes(contents)


def replaced(name, make):
    def damage(path):
        (path / name).unlink()
        make(path / name)

    return damage


def with_header(text):
    """NumPy's header, which it evaluates as Python."""
    header = text.encode()
    return with_contents("theta.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


HUGE = [{"name": "w", "shape": [2**40], "support": {"kind": "real"}}]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_contents("draws.json", b"[" * 100_000), "draws.json is not JSON .*recursion"),
        (with_contents("draws.json", b"\xff\xfe"), "draws.json is not JSON"),
        (with_contents("draws.json", b" " * 5_000_000), "draws.json has 5,000,000 bytes"),
        (replaced("draws.json", os.mkdir), "is a folder"),
        (replaced("draws.json", os.mkfifo), "is a pipe"),
        (replaced("theta.npy", os.mkdir), "theta.npy cannot be read .*folder"),
        (replaced("statistics.npy", os.mkfifo), "statistics.npy cannot be read .*pipe"),
        (with_header("{'descr': (\n"), "theta.npy cannot be read"),
        (with_header("(" * 2000), "theta.npy cannot be read"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': ('a',)}"), "theta.npy cannot be read"),
        (set_description(info=5), "do not go together"),
        (set_description(shape=[2, True, 4]), "do not go together"),
        (set_description(shape=[2**40, 2**40, 2**40], layout=HUGE), "theta.npy is <f4 of shape"),
        (set_description(format=True), "format True"),
        (set_description(layout=[{"name": "w" * 10**5, "shape": ["x"], "support": 0}]), "malformed"),
        (damage_json, "draws.json is not JSON"),
        (damage_kind, "does not describe a store"),
        (damage_shape, "do not go together"),
        (damage_dtype, "do not go together"),
        (newer, "format 99.*Update"),
        (truncate, "theta.npy is .* 200 bytes"),
        (other_array, r"theta.npy is <f4 of shape \(2, 5, 4\)"),
        (no_array, "statistics.npy cannot be read"),
        (missing_array, "statistics.npy cannot be read"),
    ],
)
def test_damaged_stores_are_refused(path, damage, message):
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        open_store(path)
    assert len(str(caught.value)) < 1000


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"draws\.json"):
        open_store(tmp_path)
    with pytest.raises(FileNotFoundError, match="store_path"):
        open_store(tmp_path / "nowhere")


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path):
    """A limit on the size of files stands in for the disk; writing through a mapping would end in a signal."""
    store = DiskStore.create(tmp_path / "store", Layout({"w": (1000,)}), 1, 10, torch.float32)

    def write():
        for draw in range(10):
            store.write(0, draw, torch.ones(1, 1000), dict.fromkeys(STATISTICS, 1.0))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_store(store.path).counts == [4]


def test_writing_takes_no_memory(tmp_path):
    store = DiskStore.create(tmp_path / "store", Layout({"w": (100_000,)}), 1, 200, torch.float32)
    draw_1D = torch.ones(1, 100_000)
    store.write(0, 0, draw_1D, dict.fromkeys(STATISTICS, 1.0))
    before = resident()
    for draw in range(1, 200):
        store.write(0, draw, draw_1D, dict.fromkeys(STATISTICS, 1.0))
    assert resident() - before < 5e6  # of 80 MB
    assert store.counts == [200]
