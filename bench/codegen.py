"""Show what one training step compiles to for an H200, and predict its time there. Needs no GPU.

    python -m bench.codegen [--arch resnet18] [--image-size 32] [--batch-size 128] [--method ltat] [--out FILE.csv]

Needs torch built with CUDA. The step of ``bench.step`` runs on fake CUDA tensors (:mod:`bench.fake_cuda`): Inductor
writes its sm_90 code, :mod:`bench.generated_code` counts launches and bytes in it, and operators outside of compiled
code are counted one by one. Compilation takes minutes. FILE.csv gets a row for each part of the step and one for the
whole step; FILE-predicted.csv gets the predicted times of rows of ``bench.step``. Both are appended to.

Prediction for one step, with the constants below:

    device_ms = flops / (CONV_SHARE * CEILING[dtype]) + bytes / BANDWIDTH + nodes * GAP
    ms        = max(device_ms, nodes * HOST)                              (CUDA graph: device_ms)

flops: of convolutions and matrix products. bytes: of everything else. nodes: launches of Triton and library calls; a
convolution's backward counts once for each gradient. An operator in plain torch counts as one node and moves each
input and output once, except that a bias of a convolution is a pass of its own. What libraries do inside a call, such
as converting layouts, is not seen. Operators of this package whose kernels are not built here count as the plain torch
that replaces them.
"""

import argparse
import contextlib
import dataclasses
import datetime
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import common, generated_code, levers
from bench.fake_cuda import INDUCTOR_WITHOUT_GPU, FakeDevice, built_with_cuda, fake_device
from bench.generated_code import GeneratedCode
from bench.step import COMPILED, GRAPH, LEVER_ROWS, Ours, Problem, Variant, ladder
from ltat_fast.models.frozen import FrozenTwin

aten = torch.ops.aten

# CEILING and BANDWIDTH were measured on one H200. The others are estimates: bench.convs and bench.smoke measure them.
CEILING = {torch.bfloat16: 790e12, torch.float32: 395e12}  # FLOP/s of a large matrix product; float32 as TF32
BANDWIDTH = 4.3e12  # bytes/s of a device copy, read plus write
CONV_SHARE = {32: 0.44, 64: 0.60}  # share of the ceiling that convolutions reach, up to this image size at batch 128
GAP = 1e-6  # seconds between two nodes of a CUDA graph
HOST = 12e-6  # seconds that the host needs per node
LAST_LEVER = LEVER_ROWS[-1][0]
# The rows whose parts are counted. The last one has all levers.
COUNTED_ROWS = [COMPILED, "+ joint student call", "+ combo kernels", "+ compiled refresh", LAST_LEVER]
PREDICTED_ROWS = ["reference", "+ bf16", COMPILED, *(name for name, _, _ in LEVER_ROWS), GRAPH]


@dataclass(frozen=True)
class Work:
    """The work of the device for one part of the step. The fields are explained at the top of the module."""

    triton_launches: int = 0
    small_launches: int = 0
    conv_forward: int = 0
    conv_backward: int = 0
    other_operators: int = 0
    nodes: int = 0
    bytes: int = 0
    flops: int = 0
    seconds_at_ceiling: float = 0.0  # of flops

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(ours + theirs for ours, theirs in pairs))

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * value for value in dataclasses.astuple(self)))


@dataclass
class Part:
    """A part of the step. calls: how often one step runs it; work: of one call."""

    work: Work
    calls: int = 0


Parts = dict[str, Part]


def record(build: Callable[[], Variant], device: FakeDevice) -> Parts:
    """Return the parts of one step of ``build()``: compiled ones by name, the eager teacher and "everything else"."""
    parts: Parts = {}
    torch._dynamo.reset()
    with _writing_code(parts):
        variant = build()
        variant()  # compiles
    for part in parts.values():
        part.calls = 0
    eager = {"teacher forward": Work(), "everything else": Work()}
    with contextlib.ExitStack() as stack:
        current = stack.enter_context(_naming_the_teacher(variant))

        def observe(operator, arguments, result):
            eager[current.name] += operator_work(operator, arguments, result)

        stack.enter_context(device.observing(observe))
        variant()
    return parts | {name: Part(work, calls=1) for name, work in eager.items() if work.nodes}


