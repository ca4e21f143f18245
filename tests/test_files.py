"""Files that are whole or not there: the order of what makes them so, and what is said when the disk refuses."""

import errno
import os

import pytest

from ltat_fast import files
from ltat_fast.errors import UserError


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is asked of the file system, in order."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        seen.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')).split('.')[-1]}")
        fsync(descriptor)

    def replaced(source, target):
        seen.append(f"{source.name.split('.')[-1]} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    return seen


def write(path, content: bytes, previous=None) -> None:
    with files.atomic_write(path, previous) as file:
        file.write(content)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="sees through /proc which file is synced")
def test_synced_before_it_is_named_and_the_name_after(tmp_path, calls):
    """A power cut after any of these leaves a whole file under one of the names."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.new", b"1", folder / "a.old")
    assert calls == ["sync partial", "partial -> a.new", "sync folder"]
    calls.clear()
    write(folder / "a.new", b"2", folder / "a.old")
    assert calls == ["sync partial", "new -> a.old", "partial -> a.new", "sync folder"]
    assert [(folder / name).read_bytes() for name in ("a.new", "a.old")] == [b"2", b"1"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG])
def test_what_the_disk_refuses_is_one_sentence(tmp_path, monkeypatch, number):
    path = tmp_path / "a"
    write(path, b"old")

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", refuse)
        with pytest.raises(UserError) as error:
            write(path, b"new")
    assert str(error.value) == f"cannot write {path}: {os.strerror(number)}; files saved earlier are intact"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", only_files)
    write(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
