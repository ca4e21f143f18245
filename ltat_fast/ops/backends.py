"""Which kernel each op runs on each device, and why where it is not the fused one."""

import importlib

import torch

from ltat_fast import _ext
from ltat_fast.ops._operator import triton_why_not

_TRITON_MODULES = {"pgd_init": "pgd", "pgd_step": "pgd", "balanced_softmax_kl": "balanced_softmax_kl"}


def backend_info() -> dict[str, dict[str, str]]:
    """``{op: {"cpu": ..., "cuda": ...}}`` with "c++", "triton" or "c++/cuda", or "torch (why)" for plain torch."""
    cpu = f"torch ({_ext.WHY_NOT})" if _ext.WHY_NOT else "c++"
    info = {op: {"cpu": cpu, "cuda": _triton_backend(module)} for op, module in _TRITON_MODULES.items()}
    return info | {"igdm_loss": {"cpu": cpu, "cuda": _igdm_cuda_backend()}}


def _triton_backend(module: str) -> str:
    if why_not := triton_why_not():
        return f"torch ({why_not})"
    if not torch.cuda.is_available():
        return "torch (no CUDA device)"
    try:
        importlib.import_module(f"ltat_fast.kernels.{module}")
    except ImportError as error:
        return f"broken (Triton is installed but does not import: {error})"
    return "triton"


def _igdm_cuda_backend() -> str:
    if torch.version.cuda is None:
        return "torch (this torch is a CPU build)"
    if not _ext.HAS_EXT:
        return f"torch ({_ext.WHY_NOT})"
    if _ext.C.build_info()["cuda"] is None:
        return "torch (the C++ extension was built without a CUDA toolkit)"
    if not torch.cuda.is_available():
        return "torch (no CUDA device)"
    return "c++/cuda"
