"""The PGD loop of all attacks: FGSM, PGD-k, CW-k and the inner maximisation of every training method.

    x_0 = clip(x + noise);   x_{t+1} = clip( project_eps( x_t + step * steepest(grad J(x_t)) ) )

Madry et al. 2018, eq. (1). The gradient is taken with respect to the image alone. The steepest direction is its sign in
the L_inf ball, and the gradient divided by its length in the L2 ball.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ltat_fast.attacks.balls import Ball, Norm
from ltat_fast.attacks.objectives import Objective
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.ops import pgd_init, pgd_step

Logits = Callable[[Tensor], Tensor]
Size = float | Tensor
Ascend = Callable[..., Tensor]
"""``(x, x_adv, *context, ball=...)`` to the next ``x_adv``: one step of an attack. It may write into ``x_adv``."""


@dataclass(frozen=True)
class AttackConfig:
    """A threat model and the effort of the attack.

    eps: radius of the ball. step_size: step of the attack. Both in units of pixels in [0, 1].
    steps: number of steps. noise: start point, "uniform" in the ball, "gaussian" (0.001 N(0, 1)) or "none".
    start_eps: radius of the start noise; ``eps`` if None. A budget per image scales it, but not the ``eps`` of a start.
    norm: "linf" or "l2". The L2 ball is for evaluation: its steps are not compiled, have no budget per image, and start
        from a point that is given or from the image (noise "none").
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    noise: Literal["uniform", "gaussian", "none"] = "uniform"
    start_eps: float | None = None
    norm: Norm = "linf"

    @property
    def start_radius(self) -> float:
        return self.eps if self.start_eps is None else self.start_eps


def n_fgsm(eps: float) -> AttackConfig:
    """Return N-FGSM for training at radius ``eps``: uniform noise of twice the radius, then one step of size ``eps``.

    There is no projection on the ball of radius ``eps``. The projection of the loop never acts, because the attack
    cannot leave the ball of radius 3 eps. Source: de Jorge et al., "Make Some Noise: Reliable and Efficient
    Single-Step Adversarial Training", NeurIPS 2022. Departure: images are clipped to [0, 1] after the noise too.
    """
    return AttackConfig(eps=3 * eps, step_size=eps, steps=1, noise="uniform", start_eps=2 * eps)


def attack_loop(
    x: Tensor,
    ascend: Ascend,
    config: AttackConfig,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    context: tuple = (),
    scale: Tensor | None = None,
) -> Tensor:
    """Run ``config.steps`` steps of ``ascend`` from a random start; return the adversarial examples, shaped like ``x``.

    x: float images ``(B, C, H, W)`` in [0, 1]. generator: source of the start noise; the default generator of the
    device if None. start: start point in place of the noise, shaped like ``x``, in the ball and in [0, 1].
    context: further arguments of ``ascend``, for example the labels. scale: ``(B,)`` in the dtype of ``x``, factor of
    eps, step size and ``start_eps`` of each image. Without ``start_eps``, the start noise has the plain eps, and the
    first step projects it (RobustLT).
    """
    x_adv = random_start(x, config, generator, scale) if start is None else start.clone()
    return ascend_from(x_adv, x, ascend, config, context, scale)


def random_start(
    x: Tensor, config: AttackConfig, generator: torch.Generator | None = None, scale: Tensor | None = None
) -> Tensor:
    """Return the start point of :func:`attack_loop`, a new tensor shaped like ``x``. The arguments are the same."""
    if config.noise == "none":
        return x.clone()
    if config.norm == "l2":
        raise ValueError("an attack in the L2 ball has no start noise of its own: give its start, or noise='none'")
    radius = config.start_radius
    if scale is not None and config.start_eps is not None:
        radius = radius * scale
    return pgd_init(x, radius, config.noise, generator=generator)


