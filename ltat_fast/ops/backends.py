"""Which kernel each op runs on each device, and the reason if it runs plain torch."""

import importlib

import torch

from ltat_fast import _ext
from ltat_fast.ops._operator import OPERATORS, Operator, triton_why_not


def backend_info() -> dict[str, dict[str, str]]:
    """Return ``{op: {"cpu": backend, "cuda": backend}}``.

    A backend is "c++", "triton" or "c++/cuda", or "torch (reason)" if the op runs plain torch.
    """
    return {op.public: {"cpu": _cpu_backend(op), "cuda": _cuda_backend(op)} for op in OPERATORS if op.public}


def _cpu_backend(op: Operator) -> str:
    if "cpu" in op.kernels:
        return "c++"
    return f"torch ({_ext.WHY_NOT or f'the C++ extension does not have this op: rebuild with {_ext.INSTALL}'})"


def _cuda_backend(op: Operator) -> str:
    if op.triton is None:
        return _cpp_cuda_backend(op)
    if why_not := triton_why_not():
        return f"torch ({why_not})"
    if not torch.cuda.is_available():
        return "torch (no CUDA device)"
    try:
        importlib.import_module(op.triton.__module__.replace("ltat_fast.ops", "ltat_fast.kernels"))
    except ImportError as error:
        return f"broken (Triton is installed but does not import: {error})"
    return "triton"


def _cpp_cuda_backend(op: Operator) -> str:
    if torch.version.cuda is None:
        return "torch (this torch is a CPU build)"
    if not _ext.HAS_EXT:
        return f"torch ({_ext.WHY_NOT})"
    if "cuda" not in op.kernels:
        return "torch (the C++ extension was built without a CUDA toolkit)"
    if not torch.cuda.is_available():
        return "torch (no CUDA device)"
    return "c++/cuda"
