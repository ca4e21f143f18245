"""What all benchmarks share: timing, copy bandwidth, peak memory, launch counts, provenance, CSV.

How the times are measured:

- Variants are timed in interleaved rounds, so that a drift of the clock or of a shared machine affects all of them.
- CPU: a sample is a batch of calls of about 2 ms, in wall-clock time, which is meaningful only on an idle machine. With
  one thread (OMP_NUM_THREADS=1) it is processor time, which hardly depends on other load.
- CUDA: a sample is one call between two events. A write of 256 MB before it evicts L2 and lets the host run ahead. The
  sample is device time, with gaps between launches if the host is too slow.
- Reported are the median, the 20th and the 80th percentile.
"""

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from ltat_fast.models import ARCHS

L2_EVICTION_BYTES = 256 << 20  # five times the L2 of an H100
CPU_SAMPLE_SECONDS = 2e-3
BUDGET_SECONDS = 30


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")


def add_problem_flags(parser: argparse.ArgumentParser, arch_choices: Sequence[str] = ()) -> None:
    """Add the flags for the network and the batch that a benchmark of the training step uses."""
    parser.add_argument("--arch", choices=[*sorted(ARCHS), *arch_choices], default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), low, high)


def time_interleaved(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int = 30
) -> dict[str, Timing]:
    """Time every call once per round; each round starts with another call. After 30 s stop, but not before 5 rounds."""
    sample = _cuda_sampler(device) if device.type == "cuda" else _cpu_sampler(calls)
    names = list(calls)
    samples = {name: [] for name in names}
    begin = time.perf_counter()
    for i in range(rounds):
        if i >= 5 and time.perf_counter() - begin > BUDGET_SECONDS:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(sample(name, calls[name]))
    return {name: Timing.of(values) for name, values in samples.items()}


def _cpu_sampler(calls):
    clock = time.process_time if cpu_clock() == "process" else time.perf_counter
    repeats = {}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        repeats[name] = max(1, round(CPU_SAMPLE_SECONDS / (clock() - begin)))

    def sample(name, call):
        begin = clock()
        for _ in range(repeats[name]):
            call()
        return 1e3 * (clock() - begin) / repeats[name]

    return sample


def cpu_clock() -> str:
    """Return the clock of CPU samples: "process" with one thread, else "wall"."""
    return "process" if torch.get_num_threads() == 1 else "wall"


def _cuda_sampler(device):
    evict = torch.empty(L2_EVICTION_BYTES, dtype=torch.int8, device=device)

    def sample(name, call):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        evict.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return sample


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Return a function that replays the call as a CUDA graph, as in a captured training step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call()

    def replay(keep_alive=call) -> None:  # `call` owns the memory that the graph reads
        graph.replay()

    return replay


def copy_bandwidth(device: torch.device, rounds: int = 30) -> float:
    """Return the GB/s (read plus write) of a large copy on the device, the limit of every memory-bound op."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.nbytes / timing.median / 1e6


def peak_megabytes(call: Callable[[], object], device: torch.device) -> float:
    """Return the peak of the memory that a call allocates, with temporaries and result, in MB (10^6 bytes)."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the number of kernels, copies and fills that a call launches on the GPU, or None on the CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def provenance(device: torch.device) -> dict[str, object]:
    """Return the columns that describe the machine, the software and the time of a measurement."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "git": git_hash(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "clock": "events" if device.type == "cuda" else cpu_clock(),
        "load": round(os.getloadavg()[0], 1),  # mean of the last minute; near 0 on an idle machine
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def git_hash() -> str:
    """Return the commit of the working tree, with a + if tracked files differ from it."""
    root = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LTAT_GIT_REVISION", "unknown")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def append_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows, which all have the same keys. Raise ValueError if the file has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != columns:
            raise ValueError(f"{path} has the columns {header}, this benchmark writes {columns}: choose another --out")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def keep_and_show(
    rows: list[dict[str, str]],
    columns: list[str],
    title: str,
    device: torch.device,
    out: Path,
    justify: Literal["left", "right"] = "left",
) -> None:
    """Append ``rows`` with their provenance to the CSV ``out``, and print ``columns`` of them as a table."""
    source = provenance(device)
    append_csv(out, [source | row for row in rows])
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify=justify)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    Console().print(table)
    print(out)
