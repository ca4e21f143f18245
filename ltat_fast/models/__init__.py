"""The networks, by name. Each maps images (N, C, H, W) in [0, 1], of any H and W, to logits (N, num_classes).

Each has ``features(x)`` (N, d), ``fc`` (the linear classifier) and ``feature_dim`` = d; forward(x) = fc(features(x)).
"""

from collections.abc import Callable

from ltat_fast.errors import UserError

from .classifier import ImageClassifier
from .mobilenetv2 import MobileNetV2
from .preactresnet import preactresnet18, wrn_34_10
from .resnet import resnet18, smallresnet

ARCHS: dict[str, Callable[..., ImageClassifier]] = {
    "resnet18": resnet18,
    "preactresnet18": preactresnet18,
    "wrn-34-10": wrn_34_10,
    "mobilenetv2": MobileNetV2,
    "smallresnet": smallresnet,
}


def build_model(arch: str, num_classes: int, *, in_channels: int = 3) -> ImageClassifier:
    """Build the network called ``arch``, one of :data:`ARCHS`, with weights from torch's global generator.

    Raises:
        UserError: an unknown name.
    """
    if arch not in ARCHS:
        raise UserError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    return ARCHS[arch](num_classes, in_channels=in_channels)
