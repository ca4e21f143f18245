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


class ImageClassifier(nn.Module):
    """Base class: a subclass supplies :meth:`maps`, images (N, C, H, W) in [0, 1] to feature maps (N, d, h, w).

    ``mean`` and ``std`` (one value a channel; both or neither) put a :class:`Normalize` in front.
    """

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
        self.fc = nn.Linear(feature_dim, num_classes)

    def maps(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (N, feature_dim) of images (N, C, H, W)."""
        return self.maps(self.normalize(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        return self.fc(self.features(x))


def conv3x3(in_width: int, out_width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_width: int, out_width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 1, stride, bias=False)
