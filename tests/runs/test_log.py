"""The record of a stage: which records survive a crash, and which a resumed run drops."""

import json
import os

import pytest

from ltat_fast import files
from ltat_fast.files import write_json
from ltat_fast.runs import log
from ltat_fast.runs.records import StageLog, read_metrics


def record(epoch: int) -> dict:
    return {"epoch": epoch, "loss": 1 / epoch}


def write_epochs(folder, done: int, epochs):
    stage_log = StageLog(folder, done)
    for epoch in epochs:
        stage_log.epoch(record(epoch))
    stage_log.close()


def test_records_append(tmp_path):
    write_epochs(tmp_path / "run", 0, [1, 2])
    write_epochs(tmp_path / "run", 2, [3])
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [record(e) for e in (1, 2, 3)]
    assert list((tmp_path / "run" / "tb").iterdir())


def test_epochs_that_were_recorded_but_not_saved_are_dropped(tmp_path):
    write_epochs(tmp_path, 0, [1, 2, 3])
    write_epochs(tmp_path, 1, [2])
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(e) for e in (1, 2)]
    write_epochs(tmp_path, 0, [])
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_epochs(tmp_path, 0, [1, 2])
    whole = path.read_text()
    for cut in range(len(json.dumps(record(1))) + 2, len(whole) - 1):
        path.write_text(whole[:cut])
        assert read_metrics(path) == [record(1)]
    write_epochs(tmp_path, 1, [2])
    assert path.read_text() == whole


def test_write_json_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "eval.json"
    write_json(path, {"a": 1})

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}


def test_text_is_not_markup(capsys, monkeypatch):
    monkeypatch.setattr(log.console, "_file", open(os.devnull, "w"))  # noqa: SIM115
    with log.console.capture() as captured:
        log.say("runs/[bold]a[/bold]/:smile: 50 %")
    assert captured.get() == "runs/[bold]a[/bold]/:smile: 50 %\n"
