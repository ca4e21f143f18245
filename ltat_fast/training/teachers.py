"""Teachers given by ``--teacher``. docs/teachers.md is the page for users.

    PATH                        a finished run, or a .safetensors file with weights of one of our networks
    torchvision:NAME[@FILE]     a torchvision classifier, pretrained or with the .safetensors weights in FILE
    timm:NAME[@FILE]            the same for timm, if it is installed
    module:PACKAGE.MODULE:NAME  the return value of NAME() of that module: any network from images in [0, 1] to logits

:func:`find` reports every error that can be detected without the data. The function that it returns builds the network.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ltat_fast.errors import UserError
from ltat_fast.models.classifier import Normalize, with_float32_head
from ltat_fast.pixels import to_unit
from ltat_fast.runs.splits import Splits
from ltat_fast.runs.weights import load_model, load_weights, read_weights, weights_file
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import frozen_twin

Build = Callable[[Splits], nn.Module]


def find(name: str, arch: str, activation: str = "relu") -> Build:
    """Return the function that builds the teacher ``name``.

    arch, activation: network of a weights file that does not name its own. Raises UserError for a teacher that does not
    exist, if this can be detected without the data.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](rest)
    # A run folder has its own files; a single file may have been written by another program.
    path, foreign = weights_file(Path(name)), Path(name).is_file()
    read_weights(path, foreign)
    return lambda splits: load_model(path, torch.device("cpu"), arch, splits, foreign, activation)


def load(name: str, arch: str, splits: Splits, hardware: Hardware, activation: str = "relu") -> nn.Module:
    """Return the teacher ``name`` in eval mode on ``hardware.device``.

    arch, activation: as for :func:`find`. Raises UserError if the teacher cannot be built, or does not return finite
    logits of the right shape for two images of ``splits``.
    """
    model = _user_error_on_failure(name, lambda: find(name, arch, activation)(splits)).eval()
    # Float32 head, as in our own networks: IGDM subtracts logits from logits; bf16 would lose most of the difference.
    model = with_float32_head(model, splits.num_classes)
    model = model.to(hardware.device, memory_format=torch.channels_last)
    images = to_unit(splits.train.images[:2])
    with torch.no_grad():
        logits = _user_error_on_failure(name, lambda: frozen_twin(model, hardware)(images))
    if not isinstance(logits, Tensor) or logits.shape != (len(images), splits.num_classes):
        returned = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"--teacher {name} returns {returned} for two images, not logits of {splits.num_classes} classes each"
        )
    if not logits.isfinite().all():
        raise UserError(f"--teacher {name} returns logits that are not finite numbers")
    return model


def _user_error_on_failure(name: str, action: Callable):
    """Return ``action()``. Turn any exception, for example from a teacher's own code, into a UserError."""
    try:
        return action()
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise UserError(f"--teacher {name} cannot be used: {type(error).__name__}: {lines[0]}") from error


def _torchvision(rest: str) -> Build:
    from ltat_fast._torchvision import torchvision

    models = torchvision.models
    name, file = _split(rest)
    if name not in models.list_models(module=models):
        raise UserError(f"--teacher torchvision:{rest}: torchvision has no classifier called {name!r}")
    if file:
        return lambda splits: _with_weights(models.get_model(name, num_classes=splits.num_classes), file, name)

    def pretrained(splits: Splits) -> nn.Module:
        weights = models.get_model_weights(name).DEFAULT
        _check_classes(f"torchvision:{name}", len(weights.meta["categories"]), splits)
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

        def with_weights(splits: Splits) -> nn.Module:
            model = timm.create_model(name, num_classes=splits.num_classes, in_chans=splits.in_channels)
            return _with_weights(model, file, name)

        return with_weights

    def pretrained(splits: Splits) -> nn.Module:
        card = timm.get_pretrained_cfg(name)
        if card is None:
            raise UserError(f"--teacher timm:{name}: timm has no weights for it; use your own with timm:{name}@FILE")
        _check_classes(f"timm:{name}", card.num_classes, splits)
        return nn.Sequential(Normalize(card.mean, card.std), timm.create_model(name, pretrained=True))

    return pretrained


def _module(rest: str) -> Build:
    module, _, name = rest.partition(":")
    if not module or not name:
        raise UserError(f"--teacher module:{rest} is incomplete: write module:PACKAGE.MODULE:NAME")
    imported = _user_error_on_failure(f"module:{rest}", lambda: importlib.import_module(module))
    factory = getattr(imported, name, None)
    if not callable(factory):
        raise UserError(f"--teacher module:{rest}: {module} has no function called {name!r}")

    def build(splits: Splits) -> nn.Module:
        model = factory()
        if not isinstance(model, nn.Module):
            raise UserError(
                f"--teacher module:{rest}: {name}() returns a {type(model).__name__}, not a torch.nn.Module"
            )
        return model

    return build


KINDS: dict[str, Callable[[str], Build]] = {"torchvision": _torchvision, "timm": _timm, "module": _module}


def _split(rest: str) -> tuple[str, Path | None]:
    """Split NAME[@FILE] into name and file. Read the file once, so that damage is reported early."""
    name, at, file = rest.partition("@")
    if not at:
        return name, None
    read_weights(Path(file), foreign=True)
    return name, Path(file)


def _with_weights(model: nn.Module, file: Path, name: str) -> nn.Module:
    load_weights(model, read_weights(file, foreign=True)[0], file, name)
    return model


def _check_classes(name: str, classes: int, splits: Splits) -> None:
    if classes != splits.num_classes:
        raise UserError(
            f"--teacher {name}: its published weights have {classes} classes, the data has {splits.num_classes}; "
            f"use your own weights with {name}@FILE"
        )
