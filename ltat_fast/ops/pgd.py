"""Start point and ascent step of projected gradient descent (PGD) in an L_inf ball (Madry et al. 2018, section 2.1).

    start   x_adv = clip(project(x + noise))
    step    x_adv = clip(project(x_adv + step_size * sign(grad)))
    project(v) = min(max(v, x - eps), x + eps),     clip = clamp to [lower, upper],     sign(0) = sign(NaN) = 0

All images of a call have the same shape, which can be any shape. Dtypes are float32, bfloat16 and float16, computed in
float32 and rounded once, and float64 on the CPU. Neither op has a gradient: the gradient of sign is zero, and the outer
loss treats an attack as a constant. Every attack uses these ops, and so does every training method.

The limits step_size, eps, lower and upper are numbers, or tensors with one value per image or per channel.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from ltat_fast.ops._operator import Operator, check_dense, check_float, check_like, is_plain_call

GAUSSIAN_STD = 1e-3  # standard deviation of the start noise of TRADES, MART and AT-BSL; it does not depend on eps
Limit = float | Tensor
_INF = float("inf")
_LIMITS = {"step_size": 0.0, "eps": 0.0, "lower": -_INF, "upper": _INF}  # the numbers that stand in for tensors
_NUMBERS = {float, int}


def pgd_init_ref(
    x: Tensor,
    eps: Limit,
    noise: str = "uniform",
    generator: torch.Generator | None = None,
    *,
    lower: Limit = 0.0,
    upper: Limit = 1.0,
) -> Tensor:
    """Plain-torch :func:`pgd_init`. It has the same distribution, but draws other numbers."""
    centre = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    draw = torch.empty_like(centre)
    if noise == "gaussian":
        draw.normal_(0.0, GAUSSIAN_STD, generator=generator)
    elif isinstance(eps, Tensor):
        draw.uniform_(-1, 1, generator=generator).mul_(_spread(eps, x))
    else:
        draw.uniform_(-eps, eps, generator=generator)
    return _project(centre + draw, centre, eps, lower, upper).to(x.dtype)


def pgd_step_ref(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: Limit,
    eps: Limit,
    lower: Limit = 0.0,
    upper: Limit = 1.0,
) -> Tensor:
    """Plain-torch :func:`pgd_step`."""
    work = torch.promote_types(x_adv.dtype, torch.float32)
    ascended = x_adv.detach().to(work) + _spread(step_size, x) * grad.detach().sign().to(work)
    return _project(ascended, x.detach().to(work), eps, lower, upper).to(x_adv.dtype)


def _project(v: Tensor, x: Tensor, eps: Limit, lower: Limit, upper: Limit) -> Tensor:
    eps, lower, upper = (_spread(limit, x) for limit in (eps, lower, upper))
    v = torch.minimum(torch.maximum(v, x - eps), x + eps)
    if isinstance(lower, Tensor) or isinstance(upper, Tensor):  # torch.clamp takes no tensor together with a number
        return v.clamp(min=lower).clamp(max=upper)
    return v.clamp(lower, upper)


def _spread(limit: Limit, x: Tensor) -> Limit:
    """Return a limit of shape (B,) in a shape that broadcasts with ``x``, and any other limit as it is."""
    if not isinstance(limit, Tensor):
        return limit
    limit = limit.detach()
    return limit.view(-1, *[1] * (x.dim() - 1)) if limit.dim() == 1 else limit


def _join(numbers: Sequence[float], tensors: Sequence[Tensor | None]) -> list[Limit]:
    """Return the limits that :func:`_split` has split."""
    return [number if tensor is None else tensor for number, tensor in zip_longest(numbers, tensors)]


def _pgd_init_cuda(x, seed, eps, std, lower, upper, noise, *tensors):
    from ltat_fast.kernels.pgd import launch_init  # pyright: ignore[reportMissingImports]

    eps, lower, upper = _join((eps, lower, upper), tensors)
    out = torch.empty_like(x)
    launch_init(_in_layout_of(out, x), out, seed, eps, lower, upper, noise, std)
    return out


def _pgd_step_cuda(x_adv, grad, x, step_size, eps, lower, upper, *tensors):
    out = torch.empty_like(x_adv)
    _pgd_step_out_cuda(x_adv, grad, x, step_size, eps, lower, upper, out, *tensors)
    return out


def _pgd_step_out_cuda(x_adv, grad, x, step_size, eps, lower, upper, out, *tensors):
    from ltat_fast.kernels.pgd import launch_step  # pyright: ignore[reportMissingImports]

    dense = torch.empty_like(out)  # has the strides of out, unless out is not dense, such as a slice
    target = out if _same_strides(dense, out) else dense
    grad = grad.sign() if grad.dtype == torch.float64 else grad  # the kernel's float32 would round 1e-60 to 0
    x_adv, grad, x = (_in_layout_of(target, t) for t in (x_adv, grad, x))
    launch_step(x_adv, grad, x, target, *_join((step_size, eps, lower, upper), tensors))
    if target is not out:
        out.copy_(target)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Return whether the strides agree. Dimensions with one element are ignored: their stride has no effect."""
    return a.stride() == b.stride() or all(
        size == 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def _in_layout_of(out: Tensor, tensor: Tensor) -> Tensor:
    return tensor if _same_strides(out, tensor) else torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)


