"""Gradients of a scalar of the logits with respect to the image, one an image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltat_fast.models.frozen import FrozenTwin


def frozen(model: nn.Module) -> FrozenTwin:
    """``model`` in eval mode without parameter gradients; the model itself is left as it is."""
    return model if isinstance(model, FrozenTwin) else FrozenTwin(model, fold_bn=False)


def true_logit(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of each image's own class: ``(B,)``."""
    return logits.gather(1, y[:, None]).squeeze(1)


def input_gradient(model: nn.Module, x: Tensor, scalar: Callable[[Tensor], Tensor]) -> Tensor:
    """d scalar_i / d x_i for each image i, like ``x``. scalar: logits ``(B, K)`` to one value an image ``(B,)``.

    The images of a batch do not act on each other (eval mode), so one backward pass of the sum gives all of them.
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scalar(frozen(model)(point)).sum(), point)
    return gradient
