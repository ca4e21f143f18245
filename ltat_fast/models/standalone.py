"""Load an exported network with torch and safetensors only.

``python -m ltat_fast.export`` copies the code of this file into the export folder, together with the code of the
network, :mod:`~ltat_fast.models.classifier` and :mod:`~ltat_fast.models.cosine`. So it may not import anything else of
this package.
"""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from .classifier import ImageClassifier, set_activation
from .cosine import CosineClassifier

WEIGHTS, CARD = "model.safetensors", "card.json"


def load(folder: Path, network: Callable[..., ImageClassifier]) -> ImageClassifier:
    """Load the network in ``folder``, in eval mode: float32 images (N, C, H, W) in [0, 1] to logits (N, num_classes).

    Args:
        network: builds the architecture, called with ``num_classes`` and ``in_channels``
    """
    card = json.loads((folder / CARD).read_text())["architecture"]
    tensors = load_file(folder / WEIGHTS)
    model = network(card["num_classes"], in_channels=card["in_channels"])
    set_activation(model, card["activation"])
    if card["cosine"]:
        model.fc = CosineClassifier(model.feature_dim, shift=tensors["fc.shift"], **card["cosine"])
    model.load_state_dict(tensors)
    return model.eval()
