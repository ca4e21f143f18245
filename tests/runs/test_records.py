"""The records of a stage: which survive a crash or damage, which a resumed run drops, and what is said about it."""

import json

import pytest

from ltat_fast.runs.records import StageLog, read_metrics, read_steps


def record(epoch: int) -> dict:
    return {"epoch": epoch, "loss": 1 / epoch}


def write_epochs(folder, done: int, epochs, steps=()):
    stage_log = StageLog(folder, done, 10 * done)
    for step in steps:
        stage_log.step({"epoch": 1 + step // 10, "step": step, "loss": 1 / step})
    for epoch in epochs:
        stage_log.epoch(record(epoch))
    stage_log.close()


def epochs_in(folder) -> list[int]:
    return [each["epoch"] for each in read_metrics(folder / "metrics.jsonl")]


def steps_in(folder) -> list[int]:
    return [each["step"] for each in read_steps(folder / "steps.jsonl")]


def test_records_append(tmp_path):
    write_epochs(tmp_path / "run", 0, [1, 2])
    write_epochs(tmp_path / "run", 2, [3])
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [record(e) for e in (1, 2, 3)]
    assert list((tmp_path / "run" / "tb").iterdir())


def test_epochs_that_were_recorded_but_not_saved_are_dropped(tmp_path):
    write_epochs(tmp_path, 0, [1, 2, 3], steps=[5, 10, 15, 20, 25])
    write_epochs(tmp_path, 1, [2], steps=[15])
    assert (epochs_in(tmp_path), steps_in(tmp_path)) == ([1, 2], [5, 10, 15])
    write_epochs(tmp_path, 0, [])
    assert (epochs_in(tmp_path), steps_in(tmp_path)) == ([], [])


def test_a_stage_that_goes_back_drops_what_came_after(tmp_path):
    stage_log = StageLog(tmp_path, 0)
    for step in (5, 10, 15):
        stage_log.step({"step": step})
    stage_log.epoch(record(1))
    stage_log.go_back(0, 10)
    stage_log.step({"step": 15})
    stage_log.epoch(record(1))
    stage_log.close()
    assert (epochs_in(tmp_path), steps_in(tmp_path)) == ([1], [5, 10, 15])


def test_tensorboard_has_losses_and_memory_by_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_epochs(tmp_path, 0, [1, 2], steps=[5, 10, 15])
    write_epochs(tmp_path, 1, [2], steps=[15, 20])
    for folder, expected in (("tb", [1, 2]), ("tb/steps", [5, 10, 15, 20])):
        shown = EventAccumulator(str(tmp_path / folder)).Reload()
        assert [(event.step, event.value) for event in shown.Scalars("loss")] == [
            (position, pytest.approx(1 / position)) for position in expected
        ]


def test_a_line_that_was_cut_off_is_skipped(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    write_epochs(tmp_path, 0, [1, 2])
    whole = path.read_text()
    for cut in range(len(json.dumps(record(1))) + 2, len(whole) - 1):
        path.write_text(whole[:cut])
        assert read_metrics(path) == [record(1)]
        assert capsys.readouterr().out == f"WARNING: {path}: damaged and skipped: line 2\n"
    write_epochs(tmp_path, 1, [2])
    assert path.read_text() == whole
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == whole[: len(whole) - 2]


DAMAGE = {
    "control character": b'{"epoch": 2, "note": "\x1e"}',
    "line ends of text": '{"epoch": 2, "note": "\x0b\x85\u2028'.encode(),
    "not text": b'{"epoch": 2, "loss": \xff}',
    "not an object": b"1",
    "no epoch": b'{"loss": 0.5}',
    "no number": b'{"epoch": "2"}',
    "epoch 0": b'{"epoch": 0}',
    "impossible epoch": b'{"epoch": 1' + b"0" * 400 + b"}",
    "too many digits": b'{"epoch": 2, "loss": ' + b"9" * 5000 + b"}",
    "deep nesting": b'{"epoch": 2, "loss": ' + b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("damaged", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_record_is_skipped_named_and_kept(tmp_path, capsys, damaged):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(record(epoch)).encode() for epoch in (1, 3, 4)]
    content = b"".join(line + b"\n" for line in [good[0], damaged, *good[1:]])
    path.write_bytes(content)
    assert epochs_in(tmp_path) == [1, 3, 4]
    assert capsys.readouterr().out == f"WARNING: {path}: damaged and skipped: line 2\n"
    assert path.read_bytes() == content, "reading changes nothing"
    write_epochs(tmp_path, 3, [4])
    said = f"WARNING: {path}: damaged and skipped: line 2; the damaged file is kept as metrics.jsonl.damaged\n"
    assert capsys.readouterr().out == said
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    assert epochs_in(tmp_path) == [1, 3, 4]
    assert capsys.readouterr().out == ""


def test_many_damaged_lines_are_counted(tmp_path, capsys):
    (tmp_path / "steps.jsonl").write_text("1\n" * 12 + '{"step": 5}\n')
    assert steps_in(tmp_path) == [5]
    assert capsys.readouterr().out.endswith("skipped: lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more\n")


def test_a_log_that_was_removed_begins_again(tmp_path):
    stage_log = StageLog(tmp_path, 0)
    stage_log.epoch(record(1))
    (tmp_path / "metrics.jsonl").unlink()
    stage_log.sync()
    stage_log.epoch(record(2))
    stage_log.close()
    assert epochs_in(tmp_path) == [2]


def test_a_log_that_is_no_file_is_moved_away(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    assert epochs_in(tmp_path) == []
    assert "it cannot be read (Is a directory)" in capsys.readouterr().out
    write_epochs(tmp_path, 1, [2])
    assert epochs_in(tmp_path) == [2]
    assert (tmp_path / "metrics.jsonl.damaged").is_dir()
