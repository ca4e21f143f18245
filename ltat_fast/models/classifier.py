"""What every network here is: feature maps, global average pooling, one linear layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std a channel. Lives inside the network so that eps keeps its meaning in [0, 1] pixel units."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast and a frozen twin leave in the dtype of its weights.

    As the last layer it costs nothing, and losses that subtract logits from logits (IGDM) would lose the difference
    to a rounding of both.
    """

    def forward(self, x: Tensor) -> Tensor:
        x, device = x.to(self.weight.dtype), self.weight.device.type
        # No autocast: in an exported program, and in shape propagation on "meta".
        if torch.compiler.is_exporting() or not torch.amp.is_autocast_available(device):
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            return super().forward(x)


class ImageClassifier(nn.Module):
    """Base class: a subclass supplies :meth:`maps`, images (N, C, H, W) in [0, 1] to feature maps (N, d, h, w).

    ``mean`` and ``std`` (one value a channel; both or neither) put a :class:`Normalize` in front.
    """

    features_in_training = False
    """whether :meth:`forward` gives (logits, pooled features) in train mode, for a loss that reads both"""

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ):
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together: give both or neither")
        if mean is not None and not len(mean) == len(std) == in_channels:
            raise ValueError(f"mean and std need one value for each of the {in_channels} channels")
        self.feature_dim = feature_dim
        self.normalize = nn.Identity() if mean is None else Normalize(mean, std)
        self.fc = FullPrecisionLinear(feature_dim, num_classes)

    def maps(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (N, feature_dim) of images (N, C, H, W)."""
        return self.maps(self.normalize(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        features = self.features(x)
        logits = self.fc(features)
        return (logits, features) if self.features_in_training and self.training else logits


def conv3x3(in_width: int, out_width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_width: int, out_width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 1, stride, bias=False)
