"""Memory, open files and threads of a training process: samples while it trains, and whether they stay flat."""

import csv
import dataclasses
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from scipy.stats import theilslopes

MIB = 2**20


@dataclass(frozen=True)
class Sample:
    cycle: int
    """which of the processes that continued one another, from 0"""
    seconds: float
    """since the first of them started"""
    anonymous_mib: float
    """memory without a file behind it, swapped out or not; pages of libraries depend on other processes"""
    rss_mib: float
    descriptors: int
    threads: int
    epochs: int
    """finished so far, over all processes"""
    folder_mib: float
    files: int
    """in the run folder, without the temporary files of a save"""


def watch(
    process: subprocess.Popen,
    run_dir: Path,
    every: float,
    cycle: int,
    start: float,
    enough: Callable[[list[Sample]], bool],
) -> list[Sample]:
    """Sample ``process`` until the samples are ``enough`` or the process ends.

    every: seconds between two samples. start: time.monotonic() at the start of the first process.
    """
    watched, samples = psutil.Process(process.pid), []
    while process.poll() is None and not enough(samples):
        time.sleep(every)
        try:
            with watched.oneshot():
                held = _anonymous_mib(process.pid), watched.memory_info().rss / MIB
                held += watched.num_fds(), watched.num_threads()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            break
        samples.append(Sample(cycle, time.monotonic() - start, *held, *_inside(run_dir)))
    return samples


def _anonymous_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))) / 1024


def _inside(run_dir: Path) -> tuple[int, float, int]:
    """Return the recorded epochs, the MiB and the number of files of a run folder that is being written to."""
    metrics, sizes = run_dir / "metrics.jsonl", []
    epochs = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    for path in run_dir.rglob("*"):
        try:
            if path.is_file() and path.suffix != ".partial":
                sizes.append(path.stat().st_size)
        except FileNotFoundError:  # renamed since it was listed
            continue
    return epochs, sum(sizes) / MIB, len(sizes)


def settled(samples: list[Sample], share: float = 0.2) -> list[Sample]:
    """Return the samples without the warm-up: imports, first epochs, and first use of each size in the allocator."""
    return samples[int(len(samples) * share) :]


def mib_per_hour(samples: list[Sample]) -> float:
    """Return the slope of the memory by Theil and Sen, a median over all pairs: 29 % of outliers do not move it."""
    return theilslopes([s.anonymous_mib for s in samples], [s.seconds / 3600 for s in samples]).slope


def problems(samples: list[Sample], most_mib_per_hour: float, most_kib_per_epoch: float) -> list[str]:
    """Name everything that grew in the ``samples`` of one process after its warm-up."""
    found = []
    if (slope := mib_per_hour(samples)) > most_mib_per_hour:
        found.append(f"memory grows by {slope:.2f} MiB per hour, more than {most_mib_per_hour:g}")
    quarter = len(samples) // 4
    for name in ("descriptors", "threads", "files"):
        values = [getattr(sample, name) for sample in samples]
        before, after = statistics.median(values[:quarter]), min(values[-quarter:])
        if after > before:  # a file that is open for a moment does not raise the minimum of a quarter
            found.append(f"{name}: never fewer than {after} in the last quarter, {before:g} in the first")
    first, last = samples[0], samples[-1]
    written = (last.folder_mib - first.folder_mib) * 1024 / max(last.epochs - first.epochs, 1)
    if written > most_kib_per_epoch:
        found.append(f"the run folder grows by {written:.2f} KiB per epoch, more than {most_kib_per_epoch:g}")
    return found


def write_csv(path: Path, samples: list[Sample]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Sample))
        writer.writerows(
            [f"{value:.3f}" if isinstance(value, float) else value for value in dataclasses.astuple(sample)]
            for sample in samples
        )


def read_csv(path: Path) -> list[Sample]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [Sample(**{field.name: field.type(row[field.name]) for field in dataclasses.fields(Sample)}) for row in rows]
