"""Our networks, by name, and networks of other code, by specification (:mod:`~ltat_fast.models.libraries`).

Each maps images (N, C, H, W) in [0, 1] to logits (N, num_classes). Our own take any H and W. Each has ``features(x)``
(N, d), ``fc`` (the linear classifier) and ``feature_dim`` = d; forward(x) = fc(features(x)). Only networks of other
code may lack them: :attr:`ForeignClassifier.head` is None then.
"""

from collections.abc import Callable, Sequence

from ltat_fast.errors import UserError

from .classifier import ACTIVATIONS, ImageClassifier, set_activation
from .foreign import ForeignClassifier
from .libraries import DEFAULT_SIZE, Shape, build, is_foreign
from .mobilenetv2 import MobileNetV2
from .preactresnet import preactresnet18, wrn_34_10
from .resnet import resnet18, smallresnet

__all__ = ["ARCHS", "ForeignClassifier", "ImageClassifier", "build_model"]

ARCHS: dict[str, Callable[..., ImageClassifier]] = {
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
    activation: str = "relu",
    image_size: Sequence[int] = DEFAULT_SIZE,
    flag: str = "--arch",
) -> ImageClassifier:
    """Build the network ``arch``, one of :data:`ARCHS` or a specification, with weights from torch's global generator.

    activation: "relu", or "silu" (with TRADES: Gowal et al., "Uncovering the Limits of Adversarial Training against
    Norm-Bounded Adversarial Examples", 2020); the initial weights do not depend on it; only for our own networks.
    image_size: height and width, only for networks of other code. flag: begins the errors about those.

    Raises:
        UserError: an unknown name, or a network of other code that cannot be used.
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if is_foreign(arch):
        height, width = image_size
        return build(arch, Shape(num_classes, in_channels, (height, width)), flag)
    if arch not in ARCHS:
        raise UserError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    model = ARCHS[arch](num_classes, in_channels=in_channels)
    set_activation(model, activation)
    return model
