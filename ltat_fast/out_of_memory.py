"""Out of memory, on the device or on the host, as one sentence that says what to change."""

import contextlib
import errno
import re
from collections.abc import Iterator

import torch

from ltat_fast.errors import UserError

# What the libraries below torch say. Most of their errors have no type of their own.
_GPU = ("CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_GPU += ("CUSOLVER_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory", "Cuda failure 'out of memory'")
_HOST = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")
_ONEDNN = ("could not create a primitive", "could not execute a primitive", "could not create a memory")
_ASKED = re.compile(r"[Tt]ried to allocate (?P<size>[\d.]+) ?(?P<unit>[KMGT]iB|bytes)")


class OutOfMemory(UserError):
    """Memory ran out. flags: flags of ``train`` with which ``--resume`` can continue the run, if there are such."""

    def __init__(self, message: str, flags: str = ""):
        super().__init__(message)
        self.flags = flags


def exhausted(error: BaseException | None) -> str | None:
    """Return "the GPU ran out of memory" or "the host ran out of memory", or None if ``error`` says no such thing.

    The error may be in the chain of causes: compilers wrap the errors of what they run.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or _says(error, text, _GPU):
            return f"the GPU ran out of memory{_asked(text)}"
        no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if isinstance(error, MemoryError) or no_memory or _says(error, text, _HOST):
            return f"the host ran out of memory{_asked(text)}"
        if isinstance(error, RuntimeError) and text in _ONEDNN:  # it says so for lack of memory, and hardly ever else
            return f"the host ran out of memory, it seems (oneDNN: {text})"
        error = error.__cause__ or error.__context__
    return None


def _says(error: BaseException, text: str, phrases: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in phrases)


def _asked(text: str) -> str:
    """Return the size of the allocation that failed, if ``text`` has it."""
    if not (found := _ASKED.search(text)):
        return ""
    size, unit = float(found["size"]), found["unit"]
    if unit == "bytes":
        size, unit = size / 2**20, "MiB"
    return f" (it had no room for {size:.2f} {unit} more)"


@contextlib.contextmanager
def explained(advice: str, flags: str = "") -> Iterator[None]:
    """Raise :class:`OutOfMemory` with ``advice``, what to change, for an error of memory inside a ``with`` block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (what := exhausted(error)) is None:
            raise
        raise OutOfMemory(f"{what}: {advice}", flags) from error
