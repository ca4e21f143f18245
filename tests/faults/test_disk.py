"""Disks that are full, read-only or limited: one sentence, no half-written file, and afterwards --resume goes on."""

import os
import resource
import shutil
from pathlib import Path

import pytest

from helpers import launching, small_disks, train_runs
from helpers.launching import assert_same
from ltat_fast.runs import log
from ltat_fast.runs.weights import read_weights


def assert_whole(run_dir: Path) -> None:
    for file in run_dir.rglob("*.safetensors"):
        read_weights(file)
    assert not list(run_dir.rglob("*.partial"))


# A state is 0.6 MB and weights are 0.3: full in the teacher, in its second save, and in the student.
@pytest.mark.parametrize("size", ["400k", "1500k", "2800k"])
def test_a_full_disk(tmp_path, undisturbed, size):
    with small_disks.file_system(tmp_path / "disk", size) as disk:
        err = launching.finish(disk / "run", status=2)
        assert err.startswith("ltat_fast: error: cannot write ")
        assert "No space left on device" in err
        assert err.count("\n") == 1
        assert_whole(disk / "run")
        small_disks.remount(disk, "size=64m")
        launching.finish(disk / "run")
        assert_same(disk / "run", undisturbed)


def test_a_file_may_grow_no_larger(tmp_path, undisturbed):
    """The quota that every user can set."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))

    with launching.running(tmp_path / "run", preexec_fn=limit) as (process,):
        _, err = train_runs.finish(process, status=2)
    assert err.startswith("ltat_fast: error: cannot write ")
    assert "resume.safetensors: File too large" in err
    assert err.count("\n") == 1
    assert_whole(tmp_path / "run")
    launching.finish(tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


def test_a_line_of_the_record_that_did_not_fit_is_not_read_back(tmp_path):
    with small_disks.file_system(tmp_path / "disk", "64k") as disk:
        record = log.StageLog(disk, 0)
        record.epoch({"epoch": 1, "loss": 0.5})
        (disk / "ballast").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        with pytest.raises(log.files.UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            record.epoch({"epoch": 2, "note": "x" * 10_000})
        record.close()
        assert log.read_metrics(disk / "metrics.jsonl") == [{"epoch": 1, "loss": 0.5}]


def test_a_read_only_run_folder(tmp_path, undisturbed, capfd):
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


def test_images_on_a_disk_that_keeps_no_cache(tmp_path, image_tree, monkeypatch, capfd):
    """Neither beside the images nor in the user's own cache: they are decoded for this run alone."""
    with small_disks.file_system(tmp_path / "disk", "64m") as disk:
        shutil.copytree(image_tree, disk / "images", ignore=lambda folder, names: {n for n in names if n[0] == "."})
        small_disks.remount(disk, "ro")
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "cache"))
        flags = (*train_runs.FOLDER, "--method", "pgd-at", "--data-dir", str(disk / "images"))
        flags += ("--out", str(tmp_path / "run"))
        assert train_runs.train(*flags) == 0
        assert capfd.readouterr().out.count("cannot keep decoded images in") == 2


def test_two_runs_into_one_folder_at_once(tmp_path, undisturbed):
    """Whichever is first trains; the other is told, and does no harm."""
    out = tmp_path / "run"
    with launching.running(out) as (one,), launching.running(out) as (other,):
        errors = {process.communicate(timeout=120)[1]: process.returncode for process in (one, other)}
    assert sorted(errors.values()) == [0, 2]
    (refusal,) = [err for err, status in errors.items() if status == 2]
    assert "is being trained by another process" in refusal or "is not empty" in refusal
    assert_same(out, undisturbed)
