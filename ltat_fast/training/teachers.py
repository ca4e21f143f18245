"""Teachers given by ``--teacher``. docs/teachers.md is the page for users.

    PATH                        a finished run, or a .safetensors file with weights of one of our networks
    torchvision:NAME[@FILE]     a torchvision classifier, pretrained or with the .safetensors weights in FILE
    timm:NAME[@FILE]            the same for timm, if it is installed
    module:PACKAGE.MODULE:NAME  the return value of NAME() of that module: any network from images in [0, 1] to logits

:func:`find` reports every error that can be detected without the data. The function that it returns builds the network.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ltat_fast.errors import UserError
from ltat_fast.models import libraries
from ltat_fast.models.classifier import Normalize, with_float32_head
from ltat_fast.models.libraries import Network, Shape, is_foreign, require_logits, user_error_on_failure
from ltat_fast.pixels import to_unit
from ltat_fast.runs.splits import Splits
from ltat_fast.runs.weights import load_model, load_weights, read_weights, weights_file
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import frozen_twin

Build = Callable[[Splits], nn.Module]


def find(name: str, arch: str, activation: str = "relu", flag: str = "--teacher") -> Build:
    """Return the function that builds the teacher ``name``.

    arch, activation: network of a weights file that does not name its own. flag: begins the errors. Raises UserError
    for a teacher that does not exist, if this can be detected without the data.
    """
    if is_foreign(name):
        if name.startswith("module:"):
            network = libraries.find(name, flag)
            return lambda splits: network.create(_shape(splits))
        spec, file = libraries.split_file(name)
        return _with_file_or_published(libraries.find(spec, flag), file)
    # A run folder has its own files; a single file may have been written by another program.
    path, foreign = weights_file(Path(name)), Path(name).is_file()
    read_weights(path, foreign)
    return lambda splits: load_model(path, torch.device("cpu"), arch, splits, foreign, activation)


def load(name: str, arch: str, splits: Splits, hardware: Hardware, activation: str = "relu") -> nn.Module:
    """Return the teacher ``name`` in eval mode on ``hardware.device``.

    arch, activation: as for :func:`find`. Raises UserError if the teacher cannot be built, or does not return finite
    logits of the right shape for two images of ``splits``.
    """
    flag = f"--teacher {name}"
    model = user_error_on_failure(flag, lambda: find(name, arch, activation)(splits)).eval()
    # Float32 head, as in our own networks: IGDM subtracts logits from logits; bf16 would lose most of the difference.
    model = with_float32_head(model, splits.num_classes)
    model = model.to(hardware.device, memory_format=torch.channels_last)
    images = to_unit(splits.test.images[torch.arange(2)])
    with torch.no_grad():
        logits = user_error_on_failure(flag, lambda: frozen_twin(model, hardware)(images))
    require_logits(flag, logits, len(images), splits.num_classes)
    if not logits.isfinite().all():
        raise UserError(f"--teacher {name} returns logits that are not finite numbers")
    return model


def _with_file_or_published(network: Network, file: Path | None) -> Build:
    """Return the function that builds ``network`` with the weights in ``file``, or else with its published ones."""
    if file:
        read_weights(file, foreign=True)  # report damage early

        def with_weights(splits: Splits) -> nn.Module:
            net = network.create(_shape(splits))
            load_weights(net, read_weights(file, foreign=True)[0], file, network.rest)
            return net

        return with_weights

    def pretrained(splits: Splits) -> nn.Module:
        classes = network.published_classes()
        if classes != splits.num_classes:
            raise UserError(
                f"{network.flag} {network.spec}: its published weights have {classes} classes, the data has "
                f"{splits.num_classes}; use your own weights with {network.spec}@FILE"
            )
        mean, std = network.normalisation() or ((0.0,), (1.0,))
        return nn.Sequential(Normalize(mean, std), network.published())

    return pretrained


def _shape(splits: Splits) -> Shape:
    return Shape(splits.num_classes, splits.in_channels, splits.image_size)
