"""Measure one training step: the plain reference, torch.compile of it, and our step, one optimisation per row.

    python -m bench.step --device cpu --arch resnet18 --batch-size 16 [--method ltat] [--out FILE.csv]

All rows start from the same weights and see the same batch. Rows in plain torch are timed together in interleaved
rounds. A row that needs a compiler is timed as soon as it is built, in rounds with the reference. The row of the CUDA
graph has a process of its own, because a capture that fails leaves torch unusable. Before it is timed, each row takes
LOSS_STEPS steps from the same start noise: ``loss`` is the loss of the last of them, so that one sees if a row
computes something else. Each row is appended to the CSV as soon as it is known; a plot of this run is written beside it
as PNG. After SIGINT while a row is built, the rows before it are still timed.

``gflop`` is the number of operations that the step needs. It is counted operator by operator in eager mode on a frozen
twin, and is the same in all rows. A row that computes more than needed (a compiled network also computes weight
gradients in the attack) is therefore slower, but its count is the same. ``gflop_formula`` checks the count: 2
forward-equivalents per attack step (forward, input gradient), 3 for the forward and backward pass of a student, 1 for
the forward pass of a teacher; in all 23 for AT-BSL and 28 for LTAT with ten attack steps. ``share_of_matmul`` is the
rate divided by the rate of a bf16 matrix product, measured in the same run. ``peak_mb`` is the peak memory of a step in
addition to weights, momentum, twins and batch.

Predictions made before the first run, as reference time / time:
    two CPU cores with AVX512-bf16, resnet18 at 32x32, batch 16
        torch.compile(reference)  0.85: 38 forward-equivalents instead of 28; fused batch norm and ReLU save a little
        frozen attack             1.00: eager autograd already skips the weight gradients
        fused ops and SGD         1.02: one percent of the bytes
        BN folded                 1.15: two passes fewer per convolution, in 20 of the 28 forward-equivalents
        channels_last             1.3:  no reordering around each convolution
        bf16                      2.6:  convolutions 4 times faster, half the bytes in the rest
        torch.compile             2.8:  fused ReLU and additions
        Measured on one of the cores, in processor time: 0.68, 1.02, 1.03, 1.02, 0.97, 2.93, 2.83. Convolutions take
        87 % of the float32 step (batch norm 5 %) and 80 % of the bf16 step, so saving bytes changes almost nothing.
        The 38 forward-equivalents explain 0.74. channels_last helps only with bf16: the bf16 row without
        it takes 1.4 times as long. On a CPU without AMX: 0.73, 1.01, 1.01, 1.01, 1.05, 2.04, 2.13. There the bf16 step
        runs at the rate of a bf16 matrix product, and the reference at the rate of a float32 one.
    one H200, resnet18 at 32x32, batch 128, from what the step compiles to (bench.codegen): reference 37 ms in TF32,
        bf16 22, torch.compile 18.9, joint student call 16.1, combo kernels 15.8, padded stem and CUDA graph 14.7; so
        2.5 times. A first guess of 8 times was wrong: the reference already runs at 10 to 14 % of the matrix rate.
"""

import argparse
import csv
import dataclasses
import functools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import common, levers
from bench.reference import ReferenceStep
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.models import build_model
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.ops import pgd_init
from ltat_fast.training.device import Hardware
from ltat_fast.training.speed import MATMUL_SIZE, FlopCounter
from ltat_fast.training.step import NO_LEVERS, TrainStep, make_optimizer

LR = 0.01  # every step uses the same batch: with the paper's 0.1 the loss would diverge at once
LOSS_STEPS = 3
REFERENCE, GRAPH = "reference", "+ CUDA graph"
COMPILED = "+ torch.compile"
# The levers of the compiled step, in the order of their rows: name, change of Levers or of the twins, needs CUDA.
LEVER_ROWS = [
    ("+ joint student call", {"joint_student": True}, False),
    ("+ compiled teacher", {"compiled_teacher": True}, False),
    ("+ combo kernels", {"combo_kernels": True}, True),
    ("+ compiled refresh", {"compiled_refresh": True}, True),
    ("+ dependent launch", {"dependent_launch": True}, True),
    ("+ fused ReLU", {"fuse_relu": True}, True),
    ("+ padded stem", {"pad_stem": True}, True),
]
NEED_A_COMPILER = ("torch.compile(reference)", COMPILED, *(name for name, _, _ in LEVER_ROWS), GRAPH)


