"""Disks that are full, read-only or limited: one clear error, no half-written file, and --resume works afterwards."""

import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import launching, small_disks, train_runs
from helpers.train_runs import assert_same
from ltat_fast.errors import UserError
from ltat_fast.runs.records import StageLog, read_metrics
from ltat_fast.runs.weights import read_weights


def assert_whole(run_dir: Path) -> None:
    for file in run_dir.rglob("*.safetensors"):
        read_weights(file)
    assert not list(run_dir.rglob("*.partial"))


# A state has 0.6 MB and weights have 0.3: these disks are full in the first and second save of the teacher, and in the
# student.
@pytest.mark.parametrize("size", ["400k", "1500k", "2800k"])
def test_a_run_on_a_full_disk_resumes_once_there_is_room(tmp_path, undisturbed, capfd, size):
    with small_disks.file_system(tmp_path / "disk", size) as disk:
        assert launching.train(disk / "run") == 2
        err = capfd.readouterr().err
        assert err.startswith("ltat_fast: error: cannot write ")
        assert "No space left on device" in err
        assert err.count("\n") == 1
        assert_whole(disk / "run")
        small_disks.remount(disk, "size=64m")
        assert launching.train(disk / "run") == 0
        assert_same(disk / "run", undisturbed)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The quota of this process that every user can set, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_with_a_file_size_limit_resumes_without_it(tmp_path, undisturbed, capfd):
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "Python turns this signal into an OSError"
    with file_size_limit(500_000):
        assert launching.train(tmp_path / "run") == 2
    err = capfd.readouterr().err
    assert err.startswith("ltat_fast: error: cannot write ")
    assert "resume.safetensors: File too large" in err
    assert err.count("\n") == 1
    assert_whole(tmp_path / "run")
    assert launching.train(tmp_path / "run") == 0
    assert_same(tmp_path / "run", undisturbed)


def test_a_metrics_line_that_did_not_fit_on_the_disk_is_not_read_back(tmp_path):
    with small_disks.file_system(tmp_path / "disk", "64k") as disk:
        record = StageLog(disk, 0)
        record.epoch({"epoch": 1, "loss": 0.5})
        (disk / "ballast").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            record.epoch({"epoch": 2, "note": "x" * 10_000})
        record.close()
        assert read_metrics(disk / "metrics.jsonl") == [{"epoch": 1, "loss": 0.5}]


def test_a_read_only_run_folder_is_refused(tmp_path, undisturbed, capfd):
    with small_disks.file_system(tmp_path / "disk", "64m") as disk:
        shutil.copytree(undisturbed, disk / "run")
        small_disks.remount(disk, "ro")
        for flags, words in (
            (("--out", str(disk / "run"), "--resume"), "cannot write into the run folder"),
            (("--out", str(disk / "new")), "cannot create the run folder"),
            (("--out", str(disk)), "is not empty"),
        ):
            assert train_runs.train(*flags) == 2
            err = capfd.readouterr().err
            assert words in err
            assert err.count("\n") == 1
        small_disks.remount(disk, "rw")
        assert train_runs.train("--out", str(disk / "run"), "--resume") == 0


def test_images_are_decoded_for_one_run_if_no_disk_keeps_the_cache(tmp_path, image_tree, monkeypatch, capfd):
    """Neither the folder of the images nor the user's cache folder can be written."""
    with small_disks.file_system(tmp_path / "disk", "64m") as disk:
        shutil.copytree(image_tree, disk / "images", ignore=lambda folder, names: {n for n in names if n[0] == "."})
        small_disks.remount(disk, "ro")
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "cache"))
        flags = (*train_runs.FOLDER, "--method", "pgd-at", "--data-dir", str(disk / "images"))
        flags += ("--out", str(tmp_path / "run"))
        assert train_runs.train(*flags) == 0
        assert capfd.readouterr().out.count("cannot keep decoded images in") == 2


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, undisturbed, capfd):
    """The first run has locked the folder and written nothing yet: the second finds no run there."""
    out = tmp_path / "run"
    with launching.running(out, LTAT_SIGNAL="SIGSTOP 1 rename config.json") as (first,):
        train_runs.wait_until_stopped(first)
        assert launching.train(out) == 2
        first.send_signal(signal.SIGCONT)
        train_runs.finish(first)
    assert "is being trained by another process" in capfd.readouterr().err
    assert_same(out, undisturbed)
