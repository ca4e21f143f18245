"""The clock of a whole run."""

import itertools
import time

from bench.train import Clock, recorded, timed_run
from ltat_fast.training import speed


def test_the_time_of_inner_phases_is_not_counted_in_outer_ones(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def work(seconds):
        nonlocal now
        now += seconds

    clock = Clock()
    inner = clock.timing(lambda: work(5), lambda: "inner")

    def outer_work():
        work(2)
        inner()
        work(1)
        inner()

    work(7)
    clock.timing(outer_work, lambda: "outer")()
    work(3)
    clock.lap()
    assert clock.seconds == {"outer": 3, "inner": 10, "other": 10}


def test_phases_of_a_run_add_up_to_it(tmp_path, monkeypatch):
    """Each look at the clock takes one second, so the sums are exact."""
    monkeypatch.setitem(speed.MATMUL_SIZE, "cpu", 64)
    ticks = itertools.count(1.0)
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: next(ticks))
    flags = "--epochs 1 --teacher-epochs 1 --max-steps 2 --attack-steps 1 --eval-attacks clean --limit-eval 20"
    began = time.perf_counter()
    seconds = timed_run([*flags.split(), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert (
        sum(seconds.values()) == time.perf_counter() - began - 2
    )  # one second before the first phase, one after the last
    expected = {"data", "teacher epochs", "student epochs", "checkpoints", "evaluation, clean", "evaluation, pgd20"}
    assert expected <= seconds.keys()
    assert all(value > 0 for value in seconds.values())
    known = recorded(tmp_path / "run")
    assert known.keys() == {"teacher epochs", "student epochs"}
    assert all(0 < known[name] <= seconds[name] for name in known)
