"""Tests of csrc/cuda without a GPU.

The kernels compile for sm_80 and sm_90 without spills or float64. The C++ around them compiles against torch's headers.
An emulation of thread blocks runs the kernels on the CPU; their results equal those of plain torch.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths

from helpers.op_cases import LOSS, gradient_tolerance, normal
from ltat_fast.ops import igdm_loss_ref

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc/cuda/igdm.cu"
NVCC = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
CXX = shutil.which(os.environ.get("CXX", "g++"))
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc: the CUDA kernel of igdm_loss was NOT compiled")
needs_cxx = pytest.mark.skipif(not CXX, reason="no C++ compiler")


def run(*command):
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@needs_nvcc
def test_kernels_compile_without_spills_or_float64(tmp_path):
    archs = [80, 90]
    flags = ["-std=c++17", "-O3", *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs), "-Xptxas=-v"]
    report = run(NVCC, *flags, "--keep", f"--keep-dir={tmp_path}", "-c", SOURCE, "-o", tmp_path / "igdm.o")
    kernels = report.count("Compiling entry function")
    assert kernels == len(archs) * (5 * 3 * 2 + 1)  # row lengths, dtypes, directions, and the sum over rows
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == kernels
    for arch in archs:
        ptx = next(tmp_path.glob(f"*compute_{arch}*.ptx")).read_text()
        assert "__nv_bfloat16" in ptx
        assert not re.findall(r"^\s*\w[\w.]*\.f64", ptx, re.MULTILINE)  # an instruction, not the name of a register


@needs_cxx
@needs_nvcc
def test_the_cpp_side_compiles(tmp_path):
    toolkits = [Path(CUDA_HOME or "/usr/local/cuda"), Path(NVCC).resolve().parents[1], Path("/usr/local/cuda")]
    cuda = next((root / "include" for root in toolkits if (root / "include/cuda_runtime.h").is_file()), None)
    if cuda is None:
        pytest.skip("the CUDA headers were not found")
    includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"], cuda]]
    # a CPU-only torch has these headers, but not the one that the CUDA build of torch generates
    flags = ["-std=c++20", "-fsyntax-only", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    run(CXX, *flags, *includes, ROOT / "csrc/igdm_cuda.cpp")


ENTRY_POINTS = """
extern "C" void forward(void* const* logits, void* loss, int64_t rows, int64_t classes, int divergence, int dtype) {
  ltat::Igdm args{logits[0], logits[1], logits[2], logits[3], loss, {}, nullptr, nullptr, rows, classes,
                  ltat::Divergence(divergence), ltat::Dtype(dtype)};
  ltat::igdm_forward_rows_cuda(args, nullptr);
}
extern "C" void backward(void* const* logits, void* grad_loss, int64_t stride, double scale, void* plus, void* minus,
                         int64_t rows, int64_t classes, int divergence, int dtype) {
  ltat::Igdm args{logits[0], logits[1], logits[2], logits[3], nullptr, {grad_loss, stride, scale}, plus, minus, rows,
                  classes, ltat::Divergence(divergence), ltat::Dtype(dtype)};
  ltat::igdm_backward_rows_cuda(args, nullptr);
}
extern "C" void sum(const float* losses, int64_t rows, float scale, float* result) {
  ltat::sum_rows_cuda(losses, rows, scale, result, nullptr);
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Return a library that runs the kernels of igdm.cu on the CPU."""
    if not CXX:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    source = re.sub(r"(\w+(?:<[^<>]*>)?)<<<(.+?), 0, stream>>>\((.*?)\);", r"emulation::launch(\2, [=] { \1(\3); });",
                    SOURCE.read_text())  # fmt: skip
    source = re.sub(r"#include <cuda.*>\n", "", source).replace('"igdm.h"', f'"{SOURCE.parent}/igdm.h"')
    assert source.count("emulation::launch") == 6
    header = folder / "cuda_runtime_api.h"
    header.write_text(f'#include "{Path(__file__).parent}/cuda_emulation.h"\n')
    program = folder / "igdm.cpp"
    program.write_text(f"#include <cuda_runtime_api.h>\n{source}\n{ENTRY_POINTS}")
    library = folder / "igdm.so"
    run(CXX, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{folder}", program, "-o", library)
    return ctypes.CDLL(str(library))


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


# each row length of the kernel, with and without a remainder; a block with fewer rows than warps
SHAPES = [(1, 1), (5, 10), (4, 32), (6, 100), (3, 128), (5, 200), (2, 1000), (1, 1024), (2, 1271), (1, 4099)]
NUMBER = {"kl": 0, "l1": 1, "l2": 2, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.mark.parametrize("divergence", ["kl", "l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_kernels(emulated, shape, dtype, divergence):
    rows, classes = shape
    logits = [normal(rows, classes, dtype=dtype, seed=seed, scale=2) for seed in range(4)]
    if classes > 2:
        logits[0][0, 1] = logits[2][0, 1] = -float("inf")  # a class that student and teacher exclude
        logits[2][-1, 0] = -float("inf")  # a class that only the teacher excludes
    student = [t.double().requires_grad_() for t in logits[:2]]
    expected = igdm_loss_ref(*student, logits[2].double(), logits[3].double(), divergence=divergence, reduction="none")
    numbers = (ctypes.c_int64(rows), ctypes.c_int64(classes), NUMBER[divergence], NUMBER[dtype])

    loss = torch.full((rows,), -1.0)
    emulated.forward(pointers(*logits), ctypes.c_void_p(loss.data_ptr()), *numbers)
    torch.testing.assert_close(loss.double(), expected.detach(), equal_nan=True, **LOSS)

    for stride, scale in ((1, 1.0), (0, 1 / rows)):  # "none" and "mean"
        upstream = normal(rows, seed=9)
        plus, minus = torch.full_like(logits[0], 7.0), torch.full_like(logits[0], 7.0)
        emulated.backward(
            pointers(*logits), ctypes.c_void_p(upstream.data_ptr()), ctypes.c_int64(stride), ctypes.c_double(scale),
            ctypes.c_void_p(plus.data_ptr()), ctypes.c_void_p(minus.data_ptr()), *numbers,
        )  # fmt: skip
        reaching = upstream if stride else (upstream[0] * scale).expand(rows)
        for actual, exact in zip(
            (plus, minus), torch.autograd.grad(expected, student, reaching.double(), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(actual.double(), exact, equal_nan=True, **gradient_tolerance(dtype))


@pytest.mark.parametrize("rows", [0, 1, 31, 512, 5000])
def test_emulated_sum(emulated, rows):
    losses, result = normal(rows, seed=1), torch.zeros(())
    emulated.sum(
        ctypes.c_void_p(losses.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_float(0.5),
        ctypes.c_void_p(result.data_ptr()),
    )
    torch.testing.assert_close(result, losses.sum() * 0.5, rtol=1e-5, atol=1e-4)
