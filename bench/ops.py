"""The fused ops against their plain-torch references, eager and compiled: time, bandwidth, launches, memory.

    python -m bench.ops --device cpu [--quick] [--out bench/results/ops-cpu.csv]

Values are checked against the reference before anything is timed. A differentiable op is timed in three directions:
forward (which saves tensors for the backward), backward alone, and both. On CUDA every row exists twice: called from
Python, and replayed as a CUDA graph. Rows are appended to the CSV. A plot of the speed-ups of this run over eager is
written next to it as PNG.

Predictions before any tuning, as eager time / our time (the CSV holds the measured values):
    pgd_step, images out of cache   4.7x: 19 tensor passes (sign 2, mul 2, add 3, sub 2, max 3, add 2, min 3, clamp 2)
                                    against 4; torch.compile takes 1.0 to 1.1 of our time, with the same 4 passes
    pgd_step, 128x3x32x32           3x to 5x on the CPU, in cache; 4x on a GPU, 8 launches against 1; the guards of
                                    torch.compile take longer than the kernel
    pgd_step and pgd_init with step_size, eps or the range as tensors, per image or per channel: as with numbers
    pgd_init                        1.5x on the CPU, where drawing the noise dominates; 3x on a GPU
    losses, 128x10 to 128x200       3x: dispatch of about 25 operations in both directions against 2; torch.compile
                                    takes 1.5 of our time
    losses, 256x10000               3x on the CPU (exponentials, threads), 4x on a GPU (bytes); torch.compile takes 1.2
                                    of our time
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch._inductor.exc import InductorError

from bench import common
from ltat_fast.ops import balanced_softmax_kl, igdm_loss, pgd_init, pgd_step
from ltat_fast.ops.balanced_softmax_kl import balanced_softmax_kl_ref
from ltat_fast.ops.igdm import igdm_loss_ref
from ltat_fast.ops.pgd import pgd_init_ref, pgd_step_ref

IMAGES = [(128, 3, 32, 32), (128, 3, 64, 64), (1024, 3, 224, 224)]
LOGITS = [(128, 10), (128, 100), (128, 200), (1024, 1000), (256, 10000)]
DTYPES = [torch.float32, torch.bfloat16]
EPS, STEP = 8 / 255, 2 / 255
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5}}


@dataclass
class Case:
    """An op at one shape and dtype."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reference: Callable[..., Tensor]
    fused: dict[str, Callable[..., Tensor]]  # by provider name
    inputs: tuple[Tensor, ...]  # those that require gradients are differentiated
    traffic: dict[str, int]  # least number of bytes to move, by direction
    check: Callable[[Tensor], None] | None = None  # for a random op: replaces the comparison with the reference


def pgd_limits(kind: str, shape: tuple[int, ...], device: torch.device) -> dict[str, float | Tensor]:
    """Return step_size, eps, lower and upper, of which none ("") or some ("per image", "per channel") are tensors."""
    step_size, eps, lower, upper = STEP, EPS, 0.0, 1.0
    if kind == "per image":  # as class-wise budgets
        factors = torch.linspace(0.5, 1.5, shape[0], device=device)
        step_size, eps = STEP * factors, EPS * factors
    elif kind == "per channel":  # as for normalised images
        factors = torch.linspace(0.5, 1.5, shape[1], device=device).view(1, -1, 1, 1)
        step_size, eps, lower, upper = STEP * factors, EPS * factors, 0 * factors, torch.ones_like(factors)
    return {"step_size": step_size, "eps": eps, "lower": lower, "upper": upper}


def pgd_init_case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: str = "") -> Case:
    x = torch.rand(shape, device=device, dtype=dtype)
    limits = pgd_limits(kind, shape, device)
    del limits["step_size"]
    radius = torch.as_tensor(limits["eps"], device=device)
    radius = radius.view(-1, 1, 1, 1).double() if kind == "per image" else radius.double()

    def check(start):
        noise = start.double() - x.double()
        ulp = torch.finfo(dtype).eps / 2
        assert (noise.abs() <= radius + ulp).all()
        assert start.min() >= 0
        assert start.max() <= 1
        assert abs((noise / radius).std().item() * 3**0.5 - 1) < 0.05  # the clamp to [0, 1] reduces it by 2 %

    return Case(
        op=f"pgd_init {kind}".strip(),
        shape=shape,
        dtype=dtype,
        reference=functools.partial(pgd_init_ref, **limits),
        fused={"ours": functools.partial(pgd_init, **limits)},
        inputs=(x,),
        traffic={"forward": 2 * x.nbytes},  # read x, write the start
        check=check,
    )