@dataclass(frozen=True)
class Problem:
    """The problem that every row solves."""

    device: torch.device
    arch: str = "resnet18"
    image_size: int = 32
    batch_size: int = 128
    method: str = "ltat"
    attack_steps: int = 10

    @property
    def class_counts(self) -> list[int]:
        """Return the counts of CIFAR-10-LT (imbalance ratio 50) to 32 pixels, else of Tiny-ImageNet-LT (ratio 10)."""
        classes, largest, ratio = (10, 5000, 50) if self.image_size <= 32 else (200, 500, 10)
        return [int(largest * ratio ** (-c / (classes - 1))) for c in range(classes)]

    @property
    def attack(self) -> AttackConfig:
        return AttackConfig(steps=self.attack_steps, noise=METHODS[self.method].noise)

    @property
    def has_teacher(self) -> bool:
        return METHODS[self.method]().teacher != "none"

    @property
    def units(self) -> int:
        """Return the operations of a step in forward passes of the network."""
        return 2 * self.attack_steps + (3 + 3 + 2 if self.has_teacher else 3)

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_model(self.arch, len(self.class_counts)).to(self.device)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return images and labels. The images are contiguous in all rows, because noise is drawn in memory order.

        Training itself uses NHWC images.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch_size, 3, self.image_size, self.image_size, generator=generator)
        weights = torch.tensor(self.class_counts, dtype=torch.float32)
        y = torch.multinomial(weights, self.batch_size, replacement=True, generator=generator)
        return x.to(self.device), y.to(self.device)

    def forward_flops(self) -> int:
        """Return the operations of one image through the network."""
        with FlopCounter() as counter, torch.no_grad():
            self.network(seed=1).eval()(torch.zeros(1, 3, self.image_size, self.image_size, device=self.device))
        return counter.total


class Reference:
    """The reference step on a problem. frozen: attack a frozen twin instead of the network; nothing else changes."""

    def __init__(self, problem: Problem, *, compiled: bool = False, frozen: bool = False):
        self.model = problem.network(seed=1)
        self.x, self.y = problem.batch()
        self.attack = problem.attack
        self.step = ReferenceStep(
            self.model,
            problem.class_counts,
            problem.attack,
            teacher=problem.network(seed=2) if problem.has_teacher else None,
            lr=LR,
            compiled=compiled,
            attacked=FrozenTwin(self.model, fold_bn=False) if frozen else None,
        )

    def __call__(self) -> None:
        self.step(self.x, self.y)

    def loss(self, seed: int) -> float:
        """Take a step with the start noise of ``seed`` and return its loss."""
        generator = torch.Generator(self.x.device).manual_seed(seed)
        start = pgd_init(self.x, self.attack.eps, self.attack.noise, generator)
        return self.step(self.x, self.y, start=start).item()


class Ours:
    """:class:`~ltat_fast.training.step.TrainStep` on a problem, with each optimisation on or off."""

    def __init__(
        self,
        problem: Problem,
        *,
        fold_bn: bool = True,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
        backend: str = "eager",
        fuse_relu: bool = False,
        pad_stem: bool = False,
        **levers: bool,
    ):
        """levers: fields of :class:`~ltat_fast.training.step.Levers`; those not given are off."""
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def twin(model: nn.Module) -> FrozenTwin:
            reduced = None if dtype == torch.float32 else dtype
            options = {"fuse_relu": fuse_relu, "pad_stem": pad_stem}
            return FrozenTwin(model, fold_bn=fold_bn, dtype=reduced, channels_last=channels_last, **options)

        self.model = allow_joint_calls(problem.network(seed=1).to(memory_format=layout))
        self.x, self.y = problem.batch()
        method = METHODS[problem.method]()
        teacher = twin(problem.network(seed=2).to(memory_format=layout)) if problem.has_teacher else None
        method.setup(MethodContext(torch.tensor(problem.class_counts, device=problem.device), teacher))
        self.step = TrainStep(
            self.model,
            method,
            make_optimizer(self.model, LR, momentum=0.9, weight_decay=5e-4),
            problem.attack,
            Hardware(problem.device, dtype, "benchmark"),
            backend,
            twin=twin(self.model),
            levers=dataclasses.replace(NO_LEVERS, compiled=backend != "eager", **levers),
        )

    def __call__(self, seed: int = 0) -> None:
        self.step(self.x, self.y, lr=LR, progress=1.0, seed=seed)

    def loss(self, seed: int) -> float:
        """Take a step with the start noise of ``seed`` and return its loss."""
        self.step.restart()
        self(seed)
        return self.step.totals()["loss"]


Variant = Reference | Ours


