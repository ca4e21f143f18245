"""L-infinity PGD on the GPU: the random start and the ascent step, each in one pass over memory.

    start:  out = clamp(project(x + noise), lower, upper)                         reads one tensor, writes one
    step:   out = clamp(project(x_adv + step_size * sign(grad)), lower, upper)    reads three tensors, writes one
    project(v) = min(max(v, x - eps), x + eps)

Both kernels walk memory in storage order, so contiguous and channels_last tensors cost the same and are not copied. The
caller guarantees that all tensors of a call have the same dense layout. Arithmetic is fp32 for every dtype, with one
rounding at the end. sign(0) = sign(NaN) = 0, as in torch.sign. A NaN in x or x_adv stays NaN, as in torch.minimum and
torch.clamp.

step_size, eps, lower and upper are numbers, or pointers to values that differ between images or channels. Each
combination is a kernel of its own: one with numbers alone computes no index.
"""

import torch
import triton
import triton.language as tl

# 8 elements per thread: two 16-byte accesses for fp32, one for a half type. Enough loads are in flight without a loop.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _project(v, x, eps, lower, upper):
    """Project v on [x - eps, x + eps], then on [lower, upper]. NaN stays NaN."""
    v = tl.maximum(v, x - eps, propagate_nan=tl.PropagateNan.ALL)
    v = tl.minimum(v, x + eps, propagate_nan=tl.PropagateNan.ALL)
    v = tl.maximum(v, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, upper, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _index(start, last, STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the indices of the positions start ... start + last along a dimension. start is a multiple of BLOCK.

    Later positions of the block repeat the index of the last. All 64-bit arithmetic is scalar. If the whole block has
    one index, as for images of 3x32x32, the result is a scalar.
    """
    first = start // STRIDE
    if SIZE:
        first %= SIZE
    index = first.to(tl.int32)
    if STRIDE % BLOCK != 0:
        index += ((start % STRIDE).to(tl.int32) + tl.minimum(tl.arange(0, BLOCK), last)) // STRIDE
        if SIZE:
            index %= SIZE
    return index


@triton.jit
def _limit(limit, AXES: tl.constexpr, start, last, BLOCK: tl.constexpr):
    """Return a limit for the block at ``start`` in fp32: a number, or the values of its elements. AXES: see _axes."""
    if AXES is None:
        value = tl.cast(limit, tl.float32)  # a Python float is fp64 when Inductor, and not Triton, types the call
    else:
        for axis in tl.static_range(len(AXES)):
            limit += AXES[axis][0] * _index(start, last, AXES[axis][1], AXES[axis][2], BLOCK)
        value = tl.load(limit)
    return value


@triton.jit
def _normal_pair(u0, u1):
    """Return two independent N(0, 1) numbers from two U[0, 1) numbers, by the Box-Muller transform.

    tl.sin and tl.cos contain a path for huge angles that spills to local memory and uses fp64. Here v = pi (u1 - 1/2)
    is in [-pi/2, pi/2), where short Taylor series are exact to 1e-7. The double-angle formulas then give the full turn.
    """
    r = tl.sqrt(-2.0 * tl.log(tl.maximum(u0, 1e-7)))
    v = 3.141592653589793 * (u1 - 0.5)
    w = v * v
    sin = v * (1 + w * (-1 / 6 + w * (1 / 120 + w * (-1 / 5040 + w * (1 / 362880 - w / 39916800)))))
    cos = 1 + w * (-1 / 2 + w * (1 / 24 + w * (-1 / 720 + w * (1 / 40320 + w * (-1 / 3628800 + w / 479001600)))))
    return r * (sin * sin - cos * cos), -2 * r * sin * cos  # r cos(2 pi u1), r sin(2 pi u1)


@triton.jit
def _init_kernel(
    x_ptr,  # [n] natural images, storage order
    out_ptr,  # [n] start point
    seed_ptr,  # [1] int64 on the device: refill it to give a replayed CUDA graph new noise
    eps,
    lower,
    upper,
    std,  # of the gaussian noise
    n,
    EPS_AXES: tl.constexpr,
    LOWER_AXES: tl.constexpr,
    UPPER_AXES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Element i uses word i % 4 of Philox4x32-10 at counter i // 4, so neither BLOCK nor the grid changes the noise.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    n0, n1, n2, n3 = tl.rand4x(tl.load(seed_ptr), counter)
    if GAUSSIAN:
        n0, n1 = _normal_pair(n0, n1)
        n2, n3 = _normal_pair(n2, n3)
    else:
        n0, n1, n2, n3 = 2 * n0 - 1, 2 * n1 - 1, 2 * n2 - 1, 2 * n3 - 1
    noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))

    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - start
    x = tl.load(x_ptr + start + offsets, mask=mask).to(tl.float32)
    last = tl.minimum(n - start, BLOCK).to(tl.int32) - 1
    eps = _limit(eps, EPS_AXES, start, last, BLOCK)
    lower = _limit(lower, LOWER_AXES, start, last, BLOCK)
    upper = _limit(upper, UPPER_AXES, start, last, BLOCK)
    noise *= tl.cast(std, tl.float32) if GAUSSIAN else eps
    tl.store(out_ptr + start + offsets, _project(x + noise, x, eps, lower, upper), mask=mask)


@triton.jit
def _step_kernel(
    x_adv_ptr,  # [n] current iterate, storage order
    grad_ptr,  # [n] gradient of the objective; its dtype may differ
    x_ptr,  # [n] natural images
    out_ptr,  # [n] next iterate, may be x_adv
    step_size,
    eps,
    lower,
    upper,
    n,
    STEP_AXES: tl.constexpr,
    EPS_AXES: tl.constexpr,
    LOWER_AXES: tl.constexpr,
    UPPER_AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The base of the block is a 64-bit scalar, the offsets in the block are 32-bit. So tensors with more than 2^31
    # elements work, and the 64-bit arithmetic costs nothing.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - start
    x_adv = tl.load(x_adv_ptr + start + offsets, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    x = tl.load(x_ptr + start + offsets, mask=mask).to(tl.float32)
    last = tl.minimum(n - start, BLOCK).to(tl.int32) - 1
    step_size = _limit(step_size, STEP_AXES, start, last, BLOCK)
    eps = _limit(eps, EPS_AXES, start, last, BLOCK)
    lower = _limit(lower, LOWER_AXES, start, last, BLOCK)
    upper = _limit(upper, UPPER_AXES, start, last, BLOCK)
    v = x_adv + tl.where(grad > 0, step_size, tl.where(grad < 0, -step_size, 0.0))
    tl.store(out_ptr + start + offsets, _project(v, x, eps, lower, upper), mask=mask)


Limit = float | torch.Tensor


def _axes(limit: Limit, images: torch.Tensor) -> tuple[tuple[int, int, int], ...] | None:
    """Return (stride of the limit, stride of the images, size) for each dimension along which a tensor varies.

    A size of 0 stands for an outermost dimension, whose index needs no modulo. So there is no new kernel for each size
    of a batch. For a number, return None.
    """
    if not isinstance(limit, torch.Tensor):
        return None
    axes = []
    for size, stride, along in zip(limit.shape, limit.stride(), images.stride(), strict=False):
        if size > 1 and stride:
            assert along < 2**31, "the kernel computes indices inside an image with 32 bits"
            axes.append((stride, along, 0 if along * size == images.numel() else size))
    return tuple(axes)


def launch_init(
    x: torch.Tensor,
    out: torch.Tensor,
    seed: torch.Tensor,
    eps: Limit,
    lower: Limit,
    upper: Limit,
    noise: str,
    std: float = 0.001,
) -> None:
    """Write the start point of an attack on ``x`` into ``out``, which may be ``x``.

    seed: int64, (1,), on the device.
    eps, lower, upper: numbers, or fp32 tensors with shape (), (B,) or the number of dimensions of ``x``, of which only
        the first two may have a size above 1.
    noise: "uniform", U(-eps, eps), or "gaussian", std * N(0, 1), which is projected on the ball as well.
    """
    n = x.numel()
    assert out.numel() == n
    assert seed.dtype == torch.int64
    assert noise in ("uniform", "gaussian")
    if n == 0:
        return
    limits = [_argument(limit) for limit in (eps, lower, upper)]
    axes = [_axes(limit, x) for limit in limits]
    with torch.cuda.device_of(x):
        _init_kernel[(triton.cdiv(n, BLOCK),)](
            x, out, seed, *limits, float(std), n, *axes, noise == "gaussian", BLOCK, num_warps=NUM_WARPS
        )


def launch_step(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    step_size: Limit,
    eps: Limit,
    lower: Limit,
    upper: Limit,
) -> None:
    """Write one sign-ascent step from ``x_adv``, projected and clamped, into ``out``, which may be ``x_adv``.

    step_size, eps, lower, upper: as eps of :func:`launch_init`.
    """
    n = x.numel()
    assert x_adv.numel() == grad.numel() == out.numel() == n
    if n == 0:
        return
    limits = [_argument(limit) for limit in (step_size, eps, lower, upper)]
    axes = [_axes(limit, x) for limit in limits]
    with torch.cuda.device_of(x):
        _step_kernel[(triton.cdiv(n, BLOCK),)](x_adv, grad, x, out, *limits, n, *axes, BLOCK, num_warps=NUM_WARPS)


def _argument(limit: Limit) -> Limit:
    # A number is always float: Triton would compile another kernel for an int, and another one for the constant 1.
    return limit if isinstance(limit, torch.Tensor) else float(limit)
