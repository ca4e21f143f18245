"""An hour of training, saving, evaluating and resuming holds no more memory, files or threads than its first minutes.

``python -m pytest tests/soak -m slow``; LTAT_SOAK_MINUTES sets the length, LTAT_SOAK_CSV keeps the samples.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy.stats import theilslopes

from helpers.memory_watch import Sample, mib_per_hour, problems, settled, watch, write_csv

MINUTES = float(os.environ.get("LTAT_SOAK_MINUTES", "60"))
EVERY = 3.0  # seconds between samples
INTERRUPTED = 75
# The first process has two thirds of the time; then four more each resume the run that the one before them left.
CYCLES = (2 / 3, 1 / 12, 1 / 12, 1 / 12, 1 / 12)
# Of bytes in use, which do not change at all otherwise: an epoch has seven steps, so 150 bytes kept by each show.
MOST_KIB_IN_USE_PER_EPOCH = 1.0
# Of what the process holds, with the free space that the allocator keeps: 82 over twenty minutes without a leak.
MOST_MIB_PER_HOUR = 200.0
MOST_KIB_PER_EPOCH = 4.0  # one record in metrics.jsonl and one in TensorBoard
MOST_MIB_BETWEEN_CYCLES = 20.0  # two processes that do the same differed by 7


def start(module: list[str], *flags: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *module, *flags], env=environment, stdout=subprocess.DEVNULL)


def stop(process: subprocess.Popen) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=60)


@pytest.mark.slow
def test_an_hour_of_training_stays_flat(tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = ("--out", str(run), "--epochs", "1000000", "--teacher-epochs", "2", "--lr-schedule", "step")
    flags += ("--eval-every", "1", "--limit-eval", "200", "--save-minutes", "0.02")
    samples, begin, counts = [], time.monotonic(), tmp_path / "counts"
    monkeypatch.setenv("LTAT_SOAK_COUNTS", str(counts))
    for cycle, share in enumerate(CYCLES):
        process = start([str(Path(__file__).with_name("counted_train.py"))], *flags, *(["--resume"] if cycle else []))
        try:
            samples += watch(process, run, share * MINUTES * 60, EVERY, cycle, begin)
            write_csv(Path(os.environ.get("LTAT_SOAK_CSV") or tmp_path / "soak.csv"), samples)
            assert stop(process) == INTERRUPTED
        finally:
            process.kill()
        assert list(run.rglob("*.partial")) == []
    cycles = [settled([s for s in samples if s.cycle == cycle]) for cycle in range(len(CYCLES))]

    lines = [line.split() for line in counts.read_text().splitlines()]
    own = [(int(epoch), float(in_use), int(objects)) for pid, epoch, in_use, objects in lines if pid == lines[0][0]]
    epoch, in_use, objects = zip(*own[len(own) // 5 :], strict=True)
    slope = theilslopes(in_use, epoch).slope
    print(
        f"{samples[-1].epochs:,} epochs; in use {in_use[0] / 1024:.2f} to {in_use[-1] / 1024:.2f} MiB, {slope:+.4f} KiB"
    )
    print(f"an epoch; {objects[0]:,} to {objects[-1]:,} objects; held {mib_per_hour(cycles[0]):+.3f} MiB an hour")
    assert slope < MOST_KIB_IN_USE_PER_EPOCH
    assert theilslopes(objects, epoch).slope < 1
    assert problems(cycles[0], MOST_MIB_PER_HOUR, MOST_KIB_PER_EPOCH) == []
    levels = [statistics.median(s.anonymous_mib for s in cycle) for cycle in cycles[1:]]
    assert levels[-1] - levels[0] < MOST_MIB_BETWEEN_CYCLES, levels
    for name in ("descriptors", "threads"):
        assert len({statistics.median(getattr(s, name) for s in cycle) for cycle in cycles[1:]}) == 1, name
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))


def test_a_leak_in_training_is_found(tmp_path):
    """A method that keeps 4 MiB and an open file an epoch, watched for five seconds."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    flags = ("--method", "leaky", "--out", str(tmp_path / "run"), "--epochs", "100000", "--limit-eval", "20")
    process = start([str(Path(__file__).with_name("leaky_train.py"))], *flags)
    try:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        samples = watch(process, tmp_path / "run", 5, 0.2, 0, time.monotonic())
    finally:
        process.kill()
        process.wait()
    assert [problem.split()[0] for problem in problems(samples, 200.0, 100.0)] == ["memory", "descriptors:"]


def hour(memory, descriptors=lambda i: 12, files=lambda i: 9):
    """Forty minutes of made samples with an allocator's noise."""
    noise = random.Random(0)
    return [
        Sample(0, 3.0 * i, memory(i) + noise.gauss(0, 0.3), 500.0, descriptors(i), 5, i, 1 + i / 1024, files(i))
        for i in range(800)
    ]


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        (hour(lambda i: 300), []),
        (hour(lambda i: 300 + 2 * (i > 100)), []),  # a step of the allocator
        (hour(lambda i: 300 - i / 200), []),
        (hour(lambda i: 300, lambda i: 12 + 2 * (i % 3 == 0)), []),  # a file that is open for a moment
        (hour(lambda i: 300 + i * 3 / 1200), ["memory"]),  # 3 MiB an hour
        (hour(lambda i: 300, lambda i: 12 + i // 500), ["descriptors:"]),  # one more, once
        (hour(lambda i: 300, files=lambda i: 9 + i // 100), ["files:"]),
    ],
)
def test_what_counts_as_growth(samples, found):
    assert [problem.split()[0] for problem in problems(samples, 2.0, MOST_KIB_PER_EPOCH)] == found


def test_a_growing_folder_is_named():
    assert "the run folder grows by 1.00 KiB an epoch" in problems(hour(lambda i: 300), 2.0, 0.5)[0]