def ladder(problem: Problem) -> dict[str, Callable[[], Variant]]:
    """Return the rows of the table in order, by name, each as a function that builds it.

    From the third row on, each row adds one optimisation to the row before it.
    """
    ours = functools.partial(Ours, problem)
    bf16 = torch.bfloat16
    rows = {
        "reference": functools.partial(Reference, problem),
        "torch.compile(reference)": functools.partial(Reference, problem, compiled=True),
        "reference, frozen attack": functools.partial(Reference, problem, frozen=True),
        "+ fused ops and SGD": functools.partial(ours, fold_bn=False, channels_last=False),
        "+ BN folded": functools.partial(ours, channels_last=False),
        "+ channels_last": ours,
        "+ bf16": functools.partial(ours, dtype=bf16),
        COMPILED: functools.partial(ours, dtype=bf16, backend="step"),
    }
    on = {}
    for name, lever, needs_cuda in LEVER_ROWS:
        if problem.device.type == "cuda" or not needs_cuda:
            on |= lever
            rows[name] = functools.partial(ours, dtype=bf16, backend="step", **on)
    if problem.device.type == "cuda":
        rows[GRAPH] = functools.partial(ours, dtype=bf16, backend="graph", **on)
    return rows


def count_flops(problem: Problem) -> int:
    """Return the operations of one step in convolutions and matrix products."""
    variant = Ours(problem, fold_bn=False, channels_last=False)
    with FlopCounter() as counter:
        variant()
    return counter.total


def matmul_ceiling(device: torch.device) -> float:
    """Return the TFLOP/s of a large bf16 matrix product, timed like the rows."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / common.time_interleaved({"mm": lambda: torch.mm(a, b, out=out)}, device)["mm"].median / 1e9


def warm_up(variant: Variant, device: torch.device) -> tuple[float, float]:
    """Take LOSS_STEPS steps. Return the loss of the last one and the peak memory in MB.

    On CUDA the peak covers these steps, with compilation and capture; on a CPU it covers one further step.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    loss = [variant.loss(seed) for seed in range(LOSS_STEPS)][-1]
    if device.type == "cuda":
        return loss, (torch.cuda.max_memory_allocated(device) - before) / 1e6

    def step_without_leftovers():
        variant()
        variant.model.zero_grad(set_to_none=True)

    return loss, common.peak_megabytes(step_without_leftovers, device)


