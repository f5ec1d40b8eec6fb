# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A file is written as a whole or not at all."""

import errno
import os
import shutil

import pytest

from pyro_apd.runtime.files import atomic_write, check_regular, is_running, machine, remove_leftovers


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("before")
    return path


def write(path, text, **options):
    with atomic_write(path, **options) as temporary:
        temporary.write_text(text)


def test_what_was_there_is_replaced(path):
    write(path, "after")
    assert path.read_text() == "after"
    assert os.listdir(path.parent) == [path.name]


def test_what_was_there_is_kept_where_it_is_asked_for(path):
    previous = path.with_name("older.json")
    write(path, "after", previous=previous)
    assert (path.read_text(), previous.read_text()) == ("after", "before")
    path.unlink()
    write(path, "first", previous=previous)
    assert (path.read_text(), previous.read_text()) == ("first", "before")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_what_was_there(path, error):
    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_says_what_is_intact(path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.EACCES, "disk full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(PermissionError, match=r"Cannot write '.*table.json': disk full. '.*table.json' is as it was"):
        write(path, "after")
    with pytest.raises(PermissionError, match=r"Cannot write '.*new.json': disk full. Nothing was written."):
        write(path.with_name("new.json"), "after")
    assert path.read_text() == "before"
    assert os.listdir(path.parent) == [path.name]


def test_without_an_error_number_too(path, monkeypatch):
    with pytest.raises(OSError, match=r"table.json': odd. '.*table.json' is as it was before"), atomic_write(path):
        raise OSError("odd")


def test_file_and_folder_are_synced_before_and_after_the_rename(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, f=original: (calls.append(name), f(*args))[1])
    write(path, "after")
    assert calls == ["fsync", "replace", "fsync"]


def test_files_have_the_permissions_that_the_user_gives_new_files(path):
    (path.parent / "other").write_text("")
    write(path, "after")
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Cannot write '.*x.txt': there is no folder '.*nowhere'"):
        write(tmp_path / "nowhere" / "x.txt", "")


def test_two_writers_do_not_share_a_temporary_file(path):
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


def test_leftovers_of_a_killed_writer_are_removed(path):
    with atomic_write(path) as temporary:
        temporary.write_text("after")
    leftover = temporary
    leftover.write_text("half")
    remove_leftovers(path)
    assert os.listdir(path.parent) == [path.name]
    remove_leftovers(path / "no folder")


def leftover(path, process, machine_name=None):
    """What a process that was killed while it wrote ``path`` leaves."""
    left = path.with_name(f".{path.name}.{machine_name or machine()}-{process}-01234567.tmp")
    left.write_text("half")
    return left


ENDED = 999_999_999


def test_the_next_write_removes_what_a_killed_one_left(path):
    leftover(path, ENDED)
    leftover(path, os.getpid())  # of a process that had this number before
    write(path, "after")
    assert os.listdir(path.parent) == [path.name]


def test_files_of_running_processes_and_of_other_machines_stay(path):
    of_parent = leftover(path, os.getppid())
    elsewhere = leftover(path, ENDED, "0" * 8)
    others = [
        path.with_name(f".{path.name}.json.{machine()}-{ENDED}-01234567.tmp"),
        path.with_name(f".{path.name}.tmp"),
    ]
    for other in others:
        other.write_text("of another file")
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        write(path, "other")  # while the first is being written
        assert temporary.exists()
    assert {of_parent, elsewhere, *others, path} == set(path.parent.iterdir())
    os.utime(elsewhere, (0, 0))
    write(path, "after")
    assert not elsewhere.exists()


def test_names_are_no_patterns(tmp_path):
    path = tmp_path / "posterior[1].*"
    leftover(path, ENDED)
    other = leftover(tmp_path / "posterior1.x", ENDED)
    write(path, "after")
    assert {path, other} == set(tmp_path.iterdir())


def test_a_folder_is_not_replaced(path):
    folder = path.with_name("folder")
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"Cannot write '.*folder': it is a folder"):
        write(folder, "after", previous=path.with_name("older"))
    assert set(path.parent.iterdir()) == {folder, path}


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    path = tmp_path / "folder" / "table.json"
    path.parent.mkdir()

    def remove():
        with atomic_write(path) as temporary:
            temporary.write_text("after")
            shutil.rmtree(path.parent)

    with pytest.raises(FileNotFoundError, match=r"Cannot write '.*table.json'.* Nothing was written"):
        remove()


@pytest.mark.parametrize(("error", "expected"), [(ProcessLookupError, False), (PermissionError, True), (None, True)])
def test_which_processes_run(error, expected, monkeypatch):
    def kill(process, number):
        assert number == 0
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert is_running(3) is expected
    monkeypatch.setattr(os, "name", "nt")
    assert is_running(3)


def test_only_regular_files_can_be_read(path, tmp_path):
    assert check_regular(path).st_size == len("before")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(path, tmp_path / "link")
    check_regular(tmp_path / "link")
    for what, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe or a device")):
        with pytest.raises(ValueError, match=f"is {kind}, not a file"):
            check_regular(what)
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "nowhere")


def test_pipes_are_not_replaced_and_links_are_followed(path, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe or a device"):
        write(pipe, "after")
    assert not pipe.is_file()
    link = tmp_path / "link"
    link.symlink_to(path)
    write(link, "after")
    assert link.is_symlink()
    assert path.read_text() == "after"
