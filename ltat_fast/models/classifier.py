"""The parts that all networks share: feature maps, pooling, one linear layer in full precision, the activation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Compute (x - mean) / std per channel, as part of a network, so that eps keeps the units of pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast and a frozen twin leave in the dtype of its weights.

    As the last layer it costs almost nothing. Losses that subtract logits from logits (IGDM) need it: the rounding of
    both to bfloat16 would be larger than their difference.
    """

    def forward(self, x: Tensor) -> Tensor:
        x, device = x.to(self.weight.dtype), self.weight.device.type
        # torch.export and shape propagation on the "meta" device do not support autocast.
        if torch.compiler.is_exporting() or not torch.amp.is_autocast_available(device):
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            return super().forward(x)


def has_hooks(module: nn.Module) -> bool:
    """Whether code is attached to the forward pass of ``module``, which a module in its place would not run."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def with_float32_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Replace each ``nn.Linear`` of ``num_classes`` outputs by a :class:`FullPrecisionLinear` with the same parameters.

    For networks of other packages, whose last layer would otherwise run in the dtype of autocast or of a frozen twin.
    Layers of derived classes and layers with forward hooks stay as they are.

    Returns:
        ``model`` itself, changed in place, or the new layer if ``model`` is such a linear layer.
    """
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if type(layer) is not nn.Linear or layer.out_features != num_classes:
            continue
        if has_hooks(layer):
            continue
        head = FullPrecisionLinear(layer.in_features, num_classes, bias=layer.bias is not None, device="meta")
        head.weight, head.bias = layer.weight, layer.bias
        head.train(layer.training)
        if layer is model:
            return head
        model.set_submodule(name, head)
    return model


ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


def set_activation(model: nn.Module, name: str) -> None:
    """Replace each ``nn.ReLU`` of ``model``, in place, by the activation ``name``, one of :data:`ACTIVATIONS`.

    Parameters, buffers and their names stay the same. A SiLU is not computed in place, because its gradient needs its
    input.
    """
    for path, module in list(model.named_modules()):
        if name != "relu" and type(module) is nn.ReLU:
            model.set_submodule(path, ACTIVATIONS[name]())


class ImageClassifier(nn.Module):
    """Base class of the networks: images (N, C, H, W) in [0, 1] to logits (N, num_classes).

    A subclass implements :meth:`feature_maps`.
    """

    features_in_training = False
    """whether :meth:`forward` returns (logits, pooled features) in train mode, for losses that need both"""
    draws_in_training = False
    """whether :meth:`forward` draws random numbers in train mode, for example for dropout"""

    def __init__(self, feature_dim: int, num_classes: int):
        super().__init__()
        self.feature_dim = feature_dim
        self.fc = FullPrecisionLinear(feature_dim, num_classes)

    def feature_maps(self, x: Tensor) -> Tensor:
        """Return the feature maps (N, feature_dim, h, w) of images (N, C, H, W)."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features (N, feature_dim) of images (N, C, H, W)."""
        return self.feature_maps(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (N, num_classes) of images (N, C, H, W)."""
        features = self.features(x)
        logits = self.fc(features)
        return (logits, features) if self.features_in_training and self.training else logits


def conv3x3(in_width: int, out_width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_width: int, out_width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 1, stride, bias=False)