def measure(
    problem: Problem, rounds: int, names: list[str], notes: dict[str, str] | None = None
) -> Iterator[dict[str, object]]:
    """Yield the rows ``names`` of the table, each as soon as it is known.

    notes: by name, why a row cannot be measured. Such a row, and one that fails here, has a note in place of numbers.
    """
    ceiling = matmul_ceiling(problem.device)
    gflop = count_flops(problem) / 1e9
    formula = problem.units * problem.forward_flops() * problem.batch_size / 1e9
    builds, notes = ladder(problem), dict(notes or {})
    variants, states = {}, {}

    def make(name: str) -> None:
        if "interrupted" in notes.values():
            notes.setdefault(name, "interrupted")
        if name in variants or name in notes:
            return
        print(f"building {name}", flush=True)
        try:
            variant = builds[name]()
            states[name] = warm_up(variant, problem.device)
            variants[name] = variant
        except KeyboardInterrupt:  # the rows that are ready are timed
            notes[name] = "interrupted"
        except Exception as error:  # what a compiler or a capture raises; the other rows are still worth having
            notes[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

    in_plain_torch = [name for name in names if name not in NEED_A_COMPILER]
    for group in (in_plain_torch, *([name] for name in names if name in NEED_A_COMPILER)):
        for name in (REFERENCE, *group):
            make(name)
        timings = common.time_interleaved(variants, problem.device, rounds) if variants.keys() & group else {}
        for name in group:
            row = {
                "arch": problem.arch,
                "image_size": problem.image_size,
                "batch_size": problem.batch_size,
                "method": problem.method,
                "attack_steps": problem.attack_steps,
                "variant": name,
            }
            ms, p20, p80, loss, peak = [math.nan] * 5
            if name in timings:
                timing = timings[name]
                ms, p20, p80, (loss, peak) = timing.median, timing.p20, timing.p80, states[name]
            reference_ms = timings[REFERENCE].median if REFERENCE in timings else math.nan
            yield row | {
                "median_ms": f"{ms:.3f}",
                "p20_ms": f"{p20:.3f}",
                "p80_ms": f"{p80:.3f}",
                "images_per_s": f"{1e3 * problem.batch_size / ms:.1f}",
                "speedup": f"{reference_ms / ms:.2f}",
                "gflop": f"{gflop:.4g}",
                "gflop_formula": f"{formula:.4g}",
                "tflop_per_s": f"{gflop / ms:.4g}",
                "matmul_tflop_per_s": f"{ceiling:.4g}",
                "share_of_matmul": f"{gflop / ms / ceiling:.3f}",
                "peak_mb": f"{peak:.0f}",
                "loss": f"{loss:.5f}",
                "note": notes.get(name, ""),
            }
        variants = {name: variant for name, variant in variants.items() if name == REFERENCE}  # frees the others


def graph_row_in_its_own_process(flags: list[str], out: Path) -> str:
    """Append the row of the CUDA graph to ``out``. Return why there is none, empty if there is.

    flags: the command line of this benchmark.
    """
    known = len(read_rows(out))
    command = [sys.executable, "-m", "bench.step", *flags, "--out", str(out.resolve()), "--rows", GRAPH]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        process.wait()
    except KeyboardInterrupt:  # the other process is interrupted too, and still has to write what it has
        process.wait()
        raise
    return "" if len(read_rows(out)) > known else f"its process ended with status {process.returncode}"


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table."""
    first = rows[0]
    table = Table(
        title="{arch} at {image_size}x{image_size}, batch {batch_size}, {method}, {attack_steps} attack steps: "
        "{gflop} GFLOP per step (formula {gflop_formula}), matmul ceiling {matmul_tflop_per_s} TFLOP/s".format(**first)
    )
    columns = ("variant", "ms", "p20", "p80", "images/s", "x", "TFLOP/s", "of matmul", "peak MB", "loss", "")
    keys = ("variant", "median_ms", "p20_ms", "p80_ms", "images_per_s", "speedup", "tflop_per_s", "share_of_matmul")
    for column in columns:
        table.add_column(column, justify="left" if column in ("variant", "") else "right")
    for row in rows:
        table.add_row(*(str(row[key]) for key in (*keys, "peak_mb", "loss", "note")))
    Console(width=150).print(table)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Draw a bar chart of the milliseconds per step, one bar per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row["note"]]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.6))
    times = [float(row["median_ms"]) for row in rows]
    spread = [[t - float(row["p20_ms"]) for t, row in zip(times, rows, strict=True)]]
    spread += [[float(row["p80_ms"]) - t for t, row in zip(times, rows, strict=True)]]
    colours = ["#888888" if "reference" in row["variant"] else "#2b6cb0" for row in rows]
    bars = axis.barh([row["variant"] for row in rows], times, xerr=spread, color=colours)
    axis.bar_label(
        bars, [f" {time:.1f} ms, {row['speedup']}x" for time, row in zip(times, rows, strict=True)], fontsize=8
    )
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel("milliseconds per training step")
    title = "{arch} at {image_size}x{image_size}, batch {batch_size}, {method}\n{device}, torch {torch}, {date}, {git}"
    axis.set_title(title.format(**rows[0]), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_device_flag(parser)
    common.add_problem_flags(parser)
    parser.add_argument("--method", choices=["ltat", "at-bsl"], default="ltat")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20, help="timing rounds; fewer, but at least 5, after 30 s")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="measure these rows of the table, by default all")
    parser.add_argument("--out", type=Path, help="CSV to append to, default bench/results/step-DEVICE.csv")
    levers.add_flags(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # the same for every row
    source = common.provenance(device)
    print(", ".join(f"{key} {value}" for key, value in source.items()))
    problem = Problem(device, args.arch, args.image_size, args.batch_size, args.method, args.attack_steps)
    names = args.rows or [*ladder(problem)]
    if unknown := set(names) - set(ladder(problem)):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; choose from {', '.join(ladder(problem))}")
    pulled = levers.chosen(args)
    out = args.out or Path(__file__).parent / "results" / f"step-{args.device}.csv"
    known = len(read_rows(out))
    notes = {}
    if GRAPH in names and len(names) > 1:
        note = graph_row_in_its_own_process(sys.argv[1:] if argv is None else argv, out)
        if note:
            notes[GRAPH] = note
        else:
            names = [name for name in names if name != GRAPH]
    with levers.pulled(pulled):
        for row in measure(problem, args.rounds, names, notes):
            row["variant"] = ", ".join([row["variant"], *pulled])
            common.append_csv(out, [source | row])
    rows = read_rows(out)[known:]
    show(rows)
    print(out)
    if any(not row["note"] for row in rows):
        plot(rows, out.with_suffix(".png"))
        print(out.with_suffix(".png"))


if __name__ == "__main__":
    main()
