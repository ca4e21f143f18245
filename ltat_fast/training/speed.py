"""Speed of a run relative to its machine: operations of a training step, and the rate of a large matrix product."""

import functools
import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from ltat_fast.models.precision import tf32
from ltat_fast.training.device import without_cudnn_search
from ltat_fast.training.step import TrainStep

# Large enough to reach the highest rate, small enough to measure at every start: milliseconds on a GPU, less than a
# second on two cores.
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
COUNTED_IMAGES = 2  # per micro-batch; batch norm in train mode needs more than one


@register_flop_formula(
    [torch.ops.aten.cudnn_convolution_relu, torch.ops.aten.cudnn_convolution_add_relu, torch.ops.ltat.conv_relu]
)
def _conv_relu_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """Operations of a fused convolution (:mod:`ltat_fast.models.fused_conv`), which torch does not count."""
    return conv_flop_count(x_shape, weight_shape, out_shape)


class FlopCounter(TorchDispatchMode):
    """Count the operations of convolutions and matrix products with torch's formulas; a multiply-add counts as 2.

    torch's own FlopCounterMode also installs module hooks, which fail with autograd.grad.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_per_image(eager: TrainStep, x: Tensor, y: Tensor) -> float:
    """Return the operations of one training step per image. The counted step changes nothing.

    eager: a step on the eager backend, because a compiled step hides its operators. x, y: a batch.
    """
    counted = COUNTED_IMAGES * eager.accumulate
    x, y = x[:counted], y[:counted]
    with without_cudnn_search():  # no later batch has this size
        with FlopCounter() as counter:
            eager.trial(x, y)
        with FlopCounter() as extra:  # a trial runs the attack a second time, to return its result
            eager.perturb(x, y)
    return (counter.total - extra.total) / len(x)


@functools.cache  # teacher and student have the same machine
def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Return the operations per second of a large square matrix product, the fastest of ``repeats``.

    float32 products use TF32 if convolutions do.
    """
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    with tf32(torch.backends.cudnn.allow_tf32):
        for _ in range(repeats + 1):
            _synchronize(device)
            started = time.perf_counter()
            torch.mm(a, b)
            _synchronize(device)
            best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
