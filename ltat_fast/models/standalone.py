"""A trained network in a folder of its own, loaded with torch and safetensors alone.

``python -m ltat_fast.export`` writes this file into such a folder too, behind the network's own code and that of
:mod:`~ltat_fast.models.classifier` and :mod:`~ltat_fast.models.cosine`: nothing here may use more of this package.
"""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from .cosine import CosineClassifier

WEIGHTS, CARD = "model.safetensors", "card.json"


def load(folder: Path, network: Callable[..., nn.Module]) -> nn.Module:
    """The network in ``folder``, in eval mode: images (N, C, H, W), float32 in [0, 1], to logits (N, num_classes).

    network: what builds its architecture.
    """
    card = json.loads((folder / CARD).read_text())["architecture"]
    tensors = load_file(folder / WEIGHTS)
    model = network(card["num_classes"], in_channels=card["in_channels"], mean=card["mean"], std=card["std"])
    if card["cosine"]:
        model.fc = CosineClassifier(model.feature_dim, shift=tensors["fc.shift"], **card["cosine"])
    model.load_state_dict(tensors)
    return model.eval()
