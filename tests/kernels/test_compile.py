"""Compile every kernel for sm_80 and sm_90 without a GPU, as its launcher would, and check the machine code.

The launchers run on CPU tensors, with ``run`` of the kernels replaced by a recorder. So the types, alignments and
constants that are compiled here are those of a real launch.
"""

import os
import re
import subprocess
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted process cannot compile"
)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from helpers.op_cases import LIMITS, pgd_limits  # noqa: E402
from ltat_fast.kernels import balanced_softmax_kl, pgd  # noqa: E402

CAPABILITIES = [80, 90]
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
MAX_REGISTERS = 64  # per thread; so at least half of the thread slots of an SM can be used


class Code:
    """The compiled code of one launch."""

    def __init__(self, kernel, args, capability, scalar="fp32", **options):
        signature, constants, attributes = {}, {}, {}
        for i, (param, value) in enumerate(zip(kernel.params, args, strict=True)):
            aligned = None
            if param.is_constexpr or (type(value) is int and value == 1):
                signature[param.name], constants[i,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[param.name], aligned = "*" + TYPES[value.dtype], value.data_ptr()
            elif isinstance(value, float):
                signature[param.name] = scalar
            else:
                signature[param.name], aligned = "i64" if value >= 2**31 else "i32", value
            if aligned is not None and aligned % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        self.ptx, self.cubin = compiled.asm["ptx"], compiled.asm["cubin"]
        self.accesses = Counter(re.findall(r"\b(?:ld|st)\.(?:global|local)\S*", self.ptx))

    def count(self, op):
        """Return the number of 128-bit global accesses of the kind ``op``: "ld" or "st"."""
        return sum(n for name, n in self.accesses.items() if re.match(rf"{op}\.global\S*(v4\.b32|v2\.b64)$", name))

    def resources(self, tmp_path):
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(self.cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def launches(monkeypatch, module, launch):
    """Return [(kernel, args, options)] of the Triton launches that ``launch()`` makes."""
    recorded = []
    for kernel in vars(module).values():
        if isinstance(kernel, triton.JITFunction):

            def record(*args, grid, warmup, kernel=kernel, **options):
                recorded.append((kernel, args, options))

            monkeypatch.setattr(kernel, "run", record)
    launch()
    return recorded


def check_lean(code, tmp_path):
    usage = code.resources(tmp_path)
    print(f"{usage}, {dict(code.accesses)}")
    assert usage["STACK"] == 0, f"spills: {usage}"
    assert usage["LOCAL"] == 0, f"spills: {usage}"
    assert usage["REG"] <= MAX_REGISTERS, usage
    assert ".f64" not in code.ptx


def step(dtype, grad_dtype, n):
    # Expanded from one element: the launchers use only numel and data_ptr.
    state, grad = torch.empty(1, dtype=dtype).expand(n), torch.empty(1, dtype=grad_dtype).expand(n)
    return lambda: pgd.launch_step(state, grad, state, state, 2 / 255, 8 / 255, 0.0, 1.0)


def limited(shape, layout, name):
    """The launches of both kernels for images of this shape, with limits of this shape (helpers.op_cases)."""
    x, seed = torch.empty(shape).contiguous(memory_format=layout), torch.zeros(1, dtype=torch.int64)
    limits = pgd_limits(name, shape)
    return (
        lambda: pgd.launch_step(x, x, x, x, *limits),
        lambda: pgd.launch_init(x, x, seed, *limits[1:], "uniform"),
    )


def init(dtype, noise, n):
    x, seed = torch.empty(1, dtype=dtype).expand(n), torch.zeros(1, dtype=torch.int64)
    return lambda: pgd.launch_init(x, x, seed, 8 / 255, 0.0, 1.0, noise)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("n", [128 * 3 * 32 * 32, 2**31 + 16], ids=["int32", "int64"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step(monkeypatch, tmp_path, dtype, grad_dtype, n, capability):
    [(kernel, args, options)] = launches(monkeypatch, pgd, step(dtype, grad_dtype, n))
    code = Code(kernel, args, capability, **options)
    check_lean(code, tmp_path)
    per_thread = pgd.BLOCK // (32 * pgd.NUM_WARPS)
    assert code.count("ld") == per_thread * (2 * dtype.itemsize + grad_dtype.itemsize) // 16
    assert code.count("st") == per_thread * dtype.itemsize // 16
    assert sum(code.accesses.values()) == code.count("ld") + code.count("st"), code.accesses
    # The interpreter cannot show this: NaN survives the projection, and bf16 rounds to nearest.
    assert {"min.NaN.f32", "max.NaN.f32"} == set(re.findall(r"\b(?:min|max)\S*f32\b", code.ptx))
    assert dtype != torch.bfloat16 or "cvt.rn.bf16" in code.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_init(monkeypatch, tmp_path, dtype, noise, capability):
    [(kernel, args, options)] = launches(monkeypatch, pgd, init(dtype, noise, 128 * 3 * 32 * 32))
    code = Code(kernel, args, capability, **options)
    check_lean(code, tmp_path)
    vectors = pgd.BLOCK // (32 * pgd.NUM_WARPS) * dtype.itemsize // 16
    assert code.count("ld") == code.count("st") == vectors
    assert sum(code.accesses.values()) == 2 * vectors + 1, code.accesses  # and the seed


@pytest.mark.parametrize("name", ["per image", "per channel", "mixed"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [32, 28])
def test_limits(monkeypatch, tmp_path, size, layout, name):
    """The images are read and written as without tensors. A limit that a whole block shares is read once."""
    per_thread = pgd.BLOCK // (32 * pgd.NUM_WARPS)
    for launch, tensors in zip(limited((128, 3, size, size), layout, name), (3, 1), strict=True):
        [(kernel, args, options)] = launches(monkeypatch, pgd, launch)
        code = Code(kernel, args, 90, **options)
        check_lean(code, tmp_path)
        vectors = per_thread * 4 // 16
        assert code.count("ld") == tensors * vectors
        assert code.count("st") == vectors
        kinds = [kind for kind in LIMITS[name][0 if tensors == 3 else 1 :] if kind]
        blocks_share = size == 32 and layout == torch.contiguous_format
        single = {"one": True, "image": size == 32, "channel": blocks_share, "both": blocks_share}
        scalars = sum(1 if single[kind] else per_thread for kind in kinds) + (tensors == 1)  # and the seed
        assert sum(code.accesses.values()) == (tensors + 1) * vectors + scalars, code.accesses


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_another_batch_size_compiles_no_other_kernel(monkeypatch, layout):
    def constants(images, launch):
        [(kernel, args, _)] = launches(monkeypatch, pgd, limited((images, 3, 28, 28), layout, "mixed")[launch])
        return [value for param, value in zip(kernel.params, args, strict=True) if param.is_constexpr]

    for launch in (0, 1):
        assert constants(128, launch) == constants(80, launch)


@pytest.mark.parametrize("n", [1, 7, 1271, 2**31 + 7])
def test_odd_sizes_compile(monkeypatch, tmp_path, n):
    for module_launch in (step(torch.float32, torch.bfloat16, n), init(torch.float32, "uniform", n)):
        [(kernel, args, options)] = launches(monkeypatch, pgd, module_launch)
        check_lean(Code(kernel, args, 90, **options), tmp_path)


def test_float64_scalars_are_only_converted(monkeypatch):
    """Inductor passes Python floats as fp64. The kernels may convert them, but must not compute in fp64."""
    [(kernel, args, options)] = launches(monkeypatch, pgd, step(torch.float32, torch.float32, 4096))
    code = Code(kernel, args, 90, scalar="fp64", **options)
    uses = {line.split()[0] for line in code.ptx.splitlines() if ".f64" in line}
    assert "cvt.rn.f32.f64" in uses
    assert not {use for use in uses if re.match(r"@?\w*\s*(add|sub|mul|fma|min|max|setp|div)\.", use)}


def test_integer_scalars_compile_no_other_kernel(monkeypatch):
    x, seed = torch.empty(64), torch.zeros(1, dtype=torch.int64)

    def launch():
        pgd.launch_step(x, x, x, x, 1, 1, 0, 1)
        pgd.launch_init(x, x, seed, 1, 0, 1, "uniform")

    recorded = launches(monkeypatch, pgd, launch)
    recorded += loss_launches(monkeypatch, 8, 16, torch.float32, True, settings=(1, 1, 1, "sum"))
    for kernel, args, _ in recorded:
        for param, value in zip(kernel.params, args, strict=True):
            assert type(value) is not int or param.is_constexpr or param.name in ("n", "B"), param.name


def loss_launches(monkeypatch, B, C, dtype, distilled, settings=(1.0, 0.5, 2.0, "mean")):
    logits = torch.empty(B, C, dtype=dtype)
    teacher = torch.empty_like(logits) if distilled else None
    labels, counts = torch.zeros(B, dtype=torch.int64), torch.ones(C)
    loss, stats = torch.empty(()), torch.empty(balanced_softmax_kl.stats_rows(teacher), B)

    def launch():
        balanced_softmax_kl.launch_forward(logits, labels, counts, teacher, loss, stats, *settings)
        balanced_softmax_kl.launch_backward(loss, logits, labels, counts, teacher, stats, logits, *settings)

    return launches(monkeypatch, balanced_softmax_kl, launch)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2), (128, 10), (128, 100), (128, 200), (1024, 1000), (16, 2000), (16, 10000)], ids=str
)
def test_loss(monkeypatch, tmp_path, shape, dtype, distilled, capability):
    forward, backward = loss_launches(monkeypatch, *shape, dtype, distilled)
    rows, columns, warps = balanced_softmax_kl.tile(shape[1])
    for (kernel, args, options), stores in ((forward, 0), (backward, 1)):
        code = Code(kernel, args, capability, **options)
        check_lean(code, tmp_path)
        if shape[1] * dtype.itemsize % 16 == 0:  # otherwise rows do not start at a multiple of 16 bytes
            vectors = rows * columns * dtype.itemsize // (16 * 32 * warps)
            assert code.count("ld") >= vectors * (2 if distilled else 1)
            assert code.count("st") == vectors * stores


def test_label_assertion_is_compiled_in_debug_mode_only(monkeypatch):
    (kernel, args, options), _ = loss_launches(monkeypatch, 128, 100, torch.float32, True)
    assert "__assertfail" in Code(kernel, args, 90, debug=True, **options).ptx
    assert "__assertfail" not in Code(kernel, args, 90, **options).ptx
