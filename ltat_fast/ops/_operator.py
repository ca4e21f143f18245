"""A registered operator ``ltat::<name>``: one schema, one kernel per device, and a direct call for eager code.

The dispatcher supports torch.compile, torch.export, dispatch modes and tensor subclasses. It also costs tens of
microseconds per call when autograd is registered from Python, which is more than the loss kernels take. So an eager
call on plain tensors calls the kernel directly. Every other call goes through ``torch.ops.ltat``. Both run the same
kernel.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ltat_fast import _ext

try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack, _len_torch_function_stack
except ImportError:  # private names, which a future torch may drop: then no call is direct

    def _are_functorch_transforms_active() -> bool:
        return False

    def _len_torch_dispatch_stack() -> int:
        return 1

    _len_torch_function_stack = _len_torch_dispatch_stack

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), float, int, str}
_LIBRARY = torch.library.Library("ltat", "FRAGMENT")
OPERATORS: list["Operator"] = []  # every operator, in order of definition


class Operator:
    """A callable operator ``ltat::<name>``.

    ``kernels`` maps a device type to the function that runs there. The functions come from the C++ extension, if it is
    loaded, and from Triton, if it can run here.
    """

    def __init__(self, schema: str, *, fake: Callable, triton: Callable | None = None, public: str | None = None):
        """
        schema: name, arguments and results. torch raises RuntimeError if a C++ function of the extension does not fit.
        fake: allocates outputs with the true shapes, dtypes and strides.
        triton: CUDA function, if the kernel is written in Triton.
        public: name of the public function that calls this operator. ``backend_info`` lists it.
        """
        name = schema[: schema.index("(")]
        self.schema = f"ltat::{schema}"
        self.public = public
        self.triton = triton
        self.kernels = {}
        for device in ("cpu", "cuda"):
            if (kernel := getattr(_ext.C, f"{name}_{device}", None)) is not None:
                self.kernels[device] = kernel
        self.autograd = getattr(_ext.C, f"{name}_autograd", None)
        _LIBRARY.define(schema)
        if triton is not None and not triton_why_not():
            self.kernels["cuda"] = triton
            torch.library.impl(f"ltat::{name}", "CUDA", triton, lib=_LIBRARY)
        torch.library.register_fake(f"ltat::{name}", fake, lib=_LIBRARY)
        self.dispatched = getattr(torch.ops.ltat, name).default
        OPERATORS.append(self)

    def runs_on(self, tensor: Tensor) -> bool:
        """Return whether a kernel runs this call. If not (float64 on CUDA, torch.func, forward AD), run plain torch."""
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
    """Return whether the kernel may be called directly: eager mode, ordinary tensors, no dispatch mode active."""
    return not (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or torch.jit.is_tracing()
        or not _PLAIN_TYPES.issuperset(map(type, args))
    )


def no_double_backward(name: str) -> Callable:
    """Return the autograd formula of a backward operator, which raises a clear error."""

    def raise_error(ctx, *grads):
        raise RuntimeError(f"{name} cannot be differentiated twice; use {name}_ref, which can")

    return raise_error


def triton_why_not() -> str:
    """Return the reason why no Triton kernel can run here, or ''."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if find_spec("ltat_fast.kernels") is None:
        return "ltat_fast.kernels is not installed: run pip install instead of setting PYTHONPATH"
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
    """Raise unless ``tensor`` is floating point and has the shape and device of ``reference``."""
    check_float(name, tensor)
    if tensor.shape != reference.shape:
        shape, expected = tuple(tensor.shape), tuple(reference.shape)
        raise ValueError(f"{name} has shape {shape}, but {reference_name} has shape {expected}")
    if tensor.device != reference.device:
        raise ValueError(f"{name} is on {tensor.device}, but {reference_name} is on {reference.device}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
