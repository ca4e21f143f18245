"""After an hour of training, saving, evaluating and resuming a run holds as much memory and as many files as at first.

``python -m pytest tests/soak -m slow``: LTAT_SOAK_MINUTES sets the length, LTAT_SOAK_CSV names a file for the samples.
"""

import dataclasses
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
from helpers.train_runs import SAFETY_NET, killed_at_the_end

MINUTES = float(os.environ.get("LTAT_SOAK_MINUTES", "60"))
EVERY = 3.0  # seconds between samples
INTERRUPTED = 75
# Shares of the time: one long process, then four that each resume the run of the one before.
CYCLES = (2 / 3, 1 / 12, 1 / 12, 1 / 12, 1 / 12)
# Bytes in use, which are constant without a leak. An epoch has seven steps, so 150 bytes kept per step are found.
MOST_KIB_IN_USE_PER_EPOCH = 1.0
# Memory of the process, including free space that the allocator keeps: 82 over twenty minutes without a leak.
MOST_MIB_PER_HOUR = 200.0
MOST_KIB_PER_EPOCH = 4.0  # one record in metrics.jsonl and one in TensorBoard
MOST_MIB_BETWEEN_CYCLES = 20.0  # two equal processes differed by 7


def start(module: list[str], *flags: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *module, *flags], env=environment, stdout=subprocess.DEVNULL)


def stop(process: subprocess.Popen) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=SAFETY_NET)


@pytest.mark.slow
def test_an_hour_of_training_stays_flat(tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = ("--out", str(run), "--epochs", "1000000", "--teacher-epochs", "2", "--lr-schedule", "step")
    flags += ("--eval-every", "1", "--limit-eval", "200", "--save-minutes", "0.02")
    samples, begin, counts = [], time.monotonic(), tmp_path / "counts"
    monkeypatch.setenv("LTAT_SOAK_COUNTS", str(counts))
    for cycle, share in enumerate(CYCLES):
        process = start([str(Path(__file__).with_name("counted_train.py"))], *flags, *(["--resume"] if cycle else []))
        until = time.monotonic() + share * MINUTES * 60
        with killed_at_the_end(process):
            samples += watch(process, run, EVERY, cycle, begin, lambda _, until=until: time.monotonic() > until)
            write_csv(Path(os.environ.get("LTAT_SOAK_CSV") or tmp_path / "soak.csv"), samples)
            assert stop(process) == INTERRUPTED
        assert list(run.rglob("*.partial")) == []
    cycles = [settled([s for s in samples if s.cycle == cycle]) for cycle in range(len(CYCLES))]

    lines = [line.split() for line in counts.read_text().splitlines()]
    own = [(int(epoch), float(in_use), int(objects)) for pid, epoch, in_use, objects in lines if pid == lines[0][0]]
    epoch, in_use, objects = zip(*own[len(own) // 5 :], strict=True)
    slope = theilslopes(in_use, epoch).slope
    print(
        f"{samples[-1].epochs:,} epochs; in use {in_use[0] / 1024:.2f} to {in_use[-1] / 1024:.2f} MiB, {slope:+.4f} KiB"
    )
    print(f"per epoch; {objects[0]:,} to {objects[-1]:,} objects; held {mib_per_hour(cycles[0]):+.3f} MiB per hour")
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
    """The method keeps 4 MiB and an open file per epoch. Epochs stand for time here, however long they take."""
    run = tmp_path / "run"
    flags = ("--method", "leaky", "--out", str(run), "--epochs", "1000000", "--eval-every", "1000000")

    def by_epoch(samples):
        return list({sample.epochs: sample for sample in samples if sample.epochs > 3}.values())

    process = start([str(Path(__file__).with_name("leaky_train.py"))], *flags)
    with killed_at_the_end(process):
        samples = watch(process, run, 0.05, 0, time.monotonic(), lambda samples: len(by_epoch(samples)) == 12)
        assert process.poll() is None
    samples = [dataclasses.replace(sample, seconds=sample.epochs) for sample in by_epoch(samples)]
    assert [problem.split()[0] for problem in problems(samples, 200.0, 100.0)] == ["memory", "descriptors:"]


def made_samples(memory, descriptors=lambda i: 12, files=lambda i: 9):
    """Return forty minutes of samples with the noise of an allocator. The values are functions of the sample number."""
    noise = random.Random(0)
    return [
        Sample(0, 3.0 * i, memory(i) + noise.gauss(0, 0.3), 500.0, descriptors(i), 5, i, 1 + i / 1024, files(i))
        for i in range(800)
    ]


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        (made_samples(lambda i: 300), []),
        (made_samples(lambda i: 300 + 2 * (i > 100)), []),  # a step of the allocator
        (made_samples(lambda i: 300 - i / 200), []),
        (made_samples(lambda i: 300, lambda i: 12 + 2 * (i % 3 == 0)), []),  # a file that is open for a moment
        (made_samples(lambda i: 300 + i * 3 / 1200), ["memory"]),  # 3 MiB per hour
        (made_samples(lambda i: 300, lambda i: 12 + i // 500), ["descriptors:"]),  # one more, once
        (made_samples(lambda i: 300, files=lambda i: 9 + i // 100), ["files:"]),
    ],
)
def test_growth_is_told_from_noise(samples, found):
    assert [problem.split()[0] for problem in problems(samples, 2.0, MOST_KIB_PER_EPOCH)] == found


def test_a_growing_run_folder_is_named():
    assert "the run folder grows by 1.00 KiB per epoch" in problems(made_samples(lambda i: 300), 2.0, 0.5)[0]