def ascend_from(
    x_adv: Tensor,
    x: Tensor,
    ascend: Ascend,
    config: AttackConfig,
    context: tuple = (),
    scale: Tensor | None = None,
) -> Tensor:
    """Run the steps of :func:`attack_loop` from the point ``x_adv``, and perhaps write into it."""
    ball = None if scale is None else (config.step_size * scale, config.eps * scale)
    for _ in range(config.steps):
        x_adv = ascend(x, x_adv, *context, ball=ball)
    return x_adv


def pgd(
    model: nn.Module,
    x: Tensor,
    objective: Objective,
    config: AttackConfig | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return adversarial examples in the eps-ball around ``x`` and in [0, 1], detached, shaped like ``x``.

    model: any classifier from images ``(B, C, H, W)`` to logits ``(B, K)``. A plain module is attacked through its
        frozen twin: in eval mode and without parameter gradients; its own mode, buffers and ``.grad`` do not change.
        Pass a :class:`~ltat_fast.models.frozen.FrozenTwin` to build the twin only once.
    objective: function of ``(x_adv, logits)`` to maximise; see :mod:`ltat_fast.attacks.objectives`.
    x, config, generator, start: as for :func:`attack_loop`.
    """
    config = config or AttackConfig()
    twin = model if isinstance(model, FrozenTwin) else FrozenTwin(model, fold_bn=False)
    return attack_loop(x, make_ascend(twin, objective, config), config, generator, start)


def make_ascend(
    model: Logits, objective: Callable[..., Tensor], config: AttackConfig, compile_: Callable | None = None
) -> Ascend:
    """Return the attack step ``(x, x_adv, *context, ball=None) -> x_adv`` against ``model``.

    objective: function of ``(x_adv, logits, *context)`` to maximise. compile_: compiles the step, for example
    ``torch.compile``; None runs it in eager mode. ball: step size and radius of each image, two tensors ``(B,)``, in
    place of those of ``config``.
    """
    step = traceable_ascent_step if compile_ else ascent_step
    if config.norm == "l2":
        if compile_:
            raise ValueError("steps in the L2 ball are not compiled")
        step = l2_ascent_step

    def ascend(x: Tensor, x_adv: Tensor, *context, ball: tuple[Tensor, Tensor] | None = None) -> Tensor:
        step_size, eps = (config.step_size, config.eps) if ball is None else ball
        return step(model, x, x_adv, lambda point, logits: objective(point, logits, *context), step_size, eps)

    return compile_(ascend, fullgraph=True) if compile_ else ascend


def ascent_step(model: Logits, x: Tensor, x_adv: Tensor, objective: Objective, step_size: Size, eps: Size) -> Tensor:
    """Take one attack step in place: gradient of the objective at ``x_adv``, sign ascent, projection.

    It works in place because a new tensor per step costs more than the arithmetic of the step (page faults on a CPU).
    """
    point = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(objective(point, model(point)), point)
    return pgd_step(x_adv, grad, x, step_size, eps, out=x_adv)


def traceable_ascent_step(
    model: Logits, x: Tensor, x_adv: Tensor, objective: Objective, step_size: Size, eps: Size
) -> Tensor:
    """:func:`ascent_step` for torch.compile: func.grad is traced together with the forward pass into one graph.

    autograd.grad would break the graph. The result is a new tensor.
    """
    grad = torch.func.grad(lambda point: objective(point, model(point)))(x_adv)
    return pgd_step(x_adv, grad, x, step_size, eps)


def l2_ascent_step(model: Logits, x: Tensor, x_adv: Tensor, objective: Objective, step_size: Size, eps: Size) -> Tensor:
    """:func:`ascent_step` in the L2 ball: along the gradient by ``step_size``. The result is a new tensor."""
    if isinstance(eps, Tensor):
        raise TypeError("the L2 ball has one radius for all images")
    point = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(objective(point, model(point)), point)
    ball = Ball("l2", eps)
    return ball.project(x, x_adv + step_size * ball.steepest(grad.nan_to_num(0, 0, 0)))
