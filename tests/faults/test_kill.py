"""A run that is killed or signalled at any moment resumes, and ends with the result of an undisturbed run."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import launching, train_runs
from helpers.train_runs import SAFETY_NET, assert_same
from ltat_fast.runs.records import read_metrics
from ltat_fast.signals import SIGNALS

KILLS = int(os.environ.get("FAULT_KILLS", "25"))


@pytest.fixture
def chance() -> random.Random:
    """A random generator. A failed test prints its seed; FAULT_SEED repeats it."""
    seed = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(2**32)))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)


def kill(out: Path, operation: str) -> None:
    """Start or resume the run, which is killed before ``operation``, for example "2 write metrics.jsonl"."""
    print(f"SIGKILL {operation}")
    with launching.running(out, LTAT_SIGNAL=f"SIGKILL {operation}") as (process,):
        train_runs.finish(process, status=-signal.SIGKILL)


def test_a_run_killed_in_each_phase_resumes_to_the_same_result(tmp_path, undisturbed):
    """The phases are the teacher, the student and the final evaluation; each kill comes between two results."""
    out = tmp_path / "run"
    for operation in ("2 write teacher/metrics.jsonl", "2 write metrics.jsonl", "2 rename eval.json"):
        kill(out, operation)
    assert launching.train(out) == 0
    assert_same(out, undisturbed)


def test_a_run_killed_at_random_operations_resumes_to_the_same_result(tmp_path, undisturbed, operations, chance):
    out = tmp_path / "run"
    for _ in range(2):  # each process takes half of the operations at most, so that none comes to the end
        kill(out, str(chance.randint(1, len(operations) // 2)))
    assert launching.train(out) == 0
    assert_same(out, undisturbed)


def wait(seconds: float, processes: list[subprocess.Popen], condition: Callable[[], bool] = lambda: False) -> None:
    """Wait until ``condition()``, until ``seconds`` have passed or until one of ``processes`` has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.0005)


def saving(out: Path) -> bool:
    return any(next((out / part).glob(".*.partial"), None) for part in ("checkpoints", "teacher/checkpoints"))


def kill_at_random(out: Path, chance: random.Random, seconds: float, flags: tuple[str, ...], processes: int) -> bool:
    """Start or resume the run and kill it at a random moment. Return False if the run finished before.

    In the second half of the run only one of two processes is killed: the other has to end by itself.
    seconds: length of the run.
    """
    moment, in_save = chance.uniform(0, seconds), chance.random() < 0.4
    # In the first half the other process could wait minutes for a peer that died before it joined.
    victims = chance.choice([[0], [1]]) if processes > 1 and moment > seconds / 2 else range(processes)
    with launching.running(out, *flags, processes=processes) as started:
        wait(moment, started)
        if in_save:
            wait(seconds, started, lambda: saving(out))
        finished = any(process.poll() is not None for process in started)
        if not finished:
            print(f"killed {[*victims]} after {moment:.2f} s{', in a save' * (in_save and saving(out))}", flush=True)
            for victim in victims:
                started[victim].kill()
        said = [process.communicate(timeout=SAFETY_NET) for process in started]
        statuses = [process.returncode for process in started]
        assert not finished or not any(statuses), said
    return any(statuses)


@pytest.mark.slow  # the moments depend on the clock, the result must not
@pytest.mark.parametrize(("processes", "compiled"), [(1, "none"), (1, "step"), (2, "none"), (2, "step")])
def test_runs_killed_at_many_moments_resume_to_the_same_result(tmp_path, chance, processes, compiled):
    flags = ("--compile", compiled)
    started = time.monotonic()
    launching.finish(tmp_path / "expected", *flags, processes=processes)
    seconds = time.monotonic() - started
    kills = number = 0
    while kills < KILLS:
        if kill_at_random(tmp_path / f"run{number}", chance, seconds, flags, processes):
            kills += 1
        else:
            assert_same(tmp_path / f"run{number}", tmp_path / "expected")
            number += 1
    launching.finish(tmp_path / f"run{number}", *flags, processes=processes)
    assert_same(tmp_path / f"run{number}", tmp_path / "expected")


def test_each_signal_saves_the_run_and_exits_with_75(tmp_path, undisturbed, operations, chance):
    """The signals come at random operations after the run folder is claimed, in three processes that resume."""
    out, first = tmp_path / "run", operations.index("rename config.json") + 2
    for number in SIGNALS:
        signal_at = f"{number.name} {chance.randint(first, len(operations) // 4)}"
        print(signal_at)
        with launching.running(out, LTAT_SIGNAL=signal_at) as (process,):
            said, err = train_runs.finish(process, status=75)
        assert f"stopped by {number.name}" in said
        assert err == ""
        assert (out / "interrupted").exists()
    assert launching.train(out) == 0
    assert not (out / "interrupted").exists()
    assert_same(out, undisturbed)


def test_a_signal_during_the_shutdown_of_a_finished_run_changes_nothing(tmp_path, monkeypatch, undisturbed_copy):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, pathlib, signal\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGUSR1))\n"
        f"atexit.register(pathlib.Path({str(tmp_path / 'shutdown')!r}).touch)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    launching.finish(undisturbed_copy)
    assert (tmp_path / "shutdown").exists()


def test_a_start_killed_while_it_writes_its_config_can_be_started_again(tmp_path, undisturbed):
    """A hidden half-written file is not a run."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.123.partial").write_text('{"dataset": "dig')
    assert launching.train(out) == 0
    assert_same(out, undisturbed)


def test_the_metrics_have_each_epoch_once(undisturbed):
    assert [r["epoch"] for r in read_metrics(undisturbed / "metrics.jsonl")] == [1, 2, 3]
