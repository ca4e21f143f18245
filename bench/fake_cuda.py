"""Fake CUDA tensors without a GPU, complete enough for Inductor to write the code of an H200.

    with fake_device() as device:        # needs torch built with CUDA, no GPU and no driver
        step = ...                       # ordinary code for torch.device("cuda")
        with device.observing(print):    # or any function of (operator, arguments, result)
            step(x, y)                   # no kernel runs; each operator returns a tensor of the right shape and layout

:class:`~torch._subclasses.fake_tensor.FakeTensorMode` does most of the work. This file holds everything else: each
patch of torch and triton below answers one question that only a driver could answer, and says which code asks it.
Tried with torch 2.11 and triton 3.6. On a CPU build of torch, ``fake_device()`` gives fake CPU tensors.

Where the answers differ from those of a real H200: :data:`INDUCTOR_WITHOUT_GPU`.
"""

import contextlib
import ctypes
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=143771 << 20,
    L2_cache_size=60 << 20,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
    is_integrated=0,
)

INDUCTOR_WITHOUT_GPU = {
    # Folds constants by computing them on the device. Few kernels read one: an addition of 0 may remain.
    "joint_graph_constant_folding": False,
    # Decides by timing whether to pad a matrix product. Here that is only the classifier.
    "shape_padding": False,
    # Compiled code must be written anew, and code that never ran must not be cached.
    "fx_graph_cache": False,
    # No worker processes: nothing is compiled to machine code.
    "compile_threads": 1,
}


def built_with_cuda() -> bool:
    return torch.version.cuda is not None


class FakeDevice(FakeTensorMode):
    """Fake tensors that count operators and refuse to be read.

    device: the device to build networks and batches on.
    """

    def __init__(self, device: torch.device):
        super().__init__(allow_fallback_kernels=False)
        self.device = device
        self._observer: Callable | None = None
        self._inside = False  # of an operator, which FakeTensorMode may run as several others

    @contextlib.contextmanager
    def observing(self, observer: Callable) -> Iterator[None]:
        """While open, call ``observer(operator, (args, kwargs), result)`` for every operator, and refuse reads.

        A read raises torch's DataDependentOutputException: on a real device the host would wait there.
        """
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and self._observer is None:
            return 0.0  # SGD compares a learning rate on the device with 0 when it is made
        outermost, self._inside = not self._inside, True
        try:
            if func._overloadpacket is aten._fused_sgd_:  # has no fake implementation; works in place
                result = None
            else:
                result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = not outermost
        if outermost and self._observer is not None:
            self._observer(func, (args, kwargs), result)
        return result


@contextlib.contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Fake CUDA tensors if torch was built with CUDA, else fake CPU tensors. Inductor can compile for the former.

    On a machine with a GPU its own driver answers, and Inductor writes code for that GPU.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _replace_tensors))
        if built_with_cuda() and not torch.cuda.is_available():
            stack.enter_context(_no_cuda_context())
            for target, name, answer in _answers_of_a_driver():
                stack.enter_context(mock.patch.object(target, name, answer))
        mode = FakeDevice(torch.device("cuda", 0) if built_with_cuda() else torch.device("cpu"))
        yield stack.enter_context(mode)


