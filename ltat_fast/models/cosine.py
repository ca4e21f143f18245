"""The cosine classifier of RoBal (Wu et al., CVPR 2021, section 4.1)."""

import torch.nn.functional as F
from torch import Tensor

from .classifier import FullPrecisionLinear


class CosineClassifier(FullPrecisionLinear):
    """Map features h (N, d) to cosines c (N, C) in train mode, and to logits ``scale`` * c - ``shift`` in eval mode.

    c_k = <h / ||h||, W_k / (||W_k|| + g)>. Attacks, evaluation and export use the logits of eval mode.

    Args:
        norm_offset: g
        shift: float (C,), saved with the weights
    """

    shift: Tensor

    def __init__(self, feature_dim: int, norm_offset: float, scale: float, shift: Tensor):
        super().__init__(feature_dim, len(shift), bias=False)
        self.norm_offset, self.scale = norm_offset, scale
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        direction = F.normalize(x.to(self.weight.dtype), dim=1)
        cosines = super().forward(direction) / (self.weight.norm(dim=1) + self.norm_offset)
        return cosines if self.training else self.scale * cosines - self.shift
