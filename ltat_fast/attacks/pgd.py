"""The one L_inf PGD loop: FGSM, PGD-k, CW-k and the inner maximisation of every training method.

    x_0 = clip(x + noise);   x_{t+1} = clip( project_eps( x_t + step * sign(grad J(x_t)) ) )

Madry et al. 2018, eq. (1). The gradient is taken with respect to the input alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltat_fast.attacks.objectives import Objective
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.ops import pgd_init, pgd_step

Logits = Callable[[Tensor], Tensor]
AscentStep = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttackConfig:
    """An L_inf threat model and how hard it is searched. ``eps`` and ``step_size`` are in units of the [0, 1] pixel."""

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    noise: str = "uniform"


def ascent_step(model: Logits, x: Tensor, x_adv: Tensor, objective: Objective, config: AttackConfig) -> Tensor:
    """One step of the attack, in place: gradient of the objective at ``x_adv``, then sign ascent and projection.

    In place because a fresh tensor a step costs more than the step's arithmetic (page faults, on the CPU).
    """
    point = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(objective(point, model(point)), point)
    return pgd_step(x_adv, grad, x, config.step_size, config.eps, out=x_adv)


def pgd(
    model: nn.Module,
    x: Tensor,
    objective: Objective,
    config: AttackConfig | None = None,
    generator: torch.Generator | None = None,
    step: AscentStep | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Adversarial examples in the eps-ball around ``x`` and in [0, 1].

    model: any classifier from ``(B, C, H, W)`` to logits ``(B, K)``. A plain module is attacked through its frozen
        twin: in eval mode, without parameter gradients, its own mode, buffers and ``.grad`` left as they are. Hand in
        a :class:`~ltat_fast.models.frozen.FrozenTwin` to pay for that only once.
    x: float images in [0, 1], ``(B, C, H, W)``.
    objective: what to ascend, of ``(x_adv, logits)``; see :mod:`ltat_fast.attacks.objectives`.
    generator: where the start noise is drawn from; the default generator of the device if None.
    step: a compiled stand-in for :func:`ascent_step` at these settings, ``(x, x_adv) -> x_adv``.
    start: like ``x``, where to start instead of from noise; in the ball and in [0, 1].

    Returns a detached tensor like ``x``.
    """
    config = config or AttackConfig()
    if step is None:
        if not isinstance(model, FrozenTwin):
            model = FrozenTwin(model, fold_bn=False)

        def step(x: Tensor, x_adv: Tensor) -> Tensor:
            return ascent_step(model, x, x_adv, objective, config)

    if start is not None or config.noise == "none":
        x_adv = (x if start is None else start).clone()
    else:
        x_adv = pgd_init(x, config.eps, config.noise, generator=generator)
    for _ in range(config.steps):
        x_adv = step(x, x_adv)
    return x_adv
