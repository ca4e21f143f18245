"""The networks, by name. Each takes images in [0, 1], shape (N, C, H, W), any H and W, and gives logits.

Each has ``features(x)`` (N, d), ``fc`` (the linear classifier), ``feature_dim`` = d, and forward = fc(features(x)).
"""

from collections.abc import Callable, Sequence

from torch import nn

from ltat_fast.errors import UserError

from .mobilenetv2 import MobileNetV2
from .preactresnet import preactresnet18, wrn_34_10
from .resnet import resnet18, smallresnet

ARCHS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "preactresnet18": preactresnet18,
    "wrn-34-10": wrn_34_10,
    "mobilenetv2": MobileNetV2,
    "smallresnet": smallresnet,
}


def build_model(
    arch: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network called ``arch``, freshly initialised from torch's global generator.

    ``mean`` and ``std`` (one value a channel, in [0, 1] units) normalise inside the network; by default nothing does.
    Raises :class:`UserError` for an unknown name.
    """
    if arch not in ARCHS:
        raise UserError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    return ARCHS[arch](num_classes, in_channels=in_channels, mean=mean, std=std)
