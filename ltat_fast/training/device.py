"""Choice of device and precision. A run decides both once and prints them at start-up."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ltat_fast.errors import UserError
from ltat_fast.models.precision import has_bf16


@dataclass(frozen=True)
class Hardware:
    """Where a run computes and in which precision.

    dtype: dtype of the forward passes in training. why: the reason for this choice, printed at start-up.
    """

    device: torch.device
    dtype: torch.dtype
    why: str


@contextlib.contextmanager
def without_cudnn_search() -> Iterator[None]:
    """Let cuDNN choose its algorithms without trying them, inside a ``with`` block.

    The search is worth its time for the many equal batches of training. It costs minutes if batch sizes vary:
    AutoAttack's batches shrink, and cuDNN would search again for every new size.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def choose(device: str = "auto", precision: str = "auto") -> Hardware:
    """Resolve ``--device`` and ``--precision``. Raise UserError if "cuda" is requested and no GPU is usable."""
    if device == "cuda" and not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no usable GPU or driver"
        raise UserError(
            f"--device cuda: no CUDA device ({reason}); use --device cpu, or run python -m ltat_fast.doctor for details"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    in_hardware = has_bf16(torch.device(device))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    if precision == "auto":
        dtype = torch.bfloat16 if in_hardware else torch.float32
        why = f"{name}, {'bf16 in hardware' if in_hardware else 'no bf16 in hardware'}"
    else:
        dtype, why = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], f"{name}, as requested"
        if dtype == torch.bfloat16 and not in_hardware:
            why += ", slow: no bf16 in hardware"
    return Hardware(torch.device(device), dtype, why)


def make_deterministic() -> None:
    """Select deterministic CUDA kernels. On a CPU, runs with the same number of threads are always deterministic."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
