"""The cosine classifier of RoBal (Wu et al., CVPR 2021, section 4.1) and the logits it exports."""

import torch.nn.functional as F
from torch import Tensor

from .classifier import FullPrecisionLinear


class CosineClassifier(FullPrecisionLinear):
    """Features h (N, d) to c_k = <h / ||h||, W_k / (||W_k|| + g)>, (N, C), in train mode; in eval mode, which is what
    is attacked, tested and exported, to the logits ``scale`` c - ``shift``.

    norm_offset: g. shift: float ``(C,)``, saved with the weights.
    """

    def __init__(self, feature_dim: int, norm_offset: float, scale: float, shift: Tensor):
        super().__init__(feature_dim, len(shift), bias=False)
        self.norm_offset, self.scale = norm_offset, scale
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        direction = F.normalize(x.to(self.weight.dtype), dim=1)
        cosines = super().forward(direction) / (self.weight.norm(dim=1) + self.norm_offset)
        return cosines if self.training else self.scale * cosines - self.shift
