"""Check that operators and captured step work on this device, and profile the step. About a minute on a GPU.

    python -m bench.smoke [--device cuda|cpu] [--parts operators capture profile] [--out FILE.txt]

operators: each fused operator, forward and backward, in every dtype, against its reference in float64 on the CPU.
capture: one captured LTAT step against the eager one from the same state, with the full traceback if it fails.
profile: the kernels of REPLAYS steps, sorted by time, and the time of a step in which no kernel runs.

Each line is printed and appended to the file as soon as it is known. On the CPU nothing is captured: the last two parts
run the eager step, which only tests this program. Exit status: 0 if every check passed, else 1.
"""

import argparse
import functools
import itertools
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType

from bench import common
from bench.step import Ours, Problem
from ltat_fast.ops import (
    backend_info,
    balanced_softmax_kl,
    balanced_softmax_kl_ref,
    igdm_loss,
    igdm_loss_ref,
    pgd_init,
    pgd_step,
    pgd_step_ref,
)
from ltat_fast.training.backend import disagreement

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS, STEP_SIZE = 8 / 255, 2 / 255
IMAGES, ROWS, CLASSES = (8, 3, 32, 32), 64, 100
REPLAYS, TIMED_REPLAYS, KERNELS = 3, 10, 40


class Report:
    """Lines on the terminal and in a file. failures: how many checks did not pass."""

    def __init__(self, path: Path | None):
        self.file = path.open("a") if path else None
        self.failures = 0

    def line(self, text: str) -> None:
        print(text, flush=True)
        if self.file:
            print(text, file=self.file, flush=True)

    def check(self, name: str, check: Callable[[], str]) -> None:
        """Write a line with what ``check`` returns, or the traceback of what it raises."""
        began = time.perf_counter()
        try:
            found = check()
        except Exception:  # whatever a kernel, a compiler or a capture raises; other checks are still worth having
            self.failures += 1
            self.line(f"FAILED  {name}\n{traceback.format_exc()}")
        else:
            self.line(f"ok      {name}: {found} ({time.perf_counter() - began:.1f} s)")


@dataclass
class Call:
    """One call of an operator, and its expected result.

    run: the operator on tensors of the device. expect: its reference on the same values in float64 on the CPU.
    inputs: tensors on the CPU; the first ``gradients`` of them get a gradient.
    """

    name: str
    run: Callable[..., Tensor]
    expect: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    gradients: int = 0


