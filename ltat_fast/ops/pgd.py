"""Start point and ascent step of projected gradient descent in an L_inf ball (Madry et al. 2018, section 2.1).

    start   x_adv = clip(x + noise)
    step    x_adv = clip(min(max(x_adv + step_size * sign(grad), x - eps), x + eps))      clip = clamp to [lower, upper]

Any shape; every tensor of a call has the same one. Used by every attack and so by every training method.
"""

import torch
from torch import Tensor

GAUSSIAN_STD = 1e-3  # of the start noise of TRADES, MART and AT-BSL, whatever eps is


def pgd_init_ref(
    x: Tensor,
    eps: float,
    noise: str = "uniform",
    generator: torch.Generator | None = None,
    *,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Plain-torch :func:`pgd_init`: the same distribution, not the same draws."""
    draw = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    if noise == "uniform":
        draw.uniform_(-eps, eps, generator=generator)
    else:
        draw.normal_(0.0, GAUSSIAN_STD, generator=generator).clamp_(-eps, eps)
    return (x.detach() + draw).clamp_(lower, upper).to(x.dtype)


def pgd_step_ref(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Plain-torch :func:`pgd_step`, in float32 (float64 for float64) and rounded once."""
    work = torch.promote_types(x_adv.dtype, torch.float32)
    centre = x.detach().to(work)
    ascended = x_adv.detach().to(work) + step_size * grad.detach().sign().to(work)
    projected = torch.minimum(torch.maximum(ascended, centre - eps), centre + eps)
    return projected.clamp_(lower, upper).to(x_adv.dtype)


def pgd_init(
    x: Tensor,
    eps: float,
    noise: str = "uniform",
    generator: torch.Generator | None = None,
    *,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Random start point of an attack, inside the ball and inside [lower, upper]; never requires grad."""
    return pgd_init_ref(x, eps, noise, generator, lower=lower, upper=upper)


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """One ascent step, projection and clamp; never requires grad. ``out`` may be ``x_adv`` itself."""
    stepped = pgd_step_ref(x_adv, grad, x, step_size, eps, lower, upper)
    return stepped if out is None else out.copy_(stepped)
