"""SIGKILL at any moment, and SIGTERM at any: what is left can be resumed, and ends as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from helpers import launching
from helpers.launching import WAIT, assert_same
from ltat_fast.runs import log

KILLS = int(os.environ.get("FAULT_KILLS", "25"))


@pytest.fixture
def chance() -> random.Random:
    """Its seed is in the output of a test that fails; FAULT_SEED repeats it."""
    seed = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(2**32)))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)


def saving(out: Path) -> bool:
    return any(next((out / part).glob(".*.partial"), None) for part in ("checkpoints", "teacher/checkpoints"))


def kill_at_random(out: Path, chance: random.Random, seconds: float, flags: tuple[str, ...], processes: int) -> bool:
    """Start or resume the run and kill it at a moment of ``seconds``, or in a save after it; False if it was faster.

    In the second half of the run only one of several processes is killed: the others have to end by themselves.
    """
    moment, in_save = chance.uniform(0, seconds), chance.random() < 0.4
    # Who waits for a process that died before they met gives up only after distributed.JOIN_TIMEOUT.
    victims = chance.choice([[0], [1]]) if processes > 1 and moment > seconds / 2 else range(processes)
    with launching.running(out, *flags, processes=processes) as started:
        launching.wait_until(lambda: False, started, moment)
        if in_save:
            launching.wait_until(lambda: saving(out), started, seconds)
        finished = any(process.poll() is not None for process in started)
        if not finished:
            print(f"killed {[*victims]} after {moment:.2f} s{', in a save' * (in_save and saving(out))}", flush=True)
            for victim in victims:
                started[victim].kill()
        said = [process.communicate(timeout=WAIT) for process in started]
        statuses = [process.returncode for process in started]
        assert not finished or not any(statuses), said
    return any(statuses)


def survive(tmp_path: Path, expected: Path, kills: int, chance: random.Random, *flags: str, processes: int = 1) -> None:
    """Kill runs ``kills`` times in all; each that comes to its end is as ``expected``."""
    started = time.monotonic()
    launching.finish(tmp_path / "timed", *flags, processes=processes)
    seconds = time.monotonic() - started
    assert_same(tmp_path / "timed", expected)
    number = 0
    while kills:
        if kill_at_random(tmp_path / f"run{number}", chance, seconds, flags, processes):
            kills -= 1
        else:
            assert_same(tmp_path / f"run{number}", expected)
            number += 1
    launching.finish(tmp_path / f"run{number}", *flags, processes=processes)
    assert_same(tmp_path / f"run{number}", expected)


def test_killed_at_a_few_moments(tmp_path, undisturbed, chance):
    survive(tmp_path, undisturbed, 5, chance)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "compiled"), [(1, "none"), (1, "step"), (2, "none"), (2, "step")])
def test_killed_at_many_moments(tmp_path, chance, processes, compiled):
    flags = ("--compile", compiled)
    launching.finish(tmp_path / "expected", *flags, processes=processes)
    survive(tmp_path, tmp_path / "expected", KILLS, chance, *flags, processes=processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_exit_75(tmp_path, undisturbed, chance, number):
    """Soon after one of the first four of five epochs: in a step, a save, an evaluation, between the stages."""
    out = tmp_path / "run"
    stage, epochs = chance.choice([("teacher", 1), ("teacher", 2), ("", 1), ("", 2)])
    with launching.running(out) as (process,):
        assert launching.wait_until(lambda: len(log.read_metrics(out / stage / "metrics.jsonl")) >= epochs, [process])
        launching.wait_until(lambda: False, [process], chance.uniform(0, 0.1))
        os.kill(process.pid, number)
        said, err = process.communicate(timeout=WAIT)
    assert process.returncode == 75, err
    assert f"stopped by {signal.Signals(number).name}" in said
    assert err == ""
    assert (out / "interrupted").exists()
    launching.finish(out)
    assert_same(out, undisturbed)


def test_a_signal_after_the_end_changes_nothing(tmp_path, monkeypatch, undisturbed):
    """The run is done and its process is shutting down, which takes a while."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGUSR1))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    launching.finish(tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


def test_a_start_killed_while_it_writes_its_config_can_be_started_again(tmp_path, undisturbed):
    """A hidden half-written file is no run, neither to resume nor to be careful of."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.123.partial").write_text('{"dataset": "dig')
    launching.finish(out)
    assert_same(out, undisturbed)


def test_the_record_has_each_epoch_once(undisturbed):
    assert [r["epoch"] for r in log.read_metrics(undisturbed / "metrics.jsonl")] == [1, 2, 3]
