"""Load an exported network with torch and safetensors only, or from the Hugging Face hub with huggingface_hub.

``python -m ltat_fast.export`` copies the code of this file into the export folder, together with the code of the
network, :mod:`~ltat_fast.models.classifier` and :mod:`~ltat_fast.models.cosine`. So it may not import anything else of
this package.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .classifier import ImageClassifier, set_activation
from .cosine import CosineClassifier

try:
    # pyright expects the class below
    from huggingface_hub import PyTorchModelHubMixin as HubMixin  # pyright: ignore[reportAssignmentType]
except ImportError:

    class HubMixin:
        """In the place of huggingface_hub's mixin if that package is not installed."""

        @classmethod
        def from_pretrained(cls, *_, **__):
            raise ImportError("from_pretrained() needs huggingface_hub; load_model() does not")


WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names that huggingface_hub's mixin expects


def build(architecture: dict, network: Callable[..., ImageClassifier]) -> ImageClassifier:
    """Build a network without its weights.

    Args:
        architecture: the entry of this name in config.json
        network: builds the network without the changes of a run, called with ``num_classes`` and ``in_channels``
    """
    num_classes = architecture["num_classes"]
    model = network(num_classes, in_channels=architecture["in_channels"])
    set_activation(model, architecture["activation"])
    if architecture["cosine"]:
        shift = torch.zeros(num_classes)  # the real one is in the weights file
        model.fc = CosineClassifier(model.feature_dim, shift=shift, **architecture["cosine"])
    return model


class Exported(HubMixin, ImageClassifier):
    """A network that is built from config.json: float32 images (N, C, H, W) in [0, 1] to logits (N, num_classes).

    A subclass is derived from the class of the network too, and sets :attr:`network`. With huggingface_hub it has
    ``from_pretrained(FOLDER or "USER/NAME")`` and ``save_pretrained(FOLDER)``.

    Args:
        config: the content of config.json; the mixin passes it by this name
    """

    network: Callable[..., ImageClassifier]
    """argument of :func:`build`"""

    def __init__(self, config: dict):
        nn.Module.__init__(self)
        # Take over all layers, so that the tensors have the names in the weights file.
        vars(self).update(vars(build(config["architecture"], self.network)))

    @classmethod
    def load(cls, folder: Path) -> "Exported":
        """Load the network in ``folder``, in eval mode."""
        model = cls(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model.eval()

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **arguments):
        # The mixin's default is False: tensors that are missing in the file would stay random without a word.
        # pyright does not know the mixin's method
        return super()._from_pretrained(strict=strict, **arguments)  # pyright: ignore[reportAttributeAccessIssue]