def _replace_tensors(module: nn.Module, convert: Callable, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` with new parameters: torch swaps fake ones in place, which fails while weakly referenced."""
    for child in module.children() if recurse else ():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(convert(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


class _CpuGenerator(torch.Generator):
    """A generator for whatever device: one for CUDA needs a driver, and fake tensors draw nothing."""

    def __new__(cls, device=None):
        return super().__new__(cls)


class _TritonDriver:
    """The active driver of Triton, as far as Inductor asks it."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {
                "max_shared_mem": H200.shared_memory_per_block_optin,
                "multiprocessor_count": H200.multi_processor_count,
                "warpSize": H200.warp_size,
                "max_num_regs": H200.regs_per_multiprocessor,
            }

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size)

    def get_current_device(self):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def is_active(self):
        return True


def _answers_of_a_driver() -> Iterator[tuple[object, str, object]]:
    """(object, attribute, answer) of each patch."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.runtime import driver

    def always(value):
        return lambda *args, **kwargs: value

    capability = (H200.major, H200.minor)
    # FakeTensorMode: convert between devices without touching either; make no first tensor on the device.
    yield FakeTensorMode, "avoid_device_init", True
    yield fake_tensor, "init_gpu_context", always(None)
    # Layout of a convolution's result: torch asks the driver whether cuDNN takes bfloat16. Dense convolutions only.
    yield torch._C, "_select_conv_backend", always(torch._C._ConvBackend.Cudnn)
    # TrainStep: the generator of the start noise.
    yield torch, "Generator", _CpuGenerator
    # Dynamo and Inductor: which device is there. torch.accelerator is asked for its current stream, which there is not.
    yield torch.cuda, "is_available", always(True)
    yield torch.accelerator, "is_available", always(False)
    yield torch.cuda, "device_count", always(1)
    yield torch.cuda, "current_device", always(0)
    yield torch.cuda, "_exchange_device", always(0)
    yield torch.cuda, "_maybe_exchange_device", always(0)
    yield torch.cuda, "is_bf16_supported", always(True)
    yield torch.cuda, "get_device_capability", always(capability)
    yield torch.cuda, "get_device_properties", always(H200)
    yield CudaInterface, "is_available", staticmethod(always(True))
    yield CudaInterface, "get_compute_capability", staticmethod(always(10 * H200.major + H200.minor))
    yield CudaInterface, "get_device_properties", staticmethod(always(H200))
    yield CudaInterface.Worker, "get_device_properties", staticmethod(always(H200))
    yield CudaInterface, "raise_if_triton_unavailable", staticmethod(always(None))
    yield driver, "_active", _TritonDriver()
    # Dynamo and AOTAutograd: save and restore the random state around tracing.
    yield torch.cuda, "get_rng_state", torch.get_rng_state
    yield torch.cuda, "set_rng_state", always(None)


# Places in the virtual table of at::CUDAHooksInterface: its two destructors come first, then the functions in the order
# of ATen/detail/AcceleratorHooksInterface.h.
_IS_BUILT, _IS_AVAILABLE, _HAS_PRIMARY_CONTEXT = 2, 3, 4
_TABLE_SIZE = 100  # more than the class has; the rest is never called
_BEFORE_TABLE = 2  # offset to the top of the object, type information


@contextlib.contextmanager
def _no_cuda_context() -> Iterator[None]:
    """Let the autograd engine run on fake CUDA tensors.

    The engine asks at::CUDAHooks whether device 0 has a context, and that raises where there is no device. No Python
    name leads there, so this replaces the one entry in the object's virtual table by "no".
    """
    core = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get_hooks = core._ZN2at6detail12getCUDAHooksEv  # at::detail::getCUDAHooks()
    get_hooks.restype = ctypes.c_void_p
    hooks = get_hooks()
    table_of_hooks = ctypes.cast(hooks, ctypes.POINTER(ctypes.c_void_p))
    original = table_of_hooks[0]
    entries = ctypes.cast(original, ctypes.POINTER(ctypes.c_void_p))
    question = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    if (question(entries[_IS_BUILT])(hooks), question(entries[_IS_AVAILABLE])(hooks)) != (True, False):
        raise RuntimeError(f"torch {torch.__version__} has another layout of at::CUDAHooksInterface: adapt {__file__}")
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, device: False)
    table = (ctypes.c_void_p * (_BEFORE_TABLE + _TABLE_SIZE))(*entries[-_BEFORE_TABLE:_TABLE_SIZE])
    table[_BEFORE_TABLE + _HAS_PRIMARY_CONTEXT] = ctypes.cast(no, ctypes.c_void_p).value
    table_of_hooks[0] = ctypes.addressof(table) + _BEFORE_TABLE * ctypes.sizeof(ctypes.c_void_p)
    try:
        yield
    finally:
        table_of_hooks[0] = original