def operator_calls() -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(IMAGES, generator=generator)
    x_adv = (x + EPS * (2 * torch.rand(IMAGES, generator=generator) - 1)).clamp(0, 1)
    grad = torch.randn(IMAGES, generator=generator)
    logits = 3 * torch.randn(4, ROWS, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    counts = torch.linspace(500, 5, CLASSES)
    step = {"step_size": STEP_SIZE, "eps": EPS}
    budgets = [size * torch.rand(IMAGES[0], generator=generator) for size in (STEP_SIZE, EPS)]  # per image
    scales = torch.linspace(0.6, 1, IMAGES[1]).view(1, -1, 1, 1)  # per channel
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for layout in (torch.contiguous_format, torch.channels_last):
            where = "contiguous" if layout is torch.contiguous_format else "channels_last"
            images = tuple(t.to(dtype, memory_format=layout) for t in (x_adv, grad, x))
            ours, reference = functools.partial(pgd_step, **step), functools.partial(pgd_step_ref, **step)
            yield Call(f"pgd_step {kind} {where}", ours, reference, images)
            limits = (*budgets, 0 * scales, scales)
            yield Call(f"pgd_step {kind} {where} with tensors", pgd_step, pgd_step_ref, images + limits)
        z = tuple(logits.to(dtype))
        for taught, s in itertools.product((False, True), (0.0, 0.1)):
            inputs = (z[0], labels, counts, *(z[1:2] if taught else ()))
            name = f"balanced_softmax_kl {kind}{' with teacher' if taught else ''}{', smoothed labels' if s else ''}"
            both = (balanced_softmax_kl, balanced_softmax_kl_ref)
            ours, reference = (functools.partial(f, label_smoothing=s) for f in both)
            yield Call(name, ours, reference, inputs, gradients=1)
        for divergence in ("kl", "l1", "l2"):
            ours, reference = (functools.partial(f, divergence=divergence) for f in (igdm_loss, igdm_loss_ref))
            yield Call(f"igdm_loss {kind} {divergence}", ours, reference, z, gradients=2)


def check_call(call: Call, device: torch.device) -> str:
    """Compare values and gradients. Return the largest differences."""
    dtype = call.inputs[0].dtype
    results = []
    for function, convert in (
        (call.run, lambda t: t.to(device)),
        (call.expect, lambda t: t.double() if t.is_floating_point() else t),
    ):
        inputs = [convert(t).detach() for t in call.inputs]
        leaves = [t.requires_grad_() for t in inputs[: call.gradients]]
        value = function(*inputs)
        results.append([value.detach(), *(torch.autograd.grad(value, leaves) if leaves else ())])
    differences = []
    for i, (ours, expected) in enumerate(zip(*results, strict=True)):
        # A loss is float32; images and gradients are rounded to their dtype.
        eps = torch.finfo(ours.dtype).eps
        rtol, atol = (2e-5 + eps, 2e-6) if call.gradients else (0.0, eps)
        actual = ours.double().cpu()
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
        differences.append(f"{(actual - expected).abs().max():.1e} ({'gradient' if i else 'value'})")
        assert not i or ours.dtype == dtype
    return "largest difference " + ", ".join(differences)


def check_start(noise: str, dtype: torch.dtype, device: torch.device) -> str:
    """Check the random start of an attack: inside the ball and the range, new for each draw, with the right spread."""
    x = torch.full((64, 3, 32, 32), 0.5, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    first, second = (pgd_init(x, EPS, noise, generator=generator).double() - 0.5 for _ in range(2))
    assert not torch.equal(first, second)
    expected = EPS / 3**0.5 if noise == "uniform" else 1e-3
    spread, largest = first.std().item(), first.abs().max().item()
    step = torch.finfo(dtype).eps / 2  # of numbers in [0.5, 1)
    assert largest <= EPS + step
    assert abs(spread - expected) < 0.02 * expected + step / 3
    return f"standard deviation {spread:.2e}, expected {expected:.2e}"


def operators(report: Report, device: torch.device) -> None:
    for op, backends in backend_info().items():
        report.line(f"{op} runs on {backends[device.type]}")
    for noise in ("uniform", "gaussian"):
        for dtype in DTYPES:
            kind = str(dtype).removeprefix("torch.")
            report.check(f"pgd_init {kind} {noise}", functools.partial(check_start, noise, dtype, device))
    for call in operator_calls():
        report.check(call.name, functools.partial(check_call, call, device))


def capture(report: Report, problem: Problem) -> Ours | None:
    """Check the captured step against the eager one. Return it, or None if it failed."""
    made: list[Ours] = []

    def check() -> str:
        eager = Ours(problem, dtype=torch.bfloat16)
        expected = eager.step.trial(eager.x, eager.y)
        captured = Ours(problem, dtype=torch.bfloat16, backend="graph") if problem.device.type == "cuda" else eager
        ours = captured.step.trial(captured.x, captured.y)
        if problem_found := disagreement(ours, expected, captured.step):
            raise AssertionError(problem_found)
        made.append(captured)
        return f"loss {ours[1]:.5f}, eager {expected[1]:.5f}"

    report.check("captured step against eager" if problem.device.type == "cuda" else "eager step, twice", check)
    return made[0] if made else None


def profile(report: Report, variant: Ours, device: torch.device) -> None:
    """Write the kernels with the most time, and the time between kernels."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    variant()
    wait()
    began = time.perf_counter()
    for _ in range(TIMED_REPLAYS if on_gpu else 1):
        variant()
    wait()
    wall = (time.perf_counter() - began) / (TIMED_REPLAYS if on_gpu else 1)

    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    replays = REPLAYS if on_gpu else 1
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(replays):
            variant()
        wait()
    kernels = defaultdict(lambda: [0, 0.0])  # name: calls, microseconds
    for event in profiler.events():
        if not on_gpu or event.device_type == DeviceType.CUDA:
            kernels[event.name][0] += 1
            kernels[event.name][1] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    calls, busy = (sum(values) / replays for values in zip(*kernels.values(), strict=True))
    report.line(f"{'kernels' if on_gpu else 'operators'} of a step by time; microseconds and calls for each step")
    ranked = sorted(kernels.items(), key=lambda item: -item[1][1])
    for name, (count, microseconds) in ranked[:KERNELS]:
        share = microseconds / replays / busy
        report.line(f"{microseconds / replays:10.1f} us {share:6.1%} {count / replays:8.1f} calls  {name[:110]}")
    gaps = 1e3 * wall - busy / 1e3
    report.line(f"wall time {1e3 * wall:.3f} ms, sum of {calls:.0f} kernels {busy / 1e3:.3f} ms")
    report.line(f"difference {gaps:.3f} ms, {1e3 * gaps / calls:.2f} us for each kernel")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_device_flag(parser)
    parts = ["operators", "capture", "profile"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="profile includes capture")
    common.add_problem_flags(parser)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="text file to append to")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    report = Report(args.out)
    report.line(", ".join(f"{key} {value}" for key, value in common.provenance(device).items()))
    if "operators" in args.parts:
        operators(report, device)
    if "capture" in args.parts or "profile" in args.parts:
        torch.backends.cudnn.benchmark = True
        problem = Problem(device, args.arch, args.image_size, args.batch_size, "ltat", args.attack_steps)
        variant = capture(report, problem)
        if "profile" in args.parts and variant is not None:
            report.check("profile", lambda: profile(report, variant, device) or "done")
    report.line(f"{report.failures} checks failed")
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