_TENSORS = "Tensor? epsilons=None, Tensor? lowers=None, Tensor? uppers=None"
_STEP = "Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, float lower, float upper"

_pgd_init = Operator(
    f"pgd_init(Tensor x, Tensor seed, float eps, float std, float lower, float upper, str noise, {_TENSORS}) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
    triton=_pgd_init_cuda,
    public="pgd_init",
)
_pgd_step = Operator(
    f"pgd_step({_STEP}, Tensor? step_sizes=None, {_TENSORS}) -> Tensor",
    fake=lambda x_adv, *_: torch.empty_like(x_adv),
    triton=_pgd_step_cuda,
    public="pgd_step",
)
_pgd_step_out = Operator(
    f"pgd_step_out({_STEP}, Tensor(a!) out, Tensor? step_sizes=None, {_TENSORS}) -> ()",
    fake=lambda *_: None,
    triton=_pgd_step_out_cuda,
)


def pgd_init(
    x: Tensor,
    eps: Limit,
    noise: str = "uniform",
    generator: torch.Generator | None = None,
    *,
    lower: Limit = 0.0,
    upper: Limit = 1.0,
) -> Tensor:
    """Return the random start of an attack: a new tensor in the eps-ball around ``x`` and in [lower, upper].

    x: any shape, float32, bfloat16 or float16 (float64 on the CPU). The result has its dtype and layout.
    eps: radius of the ball, >= 0, in the units of ``x`` (8/255 for images in [0, 1]).
    eps, lower, upper: numbers or tensors, as for :func:`pgd_step`.
    noise: "uniform", U(-eps, eps) (Madry et al. 2018), or "gaussian", N(0, 0.001^2) projected on the ball (TRADES).
    generator: a generator on the device of ``x``. One number is drawn from it on the device, without synchronisation.
        None is the default generator of the device, which a captured CUDA graph advances by itself. torch.compile
        supports only None.

    The result does not require grad. The noise is a function of the drawn number and of the position in memory. So it
    does not depend on the number of threads, and channels_last images get other noise than contiguous images.

    Raises TypeError for another dtype, ValueError for a negative eps, an empty range, an unknown noise, or a tensor
    whose shape or device does not fit.
    """
    check_float("x", x)
    numbers, tensors = _split(x, 0.0, eps, lower, upper)
    if noise not in ("uniform", "gaussian"):
        raise ValueError(f"noise must be 'uniform' or 'gaussian', got {noise!r}")
    if numbers[1] == _INF:
        raise ValueError("eps must be finite to draw a start point, got inf")
    x = x.detach()
    if not _pgd_init.runs_on(x):
        return pgd_init_ref(x, eps, noise, generator, lower=lower, upper=upper)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device, generator=generator)
    return _pgd_init(x, seed, numbers[1], GAUSSIAN_STD, *numbers[2:], noise, *tensors[1:])


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: Limit,
    eps: Limit,
    lower: Limit = 0.0,
    upper: Limit = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Take one step of an attack: sign ascent, projection on the eps-ball around ``x``, clamp, in one pass over memory.

    x_adv, x: current point and centre of the ball. They have the same shape and the same dtype: float32, bfloat16 or
        float16 (float64 on the CPU).
    grad: gradient of the objective of the attack. It has the same shape, and any of these dtypes.
    step_size, eps: in the units of ``x``. A negative step size descends, as a targeted attack does.
    step_size, eps, lower, upper: each is a number, or a tensor with one value per image, shape (B,), per channel,
        (1, C, 1, 1), or for each channel of each image, (B, C, 1, 1). B and C are the first two sizes of ``x``; the
        other sizes are 1, in as many dimensions as ``x`` has. A tensor of shape () holds for all. The tensors are on
        the device of ``x``, float32 (float64 for float64 images). Their values are not checked, because that would
        wait for the device. If eps is negative, the result is clip(x + eps). If lower exceeds upper, it is upper. NaN
        gives NaN (in step_size: where the gradient is not zero).
    out: if given, the result is written to it and it is returned. ``out=x_adv`` is the cheapest call. It may require
        grad: only its data are set, as by ``out.data.copy_``, and autograd refuses to use an older version of it.

    Returns a tensor with the dtype and layout of ``x_adv`` that does not require grad. Every layout works. No tensor is
    copied if all have the same layout, contiguous or channels_last. In half precision the result is in the ball up to
    the rounding of the stored value.

    Raises ValueError for shapes or devices that do not fit, a negative eps, an empty range or an ``out`` that partly
    overlaps an input. Raises TypeError for another dtype or mixed dtypes.
    """
    check_float("x_adv", x_adv)
    check_like("grad", grad, "x_adv", x_adv)
    check_like("x", x, "x_adv", x_adv)
    if x.dtype != x_adv.dtype:
        raise TypeError(f"x is {x.dtype}, but x_adv is {x_adv.dtype}")
    numbers, tensors = _split(x, step_size, eps, lower, upper)
    x_adv, grad, x = x_adv.detach(), grad.detach(), x.detach()
    if out is None:
        if not _pgd_step.runs_on(x_adv):
            return pgd_step_ref(x_adv, grad, x, step_size, eps, lower, upper)
        return _pgd_step(x_adv, grad, x, *numbers, *tensors)

    check_like("out", out, "x_adv", x_adv)
    if out.dtype != x_adv.dtype:
        raise TypeError(f"out is {out.dtype}, but x_adv is {x_adv.dtype}")
    target = out.detach()
    if not _pgd_step_out.runs_on(out):
        target.copy_(pgd_step_ref(x_adv, grad, x, step_size, eps, lower, upper))
        return out
    if is_plain_call(x_adv, grad, x, out, *tensors):
        _check_overlap(target, x_adv, grad, x, *tensors)
        torch.autograd.graph.increment_version(target)
    _pgd_step_out(x_adv, grad, x, *numbers, target, *tensors)
    return out


def _split(x: Tensor, step_size, eps, lower, upper) -> tuple[Sequence[float], Sequence[Tensor | None]]:
    """Check the limits for the images ``x``. Return them as arguments of an operator.

    An operator takes a number for each limit, and then a tensor for each, which holds in place of the number unless it
    is None. If all limits are numbers, the tensors may be left out.
    """
    numbers, tensors = (step_size, eps, lower, upper), ()
    if not _NUMBERS.issuperset(map(type, numbers)):  # isinstance(limit, Tensor) is slow for a float
        limits = dict(zip(_LIMITS, numbers, strict=True))
        tensors = [_checked(name, v, x) if isinstance(v, Tensor) else None for name, v in limits.items()]
        numbers = [_LIMITS[name] if isinstance(v, Tensor) else v for name, v in limits.items()]
        step_size, eps, lower, upper = numbers
    if not -_INF <= step_size <= _INF:
        raise ValueError(f"step_size must be a number and not NaN, got {step_size}")
    if not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps}")
    if not lower <= upper:
        raise ValueError(f"lower must not exceed upper, got [{lower}, {upper}]")
    return numbers, tensors


def _checked(name: str, limit: Tensor, x: Tensor) -> Tensor:
    """Return the limit, detached. Raise unless it fits the images ``x``."""
    check_dense(name, limit)
    work = torch.promote_types(x.dtype, torch.float32)
    if limit.dtype != work:
        raise TypeError(f"{name} must be {work} for images of dtype {x.dtype}, got {limit.dtype}")
    if limit.device != x.device:
        raise ValueError(f"{name} is on {limit.device}, but the images are on {x.device}")
    full = (*x.shape[:2], *[1] * (x.dim() - 2))
    dimensions = (0, min(1, x.dim()), x.dim())
    if limit.dim() not in dimensions or any(size not in (1, n) for size, n in zip(limit.shape, full, strict=False)):
        raise ValueError(
            f"{name} must have one value, one per image, shape {full[:1]}, or one per channel, shape {(1, *full[1:])}, "
            f"got shape {tuple(limit.shape)}"
        )
    return limit.detach().resolve_neg()


def _check_overlap(out: Tensor, *inputs: Tensor | None) -> None:
    """Raise if ``out`` overlaps an input without being that input: the kernel would read values that it has written."""

    def span(t: Tensor) -> tuple[int, int]:
        reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()

    first, last = span(out)
    for t in inputs if out.numel() else ():
        if t is None:
            continue
        start, stop = span(t)
        same = start == first and t.shape == out.shape and _same_strides(out, t) and t.dtype == out.dtype
        if start < last and first < stop and not same:
            raise ValueError("out overlaps an input but is not that input: pass the input itself or other memory")