@contextlib.contextmanager
def _naming_the_teacher(variant: Variant) -> Iterator[SimpleNamespace]:
    """Yield an object whose ``name`` is the part of the step to which the eager operators of the moment belong."""
    current = SimpleNamespace(name="everything else")
    teacher = variant.step.method.context.teacher if isinstance(variant, Ours) else None
    if not isinstance(teacher, FrozenTwin):  # none, or one that is compiled and so has a part of its own
        yield current
        return

    def name(part):
        return lambda *_: setattr(current, "name", part)

    hooks = [
        teacher.register_forward_pre_hook(name("teacher forward")),
        teacher.register_forward_hook(name("everything else")),
    ]
    try:
        yield current
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _writing_code(parts: Parts) -> Iterator[None]:
    """Inside a ``with`` block, Inductor writes modules and does not load them; each becomes one of ``parts``.

    Instead of the module, a function returns fake tensors of the right shapes, so that the step runs to its end.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor import compile_fx, config, ir
    from torch._inductor.graph import GraphLowering

    def compile_to_module(graph):
        source = graph.codegen()[0].value
        name = _name_of(graph, source)
        if name in parts:
            name += f" {sum(known.startswith(name) for known in parts) + 1}"
        parts[name] = part = Part(_module_work(generated_code.read(source), graph.module))
        outputs = [
            None
            if isinstance(output, ir.NoneAsConstantBuffer)
            else ([*map(int, output.get_size())], [*map(int, output.get_stride())], output.get_dtype())
            for output in graph.graph_outputs
        ]

        def call(arguments):
            arguments.clear()
            part.calls += 1
            return [out and torch.empty_strided(*out[:2], dtype=out[2], device="cuda") for out in outputs]

        return SimpleNamespace(call=call, runner=None, __file__=None)

    with (
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
        mock.patch.object(compile_fx, "get_input_idxs_to_check", return_value=[]),  # fake tensors have no address
        config.patch(INDUCTOR_WITHOUT_GPU),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def _name_of(graph, source: str) -> str:
    if graph.is_backward:
        return "student backward"
    if "ltat.pgd_step" in source:
        return "attack step"
    if not graph.graph_outputs:
        return "refresh of the twin"
    return "teacher forward" if graph.is_inference else "student forward"


def _module_work(code: GeneratedCode, graph: torch.fx.GraphModule) -> Work:
    flops, seconds = 0, 0.0
    for node in graph.graph.nodes:
        if getattr(node.target, "_overloadpacket", None) in flop_registry:
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
            of_node = _flops(node.target, arguments, node.meta["val"])
            flops, seconds = flops + of_node[0], seconds + of_node[1]
    launches = len(code.launch_bytes)
    return Work(
        triton_launches=launches,
        small_launches=code.small_launches,
        conv_forward=code.conv_forward,
        conv_backward=code.conv_backward,
        other_operators=code.other_calls,
        nodes=launches + code.conv_forward + code.backward_gradients + code.other_calls,
        bytes=sum(code.launch_bytes),
        flops=flops,
        seconds_at_ceiling=seconds,
    )


def _flops(operator, arguments: tuple[tuple, dict], result) -> tuple[int, float]:
    """Operations of a convolution or matrix product, and its seconds at the ceiling of its precision."""
    args, kwargs = arguments
    flops = flop_registry[operator._overloadpacket](*args, **kwargs, out_val=result)
    dtype = next(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return flops, flops / CEILING[dtype]


OVERWRITING = (aten.copy_, aten._foreach_copy_, aten.fill_, aten.zero_)  # do not read what they write to
WITHOUT_KERNEL = ("aten::empty", "aten::new_empty", "aten::promote_types", "aten::lift_fresh", "prim::", "profiler::")


def operator_work(operator, arguments: tuple[tuple, dict], result) -> Work:
    """Return the work of one operator of plain torch."""
    if operator.is_view or operator.name().startswith(WITHOUT_KERNEL):
        return Work()
    args, kwargs = arguments
    packet = operator._overloadpacket
    if packet in flop_registry:
        flops, seconds = _flops(operator, arguments, result)
        forward, backward = packet is aten.convolution, packet is aten.convolution_backward
        biased = forward and args[2] is not None
        return Work(
            conv_forward=int(forward),
            conv_backward=int(backward),
            other_operators=int(not forward and not backward),
            nodes=sum(args[-1][:2]) if backward else 1 + biased,
            bytes=2 * result.nbytes if biased else 0,
            flops=flops,
            seconds_at_ceiling=seconds,
        )
    schema = operator._schema.arguments
    values = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    written = [value for argument, value in values if argument.alias_info and argument.alias_info.is_write]
    unread = written if packet in OVERWRITING else []
    read = [value for _, value in values if not any(value is other for other in unread)]
    moved = _bytes(read) + _bytes(written if operator._schema.is_mutable else result)
    return Work(other_operators=1, nodes=1, bytes=moved)


def _bytes(values) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def total(parts: Parts) -> Work:
    return sum((part.work * part.calls for part in parts.values()), Work())


def predict(work: Work, image_size: int, captured: bool) -> dict[str, str]:
    """Return predicted milliseconds of a step, by the formula at the top of the module."""
    share = CONV_SHARE[32 if image_size <= 32 else 64]
    convolutions, passes, gaps = work.seconds_at_ceiling / share, work.bytes / BANDWIDTH, work.nodes * GAP
    host = 0.0 if captured else work.nodes * HOST
    seconds = max(convolutions + passes + gaps, host)
    return {
        "nodes": str(work.nodes),
        "tflop": f"{work.flops / 1e12:.2f}",
        "gigabytes": f"{work.bytes / 1e9:.2f}",
        "convolutions_ms": f"{1e3 * convolutions:.2f}",
        "passes_ms": f"{1e3 * passes:.2f}",
        "gaps_ms": f"{1e3 * gaps:.2f}",
        "host_ms": f"{1e3 * host:.2f}",
        "predicted_ms": f"{1e3 * seconds:.1f}",
        "share_of_matmul": f"{work.flops / CEILING[torch.bfloat16] / seconds:.2f}",
    }


def counts(name: str, calls: int, work: Work) -> dict[str, str]:
    return {
        "part": name,
        "calls": str(calls),
        "triton_launches": str(work.triton_launches),
        "small_launches": str(work.small_launches),
        "conv_forward": str(work.conv_forward),
        "conv_backward": str(work.conv_backward),
        "other_operators": str(work.other_operators),
        "megabytes": f"{work.bytes / 1e6:.1f}",
        "gflop": f"{work.flops / 1e9:.1f}",
        "passes_us": f"{1e6 * work.bytes / BANDWIDTH:.1f}",
    }


def measure(problem: Problem, pulled: list[str], rows: list[str]) -> tuple[list[dict], list[dict]]:
    """Return the rows of both tables."""
    builds, recorded = ladder(problem), {}
    # Nothing can be captured here, but a captured step does the same work as a compiled one.
    source = {name: LAST_LEVER if name == GRAPH else name for name in rows}
    with levers.pulled(pulled), fake_device() as device:
        for name in dict.fromkeys(source.values()):
            print(f"recording {name}", flush=True)
            recorded[name] = record(builds[name], device)
    table = []
    for row in [row for row in COUNTED_ROWS if row in recorded]:
        parts = [counts(name, part.calls, part.work) for name, part in recorded[row].items()]
        parts.append(counts("whole step", 1, total(recorded[row])))
        table += [{"variant": row} | part for part in parts]
    predictions = [
        {"variant": name} | predict(total(recorded[source[name]]), problem.image_size, name == GRAPH) for name in rows
    ]
    return table, predictions


def show(title: str, rows: list[dict[str, str]]) -> None:
    table = Table(title=title)
    for i, column in enumerate(rows[0]):
        table.add_column(column.replace("_", " "), justify="right" if i else "left")
    for row in rows:
        table.add_row(*row.values())
    Console(width=160).print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_problem_flags(parser)
    parser.add_argument("--method", choices=["ltat", "at-bsl"], default="ltat")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument(
        "--rows", nargs="+", choices=PREDICTED_ROWS, default=PREDICTED_ROWS, help="rows of bench.step to predict"
    )
    parser.add_argument("--out", type=Path, help="CSV to append to, default bench/results/codegen-sm90.csv")
    levers.add_flags(parser)
    args = parser.parse_args(argv)
    if not built_with_cuda():
        print(f"bench.codegen needs torch built with CUDA, but {torch.__version__} is a CPU build.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    pulled = levers.chosen(args)
    problem = Problem(torch.device("cuda"), args.arch, args.image_size, args.batch_size, args.method, args.attack_steps)
    table, predictions = measure(problem, pulled, args.rows)

    import triton

    source = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "git": common.git_hash(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "arch": args.arch,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "method": args.method,
        "attack_steps": args.attack_steps,
        "levers": " ".join(pulled),
    }
    out = args.out or Path(__file__).parent / "results" / "codegen-sm90.csv"
    title = f"{args.arch} at {args.image_size}x{args.image_size}, batch {args.batch_size}, {args.method}"
    for suffix, name, rows in (("", "work of a step", table), ("-predicted", "prediction for an H200", predictions)):
        if rows:
            show(f"{title}: {name}", rows)
            path = out.with_name(f"{out.stem}{suffix}{out.suffix}")
            common.append_csv(path, [source | row for row in rows])
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
