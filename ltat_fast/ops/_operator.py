"""A registered operator ``ltat::<name>``: one schema, a kernel for each device, a shortcut past the dispatcher.

The dispatcher brings torch.compile, torch.export, dispatch modes and tensor subclasses, and costs tens of
microseconds a call once autograd is registered from Python: more than the loss kernels take. So an eager call on plain
tensors goes straight to the kernel, and every other call through ``torch.ops.ltat``. Both run the same kernel.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ltat_fast import _ext

try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack, _len_torch_function_stack
except ImportError:  # private names, gone in some future torch: take no shortcut there

    def _are_functorch_transforms_active() -> bool:
        return False

    def _len_torch_dispatch_stack() -> int:
        return 1

    _len_torch_function_stack = _len_torch_dispatch_stack

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), float, int, str}
_LIBRARY = torch.library.Library("ltat", "FRAGMENT")


class Operator:
    """``ltat::<name>``, callable. ``kernels`` maps a device type to the function that runs on it."""

    def __init__(self, schema: str, *, fake: Callable, cuda: Callable | None):
        """
        schema: the text that csrc/ gives to TORCH_LIBRARY; defined here instead where the extension is absent.
        fake: allocates outputs of the true shapes, dtypes and strides.
        cuda: the CUDA kernel; None where csrc/ registers it or there is none.
        """
        name = schema[: schema.index("(")]
        self.schema = f"ltat::{schema}"
        self.kernels = {}
        self.autograd = getattr(_ext.C, f"{name}_autograd", None)
        if _ext.HAS_EXT:
            self.kernels["cpu"] = getattr(_ext.C, name)
            if hasattr(_ext.C, f"{name}_cuda"):
                self.kernels["cuda"] = getattr(_ext.C, f"{name}_cuda")
        else:
            _LIBRARY.define(schema)
        if cuda is not None:
            self.kernels["cuda"] = cuda
            torch.library.impl(f"ltat::{name}", "CUDA", cuda, lib=_LIBRARY)
        torch.library.register_fake(f"ltat::{name}", fake, lib=_LIBRARY)
        self.dispatched = getattr(torch.ops.ltat, name).default

    def runs_on(self, tensor: Tensor) -> bool:
        """Whether a kernel takes this call. If not, plain torch does: float64 on CUDA, torch.func, forward-mode AD."""
        device = tensor.device.type
        return (
            device in self.kernels
            and (device == "cpu" or tensor.dtype != torch.float64)
            and not _are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )

    def __call__(self, *args):
        if is_plain_call(*args):
            if not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)):
                return self.kernels[args[0].device.type](*args)
            if self.autograd is not None:
                return self.autograd(*args)
        return self.dispatched(*args)


def is_plain_call(*args) -> bool:
    """Whether nothing but the kernel has to see this call: eager, ordinary tensors, no mode active."""
    return not (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or torch.jit.is_tracing()
        or not _PLAIN_TYPES.issuperset(map(type, args))
    )


def no_double_backward(name: str) -> Callable:
    """The autograd formula of a backward operator: a clear error."""

    def raise_error(ctx, *grads):
        raise RuntimeError(f"{name} cannot be differentiated twice; use {name}_ref, which can")

    return raise_error


def triton_why_not() -> str:
    """Why no Triton kernel can run here, or ''."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if find_spec("ltat_fast.kernels") is None:
        return "ltat_fast.kernels is not installed: pip install, rather than a path on PYTHONPATH, puts it there"
    return ""


def check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}")


def check_float(name: str, tensor: Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_logits(name: str, logits: Tensor) -> None:
    check_float(name, logits)
    if logits.dim() != 2:
        raise ValueError(f"{name} must have shape (B, C), got {tuple(logits.shape)}")
    if logits.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {tuple(logits.shape)}")


def check_like(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """``tensor`` must be floating point and have the shape and device of ``reference``."""
    check_float(name, tensor)
    if tensor.shape != reference.shape:
        shape, expected = tuple(tensor.shape), tuple(reference.shape)
        raise ValueError(f"{name} has shape {shape}, but {reference_name} has shape {expected}")
    if tensor.device != reference.device:
        raise ValueError(f"{name} is on {tensor.device}, but {reference_name} is on {reference.device}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
