"""Commands that start several runs: unusable folders and disks are refused in one sentence before any run starts."""

from pathlib import Path

import pytest

from helpers import small_disks, train_runs
from ltat_fast.errors import UserError
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


def test_the_demo_refuses_runs_with_other_settings(command, tmp_path, capsys):
    (tmp_path / "ltat-seed0").mkdir()
    (tmp_path / "ltat-seed0" / "config.json").write_text('{"dataset": "digits-lt", "method": "ltat"}')
    assert train_runs.status_of("demo", "--out", str(tmp_path)) == 2
    said = capsys.readouterr()
    assert "ltat-seed0 was started with other settings: " in said.out
    assert "alpha (20.0 -> 5.0)" in said.out
    assert "holds runs with other settings than the demo: choose another --out" in said.err
