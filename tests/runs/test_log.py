"""What the terminal shows: text that is not markup, bars that move by time, and lines where there is no terminal."""

import io
import json
import os
import re

import pytest
from rich.console import Console

from ltat_fast import files
from ltat_fast.files import write_json
from ltat_fast.runs import log


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


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: ``clock(seconds)``."""
    now = [1000.0]
    monkeypatch.setattr(log, "clock", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Console:
    """A terminal 80 columns wide. What it shows is in ``terminal.file``."""
    console = Console(file=Terminal(), width=80, force_terminal=True, force_interactive=True, soft_wrap=True)
    monkeypatch.setattr(log, "console", console)
    return console


def test_lines_every_thirty_seconds_where_there_is_no_terminal(clock, capsys):
    with log.progress("student", 15_600, "steps", done=780) as run:
        clock(20)  # before the first step: part of the pace of the stage only
        with log.progress("epoch 3/40", 390, "steps", images_per_unit=128) as epoch:
            said = []
            for _ in range(120):
                clock(0.5)
                epoch.advance(1, loss=2.0123)
                run.advance(1)
                said.append(capsys.readouterr().out)
    lines = [line for line in said if line]
    assert [said.index(line) for line in lines] == [19, 79], "30 and 60 seconds after the beginning"
    assert lines[1] == (
        "student epoch 3/40: 80 of 390 steps, loss 2.012, 256 images/s, 0:02:35 left; student 3:05:02 left\n"
    )


def test_the_time_left_passes_without_news(clock):
    with log.progress("pgd20", 600) as bar:
        assert str(bar) == "0 of 600 images"
        clock(10)
        bar.advance(256, robust="47.1 %")
        assert str(bar) == "256 of 600 images, robust 47.1 %, 0:00:13 left"
        clock(5)
        assert bar.time_left == "0:00:08 left"
        clock(60)
        assert bar.time_left == "0:00:00 left"


def test_a_bar_that_goes_back_measures_anew(clock):
    with log.progress("student", 100, "steps") as bar:
        clock(100)
        bar.advance(50)
        bar.go_to(20)
        assert (bar.done, bar.pace, bar.time_left) == (20, None, "")
        clock(2)
        bar.advance(1)
        assert bar.time_left == "0:02:38 left"


def test_a_loop_that_does_more_than_announced_ends_at_the_total(clock):
    with log.progress("autoattack", 100) as bar:
        clock(1)
        bar.advance(256)
        assert str(bar) == "100 of 100 images, 0:00:00 left"


def drawn(console: Console) -> list[str]:
    """The lines that the open bars have in the terminal now."""
    with console.capture() as captured:
        console.print(log._display.table())
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in captured.get().splitlines()]


def test_bars_fit_a_terminal(clock, terminal):
    with (
        log.progress("student", 15_600, "steps", done=1170) as run,
        log.progress("epoch 4/40", 390, "steps", images_per_unit=128) as epoch,
    ):
        clock(60)
        run.advance(195)
        epoch.advance(195, loss=2.0123)
        assert drawn(terminal) == [
            "student    ━╺━━━━━━━━━━ 1,365 of 15,600 steps, 1:13:00 left",
            "epoch 4/40 ━━━━━━╺━━━━━ 195 of 390 steps, loss 2.012, 416 images/s, 0:01:00 left",
        ]


def test_numbers_stay_where_a_bar_has_no_room(clock, terminal):
    terminal.width = 79
    with (
        log.progress("student", 900_900, "steps") as run,
        log.progress("epoch 90/90", 10_010, "steps", images_per_unit=1024) as epoch,
    ):
        clock(600)
        run.advance(5_004)
        epoch.advance(5_004, loss=6.9071)
        assert drawn(terminal) == [
            "student     5,004 of 900,900 steps, 29:50:22 left",
            "epoch 90/90 5,004 of 10,010 steps, loss 6.907, 8,540 images/s, 0:10:00 left",
        ]


def test_a_thread_draws_the_bars_of_a_terminal(clock, terminal):
    with log.progress("pgd20", 600) as bar, log.progress("inner", 3):
        assert log._display.live.auto_refresh
        bar.advance(256)
        log.say("a message")
        log._display.live.refresh()
        clock(100)
        bar.advance(1)
    assert log._display.live is None
    written = terminal.file.getvalue()
    assert "256 of 600 images" in written
    assert "pgd20 inner" not in written, "no lines beside bars"
    assert written.index("a message\n") > 0


def test_a_file_is_no_terminal_even_with_colours(clock, monkeypatch):
    """With FORCE_COLOR, which many CI systems set, rich takes a file for a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, highlight=False)
    monkeypatch.setattr(log, "console", console)
    with log.progress("pgd20", 600) as bar:
        clock(30)
        bar.advance(300)
    assert console.file.getvalue() == "pgd20: 300 of 600 images, 0:00:30 left\n"


def test_a_quiet_process_shows_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(log.console, "quiet", True)
    with log.progress("pgd20", 600) as bar:
        clock(60)
        bar.advance(300)
    assert (bar.done, capsys.readouterr().out) == (300, "")
