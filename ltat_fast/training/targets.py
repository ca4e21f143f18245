"""Networks that are evaluated without a run: what stands in the place of the run folder of ``evaluate``.

FILE.safetensors            weights of a run, or of another program for the network of --arch
FOLDER                      what ``python -m ltat_fast.export`` wrote: config.json and model.safetensors
torchvision:NAME[@FILE]     a torchvision classifier, pretrained or with the .safetensors weights in FILE
timm:NAME[@FILE]            the same for timm, if it is installed
module:PACKAGE.MODULE:NAME  the return value of NAME() of that module: any network from images in [0, 1] to logits
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ltat_fast.config import Config
from ltat_fast.errors import UserError
from ltat_fast.models import ARCHS
from ltat_fast.models.libraries import is_foreign, require_logits, user_error_on_failure
from ltat_fast.models.standalone import CONFIG, WEIGHTS, build
from ltat_fast.pixels import to_unit
from ltat_fast.runs.export import is_export
from ltat_fast.runs.json_object import JsonObject
from ltat_fast.runs.results import CheckpointResults, EvalFile
from ltat_fast.runs.splits import Splits
from ltat_fast.runs.threats import Threat
from ltat_fast.runs.weights import build_from_card, load_weights, read_weights, state_digest
from ltat_fast.training import teachers
from ltat_fast.training.device import Hardware
from ltat_fast.training.evaluation import Subject, evaluate_subject

NAME = "model"
"""under which the results stand in the file"""


def is_target(name: str) -> bool:
    """Whether ``name`` is a network of this file, and not a run folder."""
    return is_foreign(name) or name.endswith(".safetensors") or is_export(Path(name))


def find(name: str, arch: str | None) -> teachers.Build:
    """Return the function that builds the network ``name``.

    arch: network of a weights file that does not name its own. Raises UserError if the network does not exist, as far
    as this can be detected without the data.
    """
    if not is_foreign(name) and Path(name).is_dir():
        return _exported(Path(name))
    if not is_foreign(name) and arch is None and "arch" not in read_weights(Path(name), foreign=True)[1]:
        raise UserError(f"{name} does not say which network it belongs to: give --arch")
    return teachers.find(name, arch or Config.arch, flag="evaluate")


def load(name: str, arch: str | None, splits: Splits, device: torch.device) -> nn.Module:
    """Return the network ``name`` in eval mode on ``device``.

    Raises UserError if it cannot be built, or does not return float32 logits of the classes of ``splits``.
    """
    model = user_error_on_failure(name, lambda: find(name, arch)(splits)).eval().to(device)
    images = to_unit(splits.test.images[torch.arange(min(2, len(splits.test)))])
    with torch.no_grad():
        logits = user_error_on_failure(name, lambda: model(images))
    require_logits(name, logits, len(images), splits.num_classes)
    return model


def evaluate_target(
    name: str,
    arch: str | None,
    config: Config,
    splits: Splits,
    hardware: Hardware,
    attacks: list[str],
    threats: Sequence[Threat],
    out: Path | None,
    again: bool = False,
) -> CheckpointResults:
    """Evaluate the network ``name`` with the data, limits and batch size of ``config``, and return all its results.

    out: a file in the format of eval.json, to which each result is added when its attack is finished, and whose results
    are not measured again; None: the results are kept nowhere. threats: the balls, of which the first is that of
    ``config``.
    """
    model = load(name, arch, splits, hardware.device)
    subject = Subject(state_digest(model), f"{name}, on the test set:", lambda: model)
    with tempfile.TemporaryDirectory() as folder:
        file = out or Path(folder) / "eval.json"
        evaluate_subject(config, splits, hardware, subject, file, [NAME], attacks, again, threats)
        return EvalFile.load_or_empty(file).of(NAME)


def _exported(folder: Path) -> teachers.Build:
    """Return the function that builds the network in an export. It runs no code of the folder."""
    content = JsonObject.load(folder / CONFIG)
    architecture = content.object("architecture")
    arch = architecture.take("arch", lambda arch: isinstance(arch, str))
    if arch.startswith("module:"):
        raise UserError(f"{folder} is of the network {arch}, code that it does not contain: evaluate {arch} instead")
    path = folder / WEIGHTS
    read_weights(path, foreign=True)

    def network(splits: Splits) -> nn.Module:
        tensors, _ = read_weights(path, foreign=True)
        if is_foreign(arch):
            card = {**architecture.content, "image_size": splits.image_size}
            return build_from_card(path, tensors, card)
        if arch not in ARCHS:
            raise content.damaged(f"this version has no network {arch!r}")
        model = user_error_on_failure(str(folder), lambda: build(architecture.content, ARCHS[arch]))
        load_weights(model, tensors, path, arch)
        return model

    return network
