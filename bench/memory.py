"""Measure the peak memory of a training step in 1, 2, 4, ... micro-batches (``--accumulate``).

    python -m bench.memory --device cpu [--arch resnet18] [--batch-size 128] [--accumulate 1 2 4] [--out FILE.csv]

Each number of micro-batches has a process of its own, which takes one eager step of LTAT in float32 with one attack
step; more attack steps need no more memory. ``start_mib`` is the memory before the step: libraries, weights, batch.
``peak_mib`` is the highest since then: resident memory on a CPU, allocated memory on a GPU.
"""

import argparse
import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from bench import common
from bench.step import LR, Problem
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

MIB = 2**20


def held(device: torch.device, peak: bool) -> float:
    """Return the memory that this process holds, or has held at most, in MiB."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / MIB
    name = "VmHWM:" if peak else "VmRSS:"
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def one_step(problem: Problem, accumulate: int) -> tuple[float, float]:
    """Take one step. Return the memory before it and the peak, in MiB."""
    hardware = Hardware(problem.device, torch.float32, "benchmark")
    model = allow_joint_calls(problem.network(seed=1).to(memory_format=torch.channels_last))
    method = METHODS[problem.method]()
    counts = torch.tensor(problem.class_counts, device=problem.device)
    method.setup(MethodContext(counts, frozen_twin(problem.network(seed=2), hardware) if problem.has_teacher else None))
    optimizer = make_optimizer(model, LR, momentum=0.9, weight_decay=5e-4)
    step = TrainStep(model, method, optimizer, problem.attack, hardware, accumulate=accumulate)
    x, y = problem.batch()
    x = x.contiguous(memory_format=torch.channels_last)
    start = held(problem.device, peak=False)
    step(x, y, lr=LR, progress=1.0, seed=0)
    return start, held(problem.device, peak=True)


def measure(problem: Problem, numbers: list[int]) -> list[dict[str, str]]:
    rows = []
    for number in numbers:
        # A process has one peak, so each number needs a fresh one.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            start, peak = pool.submit(one_step, problem, number).result()
        shown = {field: str(getattr(problem, field)) for field in ("arch", "image_size", "batch_size", "method")}
        memory = {"start_mib": f"{start:.0f}", "peak_mib": f"{peak:.0f}", "step_mib": f"{peak - start:.0f}"}
        rows.append(shown | {"accumulate": str(number)} | memory)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_device_flag(parser)
    common.add_problem_flags(parser)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, help="CSV to append to, default bench/results/memory-DEVICE.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    problem = Problem(device, args.arch, args.image_size, args.batch_size)
    problem = dataclasses.replace(problem, attack_steps=1)
    rows = measure(problem, args.accumulate)
    out = args.out or Path(__file__).parent / "results" / f"memory-{args.device}.csv"
    title = f"{args.arch}, {args.image_size} pixels, batch {args.batch_size}, LTAT, float32"
    common.keep_and_show(rows, ["accumulate", "start_mib", "peak_mib", "step_mib"], title, device, out, "right")


if __name__ == "__main__":
    main()
