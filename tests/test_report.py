"""The report from the command line."""

import json
import os
import shutil

import pytest
import torch

from helpers import small_disks, train_runs
from ltat_fast.reporting import page


def test_all_files_at_once(digits_run, tmp_path, capsys):
    files = {kind: tmp_path / "new" / f"report.{kind}" for kind in ("html", "markdown", "csv")}
    flags = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    assert train_runs.status_of("report", str(digits_run), *flags) == 0
    printed = capsys.readouterr().out
    best = json.loads((digits_run / "eval.json").read_text())["best"]
    for value in (f"{best['clean']['all']:.2f}", f"{best['pgd20']['tail']:.2f}"):
        assert value in printed
        assert value in files["html"].read_text(encoding="utf-8")
        assert value in files["markdown"].read_text()
    assert repr(best["pgd20"]["all"]) in files["csv"].read_text()
    assert files["html"].read_text(encoding="utf-8").startswith("<!doctype html>")
    assert files["html"].stat().st_size < 500_000


def test_without_files_only_the_table_is_made(digits_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "render", lambda *_: pytest.fail("nobody asked for a page"))
    assert train_runs.status_of("report", str(digits_run)) == 0
    assert "T-PGD" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_runs_do_not_change(digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert train_runs.status_of("report", str(run), "--html", str(tmp_path / "page.html")) == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda run, tmp: [], "name at least one run folder"),
        (lambda run, tmp: [str(tmp)], "has no results"),
        (
            lambda run, tmp: [str(run), str(shutil.copytree(run, tmp / "copy"))],
            "are the same experiment",
        ),
        (lambda run, tmp: [str(run), "--csv", str(run / "config.json" / "x.csv")], "cannot write"),
    ],
    ids=["none", "no run", "copy", "not writable"],
)
def test_refusals_are_one_sentence(digits_run, tmp_path, capsys, make, said):
    assert train_runs.status_of("report", *make(digits_run, tmp_path)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_full_disk_keeps_the_old_report(digits_run, tmp_path, capsys):
    with small_disks.file_system(tmp_path / "disk", "64k") as disk:
        for name in ("new.html", "old.html"):
            page_file = disk / name
            if name == "old.html":
                page_file.write_text("the old one")
            assert train_runs.status_of("report", str(digits_run), "--html", str(page_file)) == 2
            assert f"cannot write {page_file}: No space left on device" in capsys.readouterr().err
        assert [file.name for file in disk.iterdir()] == ["old.html"]
        assert page_file.read_text() == "the old one"


def test_a_pipe_is_written_to_and_stays_a_pipe(digits_run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("pipe", "link"):
        assert train_runs.status_of("report", str(digits_run), "--csv", str(tmp_path / name)) == 0
        assert os.read(reader, 1 << 16).startswith(b"run,")
    os.close(reader)


@pytest.mark.parametrize("broken", [{"images": "5"}, {"all": "x"}, {"tail": {}}, {"per_class": 3}])
def test_a_damaged_result_is_one_sentence(digits_run, tmp_path, capsys, broken):
    run = shutil.copytree(digits_run, tmp_path / "run")
    results = json.loads((run / "eval.json").read_text())
    results["last"]["pgd20"] |= broken
    (run / "eval.json").write_text(json.dumps(results))
    flags = [flag for kind in ("html", "markdown", "csv") for flag in (f"--{kind}", str(tmp_path / kind))]
    assert train_runs.status_of("report", str(run), *flags) == 2
    error = capsys.readouterr().err
    assert "eval.json is damaged: last, pgd20" in error
    assert error.count("\n") == 1


def test_a_missing_gpu_is_refused(digits_run, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags = ("--html", str(tmp_path / "page.html"), "--device", "cuda")
    assert train_runs.status_of("report", str(digits_run), *flags) == 2
    assert "no CUDA device" in capsys.readouterr().err
