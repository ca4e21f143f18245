"""The networks, by name. Each maps images (N, C, H, W) in [0, 1], of any H and W, to logits (N, num_classes).

Each has ``features(x)`` (N, d), ``fc`` (the linear classifier) and ``feature_dim`` = d; forward(x) = fc(features(x)).
"""

from collections.abc import Callable

from ltat_fast.errors import UserError

from .classifier import ACTIVATIONS, ImageClassifier, set_activation
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


def build_model(arch: str, num_classes: int, *, in_channels: int = 3, activation: str = "relu") -> ImageClassifier:
    """Build the network called ``arch``, one of :data:`ARCHS`, with weights from torch's global generator.

    activation: "relu", or "silu" (with TRADES: Gowal et al., "Uncovering the Limits of Adversarial Training against
    Norm-Bounded Adversarial Examples", 2020). The initial weights do not depend on it.

    Raises:
        UserError: an unknown name.
    """
    if arch not in ARCHS:
        raise UserError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    if activation not in ACTIVATIONS:
        raise UserError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    model = ARCHS[arch](num_classes, in_channels=in_channels)
    set_activation(model, activation)
    return model
