"""Which precision the hardware computes fast, and how to forbid TF32."""

import contextlib
from collections.abc import Iterator

import torch


def has_bf16(device: torch.device) -> bool:
    """Return whether ``device`` has bfloat16 in hardware. Emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Return whether this CPU has bfloat16 in hardware (AVX512-bf16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 for float32 convolutions and matrix products on a GPU, inside a ``with`` block."""
    switches = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, was_allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = was_allowed


def without_tf32() -> contextlib.AbstractContextManager[None]:
    """Forbid TF32 inside a ``with`` block. By default, torch uses it, with its 10 bits of mantissa, in convolutions."""
    return tf32(False)
