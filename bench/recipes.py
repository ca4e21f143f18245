"""Measure what each modifier costs: one training step of every row of ``python -m ltat_fast.sweep --table recipes``.

    python -m bench.recipes --device cpu [--arch resnet18] [--image-size 32] [--batch-size 128] [--out FILE.csv]

All rows run in eager mode on the same network and batch, and are timed in interleaved rounds. ``forwards`` is the
number of operations of the step, in forward passes of the network on the batch, counted operator by operator.
``relative`` is the time divided by the time of plain LTAT.

Predictions, in forward passes: AT-BSL 23, LTAT 28; AWP runs the student and the teacher a second time, so 36; EMA,
class-wise eps and label smoothing add elementwise work alone, so 28; one attack step 10; one step with all 18. EMA adds
one pass over the weights per step, which shows where the network is large and the batch small.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench import common
from bench.step import LR, Problem
from ltat_fast.flags import parse_args
from ltat_fast.methods import MethodContext
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.reporting.recipes import recipes
from ltat_fast.training.device import Hardware
from ltat_fast.training.speed import FlopCounter
from ltat_fast.training.stage import build_modifiers, training_attack
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

PLAIN = "LTAT"


def build(problem: Problem, flags: list[str], hardware: Hardware) -> TrainStep:
    """Return the training step of the run with these flags of ``train``."""
    config, method = parse_args(["--out", "unused", "--dataset", "cifar10-lt", *flags])
    model = allow_joint_calls(problem.network(seed=1).to(memory_format=torch.channels_last))
    teacher = frozen_twin(problem.network(seed=2), hardware) if method.teacher != "none" else None
    counts = torch.tensor(problem.class_counts, device=problem.device)
    method.setup(MethodContext(counts, teacher, label_smoothing=config.label_smoothing))
    return TrainStep(
        model,
        method,
        make_optimizer(model, LR, config.momentum, config.weight_decay),
        training_attack(config, method),
        hardware,
        modifiers=build_modifiers(config, method, model, counts),
    )


def measure(problem: Problem, hardware: Hardware, rounds: int) -> list[dict[str, str]]:
    rows = recipes(None)["experiments"][0]["rows"]
    x, y = problem.batch()
    x = x.contiguous(memory_format=torch.channels_last)

    def one_batch(step: TrainStep) -> Callable[[], None]:
        return lambda: step(x, y, lr=LR, progress=1.0, seed=0)

    steps = {row["name"]: one_batch(build(problem, row["flags"], hardware)) for row in rows}
    forwards = {}
    for name, step in steps.items():
        with FlopCounter() as counter:
            step()
        forwards[name] = counter.total / (problem.forward_flops() * problem.batch_size)
    timings = common.time_interleaved(steps, problem.device, rounds)
    return [
        {
            "arch": problem.arch,
            "image_size": str(problem.image_size),
            "batch_size": str(problem.batch_size),
            "precision": str(hardware.dtype).removeprefix("torch."),
            "recipe": name,
            "forwards": f"{forwards[name]:.1f}",
            "median_ms": f"{timing.median:.2f}",
            "p20_ms": f"{timing.p20:.2f}",
            "p80_ms": f"{timing.p80:.2f}",
            "relative": f"{timing.median / timings[PLAIN].median:.2f}",
        }
        for name, timing in timings.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_device_flag(parser)
    common.add_problem_flags(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=20, help="timing rounds; fewer, but at least 5, after 30 s")
    parser.add_argument("--out", type=Path, help="CSV to append to, default bench/results/recipes-DEVICE.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    problem = Problem(device, args.arch, args.image_size, args.batch_size)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    rows = measure(problem, Hardware(device, dtype, "benchmark"), args.rounds)
    out = args.out or Path(__file__).parent / "results" / f"recipes-{args.device}.csv"
    title = f"{args.arch}, {args.image_size} pixels, batch {args.batch_size}, {args.precision}"
    common.keep_and_show(rows, ["recipe", "forwards", "median_ms", "relative"], title, device, out)


if __name__ == "__main__":
    main()
