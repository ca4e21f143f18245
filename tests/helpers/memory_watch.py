"""What a running process holds, sampled while it trains, and whether it stayed flat."""

import csv
import dataclasses
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from scipy.stats import theilslopes

MIB = 2**20


@dataclass(frozen=True)
class Sample:
    cycle: int
    """which of the processes that took turns at the run, from 0"""
    seconds: float
    """since the first of them started"""
    anonymous_mib: float
    """memory with no file behind it, swapped out or not: pages of libraries come and go with other processes"""
    rss_mib: float
    descriptors: int
    threads: int
    epochs: int
    """finished by then, over all processes"""
    folder_mib: float
    files: int
    """in the run folder; those being written, which come and go, are left out"""


def watch(process: subprocess.Popen, run_dir: Path, seconds: float, every: float, cycle: int, start: float) -> list:
    """Samples of ``process`` for so many ``seconds``, or until it ends."""
    seen, until, samples = psutil.Process(process.pid), time.monotonic() + seconds, []
    while time.monotonic() < until and process.poll() is None:
        time.sleep(every)
        try:
            with seen.oneshot():
                held = _anonymous_mib(process.pid), seen.memory_info().rss / MIB, seen.num_fds(), seen.num_threads()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            break
        samples.append(Sample(cycle, time.monotonic() - start, *held, *_inside(run_dir)))
    return samples


def _anonymous_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))) / 1024


def _inside(run_dir: Path) -> tuple[int, float, int]:
    """Epochs recorded, MiB and files of a run folder, which is being written to."""
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
    """Without the warm-up: imports, the first epochs, and the allocator's first round of every size."""
    return samples[int(len(samples) * share) :]


def mib_per_hour(samples: list[Sample]) -> float:
    """Slope of the memory by Theil and Sen, the median over all pairs: no single jump, up to 29 % of them, moves it."""
    return theilslopes([s.anonymous_mib for s in samples], [s.seconds / 3600 for s in samples]).slope


def problems(samples: list[Sample], most_mib_per_hour: float, most_kib_per_epoch: float) -> list[str]:
    """What grew, of the ``samples`` of one process after its warm-up."""
    found = []
    if (slope := mib_per_hour(samples)) > most_mib_per_hour:
        found.append(f"memory grows by {slope:.2f} MiB an hour, more than {most_mib_per_hour:g}")
    quarter = len(samples) // 4
    for name in ("descriptors", "threads", "files"):
        values = [getattr(sample, name) for sample in samples]
        before, after = statistics.median(values[:quarter]), min(values[-quarter:])
        if after > before:  # what is open for a moment only does not raise the least of a quarter
            found.append(f"{name}: never fewer than {after} in the last quarter, {before:g} in the first")
    first, last = samples[0], samples[-1]
    written = (last.folder_mib - first.folder_mib) * 1024 / max(last.epochs - first.epochs, 1)
    if written > most_kib_per_epoch:
        found.append(f"the run folder grows by {written:.2f} KiB an epoch, more than {most_kib_per_epoch:g}")
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
