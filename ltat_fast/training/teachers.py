"""Teachers from anywhere: what ``--teacher`` may name. docs/teachers.md tells it from the user's side.

    PATH                        a finished run of ours, or the .safetensors weights of one of our networks
    torchvision:NAME[@FILE]     a torchvision classifier, pretrained, or with the .safetensors weights in FILE
    timm:NAME[@FILE]            the same of timm, if that is installed
    module:PACKAGE.MODULE:NAME  what NAME() of that module returns: any network from images in [0, 1] to logits

Looking one up (:func:`find`) refuses what can be refused before the data is read; building it needs the data.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ltat_fast.errors import UserError
from ltat_fast.models.classifier import FullPrecisionLinear, Normalize
from ltat_fast.pixels import to_unit
from ltat_fast.runs.splits import Splits
from ltat_fast.runs.weights import load_model, load_weights, read_weights, weights_file
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import frozen_twin

Build = Callable[[Splits], nn.Module]


def find(name: str, arch: str) -> Build:
    """What builds the teacher called ``name``. arch: of a weights file that does not say its own.

    Raises UserError if there is no such teacher, as far as that shows without the data.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](rest)
    path, foreign = weights_file(Path(name)), Path(name).is_file()
    read_weights(path, foreign)
    return lambda data: load_model(path, torch.device("cpu"), arch, data, foreign)


def load(name: str, arch: str, data: Splits, hardware: Hardware) -> nn.Module:
    """The teacher called ``name``, tried on two images of the data. Raises UserError if it does not fit them."""
    model = _attempt(name, lambda: find(name, arch)(data)).eval()
    for module in model.modules():
        # As in our own networks: IGDM subtracts logits from logits, and in bf16 little would be left.
        if type(module) is nn.Linear and module.out_features == data.num_classes:
            module.__class__ = FullPrecisionLinear
    model = model.to(hardware.device, memory_format=torch.channels_last)
    images = to_unit(data.train.images[:2])
    with torch.no_grad():
        logits = _attempt(name, lambda: frozen_twin(model, hardware)(images))
    if not isinstance(logits, Tensor) or logits.shape != (len(images), data.num_classes):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"--teacher {name} gives {given} for two images, not logits of {data.num_classes} classes each")
    if not logits.isfinite().all():
        raise UserError(f"--teacher {name} gives logits that are not finite numbers")
    return model


def _attempt(name: str, action: Callable):
    """``action()``; whatever somebody else's code raises becomes one sentence."""
    try:
        return action()
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"--teacher {name} cannot be used: {type(error).__name__}: {reason}") from error


def _torchvision(rest: str) -> Build:
    from ltat_fast._torchvision import torchvision

    models = torchvision.models
    name, file = _split(rest)
    if name not in models.list_models(module=models):
        raise UserError(f"--teacher torchvision:{rest}: torchvision has no classifier called {name!r}")
    if file:
        return lambda data: _with_weights(models.get_model(name, num_classes=data.num_classes), file, name)

    def pretrained(data: Splits) -> nn.Module:
        weights = models.get_model_weights(name).DEFAULT
        _check_classes(f"torchvision:{name}", len(weights.meta["categories"]), data)
        preset = weights.transforms()
        return nn.Sequential(Normalize(preset.mean, preset.std), models.get_model(name, weights=weights))

    return pretrained


def _timm(rest: str) -> Build:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--teacher timm:{rest} needs the package timm ({error}); pip install timm") from None

    name, file = _split(rest)
    if not timm.is_model(name):
        raise UserError(f"--teacher timm:{rest}: timm has no network called {name!r}")
    if file:

        def with_weights(data: Splits) -> nn.Module:
            model = timm.create_model(name, num_classes=data.num_classes, in_chans=data.in_channels)
            return _with_weights(model, file, name)

        return with_weights

    def pretrained(data: Splits) -> nn.Module:
        card = timm.get_pretrained_cfg(name)
        if card is None:
            raise UserError(f"--teacher timm:{name}: timm has no weights for it; give your own, timm:{name}@FILE")
        _check_classes(f"timm:{name}", card.num_classes, data)
        return nn.Sequential(Normalize(card.mean, card.std), timm.create_model(name, pretrained=True))

    return pretrained


def _module(rest: str) -> Build:
    module, _, name = rest.partition(":")
    if not module or not name:
        raise UserError(f"--teacher module:{rest} lacks a part: module:PACKAGE.MODULE:NAME")
    factory = getattr(_attempt(f"module:{rest}", lambda: importlib.import_module(module)), name, None)
    if not callable(factory):
        raise UserError(f"--teacher module:{rest}: {module} has no function called {name!r}")

    def build(data: Splits) -> nn.Module:
        model = factory()
        if not isinstance(model, nn.Module):
            raise UserError(f"--teacher module:{rest}: {name}() gives a {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


KINDS: dict[str, Callable[[str], Build]] = {"torchvision": _torchvision, "timm": _timm, "module": _module}


def _split(rest: str) -> tuple[str, Path | None]:
    """NAME[@FILE]; a FILE is read, to find it whole."""
    name, at, file = rest.partition("@")
    if at:
        read_weights(Path(file), foreign=True)
    return name, Path(file) if at else None


def _with_weights(model: nn.Module, file: Path, name: str) -> nn.Module:
    load_weights(model, read_weights(file, foreign=True)[0], file, name)
    return model


def _check_classes(name: str, known: int, data: Splits) -> None:
    if known != data.num_classes:
        raise UserError(
            f"--teacher {name}: its published weights know {known} classes, the data has {data.num_classes}; "
            f"give weights of your own, {name}@FILE"
        )
