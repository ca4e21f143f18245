"""Gradients of a scalar function of the logits with respect to the image, one per image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltat_fast.models.frozen import FrozenTwin


def frozen(model: nn.Module) -> FrozenTwin:
    """A frozen twin of ``model``: eval mode, no parameter gradients. The model itself does not change."""
    return model if isinstance(model, FrozenTwin) else FrozenTwin(model, fold_bn=False)


def true_logit(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of the true class of each image: ``(B,)``."""
    return logits.gather(1, y[:, None]).squeeze(1)


def input_gradient(model: nn.Module, x: Tensor, scalar: Callable[[Tensor], Tensor]) -> Tensor:
    """Return d scalar_i / d x_i for each image i, shaped like ``x``. scalar: maps logits ``(B, K)`` to values ``(B,)``.

    In eval mode the images of a batch do not influence each other, so one backward pass of the sum gives all gradients.
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scalar(frozen(model)(point)).sum(), point)
    return gradient