def pgd_step_case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: str = "") -> Case:
    x = torch.rand(shape, device=device, dtype=dtype)
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp_(0, 1)
    grad = torch.randn_like(x)
    out = torch.empty_like(x)
    limits = pgd_limits(kind, shape, device)
    fused = functools.partial(pgd_step, **limits)
    return Case(
        op=f"pgd_step {kind}".strip(),
        shape=shape,
        dtype=dtype,
        reference=functools.partial(pgd_step_ref, **limits),
        fused={"ours": fused, "ours, out=": functools.partial(fused, out=out)},
        inputs=(x_adv, grad, x),
        traffic={"forward": 4 * x.nbytes},  # read x_adv, grad, x; write the iterate
    )


def balanced_softmax_kl_case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    student, teacher = (3 * torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(shape[1], shape[:1], device=device)
    counts = torch.linspace(500, 50, shape[1], device=device)
    return Case(
        op="balanced_softmax_kl",
        shape=shape,
        dtype=dtype,
        reference=balanced_softmax_kl_ref,
        fused={"ours": balanced_softmax_kl},
        inputs=(student, labels, counts, teacher),
        # forward: read two (B, C); backward: read two, write one; labels, counts and row statistics are negligible
        traffic={"forward": 2 * student.nbytes, "backward": 3 * student.nbytes, "both": 5 * student.nbytes},
    )


def igdm_loss_case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    logits = tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=i < 2) for i in range(4))
    size = logits[0].nbytes
    return Case(
        op="igdm_loss",
        shape=shape,
        dtype=dtype,
        reference=igdm_loss_ref,
        fused={"ours": igdm_loss},
        inputs=logits,
        # forward: read four (B, C); backward: read four, write two
        traffic={"forward": 4 * size, "backward": 6 * size, "both": 10 * size},
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the cases one at a time, because the largest hold gigabytes."""
    images = IMAGES[:1] if quick else IMAGES
    for make, shapes in (
        (pgd_init_case, images),
        (functools.partial(pgd_init_case, kind="per image"), images[:2]),
        (functools.partial(pgd_init_case, kind="per channel"), images[:2]),
        (pgd_step_case, images),
        (functools.partial(pgd_step_case, kind="per image"), images[:2]),
        (functools.partial(pgd_step_case, kind="per channel"), images[:2]),
        (balanced_softmax_kl_case, LOGITS[1:2] if quick else LOGITS),
        (igdm_loss_case, LOGITS[1:2] if quick else LOGITS),
    ):
        for shape in shapes:
            for dtype in DTYPES[:1] if quick else DTYPES:
                torch.manual_seed(0)
                yield make(shape, dtype, device)


def directions(case: Case, function: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    """Return a call without arguments for each direction, on new leaf tensors.

    The leaves must be new: a leaf remembers the stream of its first forward that is still alive. "backward" keeps such
    a forward, which would tie a capture of "both" to the default stream and make it fail.
    """
    inputs = [t.detach().clone().requires_grad_() if t.requires_grad else t for t in case.inputs]
    leaves = [t for t in inputs if t.requires_grad]
    if not leaves:
        return {"forward": lambda: function(*inputs)}

    upstream = torch.ones_like(case.reference(*(t.detach() for t in inputs)))

    @functools.cache
    def kept() -> Tensor:
        return function(*inputs)

    return {
        "forward": lambda: function(*inputs),
        "backward": lambda: torch.autograd.grad(kept(), leaves, upstream, retain_graph=True),
        "both": lambda: torch.autograd.grad(function(*inputs), leaves, upstream),
    }


def providers(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Return eager, compile and ours, all checked against eager. Compile is skipped if Inductor cannot build it."""
    torch.compiler.reset()
    result = {
        "eager": case.reference,
        "compile": torch.compile(case.reference, fullgraph=True, dynamic=False),
    } | case.fused
    expected = {name: call() for name, call in directions(case, case.reference).items()}
    for name in list(result):
        try:
            for direction, call in directions(case, result[name]).items():
                if case.check is not None:
                    case.check(call())
                else:
                    torch.testing.assert_close(call(), expected[direction], **TOLERANCE[case.dtype])
        except InductorError as error:
            print(f"{case.op}: skipped {name}: {str(error).splitlines()[0]}")
            del result[name]
    return result


def measure(case: Case, device: torch.device, roof: float) -> list[dict[str, object]]:
    """Return one row per direction, launch mode and provider."""
    functions = providers(case)
    calls = {name: directions(case, function) for name, function in functions.items()}
    rows = []
    for direction, traffic in case.traffic.items():
        launchers = {"eager": {name: by_direction[direction] for name, by_direction in calls.items()}}
        for call in launchers["eager"].values():
            call()  # so that one-time work is not timed
        if device.type == "cuda" and direction != "backward":  # a graph cannot start at a saved autograd node
            launchers["graph"] = {
                name: common.captured(directions(case, function)[direction]) for name, function in functions.items()
            }
        for launch, variants in launchers.items():
            timings = common.time_interleaved(variants, device)
            for name, timing in timings.items():
                bandwidth = traffic / timing.median / 1e6
                rows.append(
                    {
                        "op": case.op,
                        "shape": "x".join(map(str, case.shape)),
                        "dtype": str(case.dtype).removeprefix("torch."),
                        "direction": direction,
                        "launch": launch,
                        "provider": name,
                        "median_ms": f"{timing.median:.5f}",
                        "p20_ms": f"{timing.p20:.5f}",
                        "p80_ms": f"{timing.p80:.5f}",
                        "speedup_over_eager": f"{timings['eager'].median / timing.median:.2f}",
                        "bytes": traffic,
                        "gb_per_s": f"{bandwidth:.2f}",
                        "copy_gb_per_s": f"{roof:.1f}",
                        "share_of_copy": f"{bandwidth / roof:.3f}",
                        "launches": common.launches(launchers["eager"][name], device),
                        "peak_mb": f"{common.peak_megabytes(launchers['eager'][name], device):.3f}",
                    }
                )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    for row in rows:
        print(
            "{op:21}{shape:>18} {dtype:9}{direction:9}{launch:6}{provider:11}{median_ms:>11} ms "
            "[{p20_ms}, {p80_ms}] {speedup_over_eager:>6}x {gb_per_s:>8} GB/s {share_of_copy:>6} of copy "
            "{launches!s:>4} launches {peak_mb:>9} MB".format(**row),
            flush=True,
        )


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Plot the speed-up over eager, of forward and backward together if the op has a backward, else of the forward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    differentiable = {row["op"] for row in rows if row["direction"] == "both"}
    rows = [row for row in rows if row["direction"] == ("both" if row["op"] in differentiable else "forward")]
    launch = rows[-1]["launch"]  # "graph" on CUDA
    rows = [row for row in rows if row["launch"] == launch]
    ops, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("op", "dtype"))
    figure, axes = plt.subplots(len(dtypes), len(ops), figsize=(4.5 * len(ops), 3.5 * len(dtypes)), squeeze=False)
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, op in zip(line, ops, strict=True):
            panel = [row for row in rows if row["op"] == op and row["dtype"] == dtype]
            shapes, names = (list(dict.fromkeys(row[key] for row in panel)) for key in ("shape", "provider"))
            for i, name in enumerate(names):
                speedup = {row["shape"]: float(row["speedup_over_eager"]) for row in panel if row["provider"] == name}
                places = [shapes.index(shape) + (i - len(names) / 2 + 0.5) * 0.8 / len(names) for shape in speedup]
                axis.bar(places, speedup.values(), 0.8 / len(names), label=name)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_title(f"{op}, {dtype}", fontsize=10)
            axis.set_xticks(range(len(shapes)), shapes, fontsize=7, rotation=15)
            axis.set_ylabel("times faster than eager", fontsize=8)
            axis.legend(fontsize=7)
    where = rows[0]
    figure.suptitle(f"{where['device']}, torch {where['torch']}, {where['date']}, commit {where['git']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_device_flag(parser)
    parser.add_argument("--quick", action="store_true", help="one shape per op, float32")
    parser.add_argument("--out", type=Path, help="CSV to append to, default bench/results/ops-DEVICE.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    out = args.out or Path(__file__).parent / "results" / f"ops-{args.device}.csv"
    # The backward alone is timed on a retained graph. A compiled function that donates its buffers does not allow that.
    functorch_config.donated_buffer = False
    source = common.provenance(device)
    roof = common.copy_bandwidth(device)
    print(", ".join(f"{key} {value}" for key, value in source.items()), f"copy {roof:.1f} GB/s", sep="\n")
    rows = []
    for case in cases(device, args.quick):
        measured = [source | row for row in measure(case, device, roof)]
        show(measured)
        common.append_csv(out, measured)
        rows += measured
    plot(rows, out.with_suffix(".png"))
    print(f"{out} {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
