"""Commands that start several runs: unusable folders and disks are refused in one sentence before any run starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import small_disks, train_runs
from ltat_fast.errors import EXIT_INTERRUPTED, Interrupted, UserError
from ltat_fast.runs.jobs import Job, train_all

COMMANDS = {
    "demo": (),
    "sweep": ("--table", "10", "--dataset", "digits-lt", "--seeds", "0"),
    "sensitivity": ("--values", "1"),
}


@pytest.fixture
def command(monkeypatch):
    """``command(*words)`` sets the command that every job runs instead of a training run."""

    def run_instead(*words):
        monkeypatch.setattr(Job, "command", property(lambda job: words))

    run_instead("touch", "begun")
    return run_instead


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_used_is_refused(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with small_disks.file_system(tmp_path / "disk", "64k") as disk:
        (disk / "there").mkdir()
        small_disks.remount(disk, "ro")
        for out, words in (
            ("file", "file is a file, not a folder\n"),
            ("disk/new", "cannot write disk/new: Read-only file system; "),
            ("disk/there", "seed0.log: Read-only file system; "),
        ):
            assert train_runs.status_of(name, *COMMANDS[name], "--out", out) == 2
            said = capsys.readouterr().err
            assert words in said
            assert said.count("\n") == 1
    assert not Path("begun").exists()


def test_a_log_that_does_not_fit_on_the_disk_is_refused(command, tmp_path):
    command("sh", "-c", "yes | head -c 200000")
    with (
        small_disks.file_system(tmp_path / "disk", "64k") as disk,
        pytest.raises(UserError, match=r"cannot write .*/a\.log: No space left on device"),
    ):
        train_all([Job(disk / "a", ())])


def test_only_requested_lines_and_errors_reach_the_terminal(command, tmp_path, capsys):
    """Everything else is only in the log of the run."""
    command("sh", "-c", "echo epoch 1; echo ltat_fast: error: no images >&2; echo epoch 2; exit 2")
    job = Job(tmp_path / "a", ())
    assert train_all([job], show=lambda line: line.startswith("epoch 2")) == {job: 2}
    said = capsys.readouterr().out
    assert "a ltat_fast: error: no images\na epoch 2\na ended with status 2, see" in said
    assert "epoch 1" not in said
    assert job.log_file.read_text() == "epoch 1\nltat_fast: error: no images\nepoch 2\n"


def test_a_study_that_is_started_again_gives_the_same_threads(command, tmp_path, monkeypatch, capsys):
    """The first time both runs are to do, the second time one is left."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    command("sh", "-c", "echo ltat_fast: $OMP_NUM_THREADS threads")
    jobs = [Job(tmp_path / name, ()) for name in "ab"]
    train_all(jobs, study=jobs)
    assert capsys.readouterr().out.count("ltat_fast: 2 threads") == 2
    train_all(jobs[1:], study=jobs)
    assert capsys.readouterr().out.count("ltat_fast: 2 threads") == 1


def test_a_signal_reaches_the_processes_of_a_study(command, tmp_path):
    """A process that has not started yet does not start."""
    command("sh", "-c", "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done")

    def show(line: str) -> bool:
        if line == "ready\n":
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    jobs = [Job(tmp_path / str(number), ()) for number in range(3 * os.cpu_count())]
    with pytest.raises(Interrupted, match="stopped by SIGTERM; its runs saved their state"):
        train_all(jobs, show)
    begun = [job for job in jobs if job.log_file.read_text()]
    assert 1 <= len(begun) <= os.cpu_count()
    assert all(job.log_file.read_text().endswith("saved\n") for job in begun)


@pytest.mark.slow
def test_a_signal_reaches_the_runs_of_a_study(tmp_path):
    """They save their states, and the study ends with 75."""
    flags = ("--option", "alpha", "--values", "3", "5", "--out", str(tmp_path / "study"), "--")
    flags += (*train_runs.QUICK[:-2], "--epochs", "2000", "--eval-every", "1000")
    study = subprocess.Popen(
        [sys.executable, "-m", "ltat_fast.sensitivity", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    runs = [tmp_path / "study" / f"alpha{value}-seed0" for value in (3, 5)]
    with train_runs.killed_at_the_end(study):
        train_runs.wait_until(lambda: any((run / "checkpoints/resume.safetensors").exists() for run in runs), study)
        study.send_signal(signal.SIGTERM)
        _, err = train_runs.finish(study, EXIT_INTERRUPTED)
    assert "stopped by SIGTERM; its runs saved their state; run the same command again" in err
    begun = [run for run in runs if (run / "config.json").exists()]
    assert begun
    assert all((run / "interrupted").exists() for run in begun)


def test_the_demo_refuses_runs_with_other_settings(command, tmp_path, capsys):
    (tmp_path / "ltat-seed0").mkdir()
    (tmp_path / "ltat-seed0" / "config.json").write_text('{"dataset": "digits-lt", "method": "ltat"}')
    assert train_runs.status_of("demo", "--out", str(tmp_path)) == 2
    said = capsys.readouterr()
    assert "ltat-seed0 was started with other settings: " in said.out
    assert "alpha (20.0 -> 5.0)" in said.out
    assert "holds runs with other settings than the demo: choose another --out" in said.err
