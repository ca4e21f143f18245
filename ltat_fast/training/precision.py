"""Check that an attack in reduced precision still sees the gradient.

PGD uses only the sign of the gradient, so an entry that underflows to zero has no effect.
"""

import torch
from torch import Tensor

from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.precision import without_tf32
from ltat_fast.ops import pgd_init
from ltat_fast.training.micro_batches import join
from ltat_fast.training.step import TrainStep


def gradient_health(step: TrainStep, x: Tensor, y: Tensor) -> dict[str, float]:
    """Examine the first input gradient of the attack of ``step`` on a batch. Nothing is changed.

    x: float32 images ``(B, C, H, W)`` in [0, 1]. y: int64 labels ``(B,)``. Returns shares of the gradient's entries, in
    percent: "zero_gradients" are exactly zero, so a sign step does not move these pixels; "sign_disagreement" have
    another sign than in the float32 network (only for an attack in reduced precision).
    """
    step.frozen.refresh()
    # Do not start at the images: there the gradient of a divergence from the clean prediction is zero.
    start = pgd_init(x, step.attack.start_radius, step.attack.noise, torch.Generator(x.device).manual_seed(0))
    grad = _input_gradient(step, step.frozen, x, start, y)
    health = {"zero_gradients": 100 * (grad == 0).float().mean().item()}
    if step.frozen.dtype not in (None, torch.float32):
        with without_tf32():
            exact = _input_gradient(step, FrozenTwin(step.model, fold_bn=False), x, start, y)
        health["sign_disagreement"] = 100 * (grad.sign() != exact.sign()).float().mean().item()
    return health


def _input_gradient(step: TrainStep, network: FrozenTwin, x: Tensor, start: Tensor, y: Tensor) -> Tensor:
    grads = []
    for images, points, labels in zip(step.split(x), step.split(start), step.split(y), strict=True):
        with torch.no_grad():
            target = step.method.target(network, images, labels)
        point = points.detach().requires_grad_()
        grads.append(torch.autograd.grad(step.method.objective(point, network(point), target), point)[0])
    return join(grads)
