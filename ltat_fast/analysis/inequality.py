"""Inequality of the attribution of a network over the image: Gini values.

The attribution is A = d z_y / d x, the signed gradient of the logit of the true class. Let a be the n values of |A| in
ascending order:

    Gini = (n + 1 - 2 * sum_i (n + 1 - i) a_i / sum_i a_i) / n

It is 0 if all values are equal and (n - 1) / n if all but one are zero.

Duan et al., "Inequality phenomenon in l_inf-adversarial training, and its unrealized threats" (ICLR 2023), eq. (2);
Chen, Dong, Xie, "Releasing Inequality Phenomenon in L_inf-norm Adversarial Training via Input Gradient Distillation"
(IGD, 2023). The papers state the Gini value, global over C*H*W values, and the 16x16 regions of IGD. Our choices: the
attribution is the gradient of the logit (Duan et al. use others, too), and the blocks of Duan et al. sum over channels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast.analysis.gradients import input_gradient, true_logit

Form = Literal["pooled", "block-sum"]


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Signed gradient of the logit of the true class with respect to the image: float32 ``(B, C, H, W)``.

    x: float images in [0, 1], ``(B, C, H, W)``. y: int64 ``(B,)``. The model runs in eval mode and does not change.
    """
    return input_gradient(model, x, lambda logits: true_logit(logits, y)).float()


def gini(values: Tensor) -> Tensor:
    """Gini value of each row of non-negative ``values``: ``(B, n)`` to ``(B,)``; 0 for a row of zeros.

    Raises ValueError for negative values.
    """
    if (values < 0).any():
        raise ValueError("a Gini value needs non-negative values: take the absolute attribution")
    ascending, n = values.double().sort(1).values, values.shape[1]
    weights = torch.arange(n, 0, -1, dtype=torch.float64, device=values.device)
    share = (ascending @ weights) / ascending.sum(1)
    return torch.where(ascending[:, -1] > 0, (n + 1 - 2 * share) / n, 0.0).to(values.dtype)


def global_gini(attribution: Tensor) -> Tensor:
    """Gini value over all C*H*W absolute attributions of each image: ``(B, C, H, W)`` to ``(B,)``."""
    return gini(attribution.abs().flatten(1))


def regional_gini(attribution: Tensor, block: int | None = None, form: Form = "pooled") -> Tensor:
    """Gini value over square blocks of absolute attributions: ``(B, C, H, W)`` to ``(B,)``.

    form: "pooled" (IGD) averages each block of each channel, and reflects the right and bottom edges if the last block
        is not full; "block-sum" (Duan et al.) sums over blocks and channels and pads the last block with zeros.
    block: side in pixels; default: :func:`default_block`.
    Raises ValueError if the image is too small to be reflected to a multiple of the block.
    """
    height, width = attribution.shape[2:]
    block = block or default_block(min(height, width), form)
    bottom, right = -height % block, -width % block
    magnitude = attribution.abs()
    if form == "block-sum":
        magnitude = F.pad(magnitude.sum(1, keepdim=True), (0, right, 0, bottom))
    elif bottom < height and right < width:
        magnitude = F.pad(magnitude, (0, right, 0, bottom), mode="reflect")
    else:
        raise ValueError(f"images of {height}x{width} cannot be reflected to blocks of {block}x{block}")
    return gini(F.avg_pool2d(magnitude, block).flatten(1))


def default_block(size: int, form: Form = "pooled") -> int:
    """Side of a block in pixels for images of ``size`` pixels width.

    Published values: 16 in IGD; 16 for ImageNet and 4 for CIFAR-10 in Duan et al., which is a power of two with at
    least eight blocks per side. Images below 32 pixels use the second rule for both forms, with a side of at least 2:
    the 8x8 digits have 4x4 blocks of 2x2.
    """
    if form == "pooled" and size >= 32:
        return 16
    return min(16, max(2, 2 ** ((size // 8).bit_length() - 1))) if size >= 8 else 2
