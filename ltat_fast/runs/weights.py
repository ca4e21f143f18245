"""Weight files: safetensors with a checksum and a card that describes the network; networks built from them.

``best.safetensors`` and ``last.safetensors`` hold a model's ``state_dict`` under its own names, so that any program
can load them. Nothing here uses pickle.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ltat_fast import __version__, files
from ltat_fast.config import Config
from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS, Method
from ltat_fast.models import build_model
from ltat_fast.runs.splits import Splits


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict, previous: Path | None = None) -> None:
    """Write ``tensors`` and JSON-able ``metadata`` to ``path``: after a crash it holds the old file or the new one.

    previous: the name under which the old file is kept. Raises UserError where the disk is full or read-only.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    card = {"ltat_fast": json.dumps(metadata)}
    card["sha256"] = _digest(tensors, metadata)
    for abandoned in path.parent.glob(f".{path.name}.*.partial"):  # by a process that was killed while writing
        with files.oserror_as_user_error(path):
            abandoned.unlink(missing_ok=True)
    with files.atomic_write(path, previous) as file:
        file.write(serialise(tensors, metadata=card))


def read_weights(path: Path, foreign: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file written by :func:`write_weights`.

    foreign: or of any safetensors file; without a checksum nobody can tell damage, and the metadata is empty.
    Raises UserError if it is missing, not safetensors, cut short or changed since it was written.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; other formats can run code when loaded and are refused")
    try:
        with safe_open(path, framework="pt") as file:
            card = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = json.loads(card.get("ltat_fast", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error})") from None
    ours = "sha256" in card or "ltat_fast" in card  # one of the two may be what is damaged
    if not (ours or foreign):
        raise UserError(f"{path} is damaged, or not written by ltat_fast: it carries no checksum")
    if ours and card.get("sha256") != _digest(tensors, metadata):
        raise UserError(f"{path} is damaged: its content does not match its checksum")
    return tensors, metadata


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path, arch: str) -> None:
    """Load weights strictly; a checkpoint that does not fit raises UserError with the first differences."""
    own = model.state_dict()
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = [f"lacks {missing[0]} ({len(missing)} missing)"] if missing else []
    problems += [f"has {unknown[0]}, unknown to it ({len(unknown)} more than it has)"] if unknown else []
    problems += shapes[:1]
    if problems:
        raise UserError(f"{source} does not fit {arch}: " + "; ".join(problems))
    if broken := [name for name in own if not tensors[name].isfinite().all()]:
        raise UserError(f"{source} holds numbers that are not finite, in {broken[0]} ({len(broken)} such tensors)")
    model.load_state_dict(tensors)


def new_model(arch: str, data: Splits, device: torch.device, seed: int, method: Method) -> nn.Module:
    """A network in NHWC with weights that are a function of ``seed`` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(arch, data.num_classes, in_channels=data.in_channels)
        model = method.wrap_model(model, torch.tensor(data.counts))
    return model.to(device, memory_format=torch.channels_last)


def weights_card(config: Config, data: Splits, method: Method, epoch: int) -> dict:
    """What a weights file says of itself."""
    return {
        "arch": config.arch,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": list(data.train.images.shape[-2:]),
        "class_names": list(data.class_names),
        "dataset": config.dataset,
        "imbalance_ratio": config.imbalance_ratio,
        "method": method.name,
        "method_options": dataclasses.asdict(method),
        "class_counts": data.counts,
        "eps": config.eps,
        "epoch": epoch,
        "version": __version__,
    }


def load_model(path: Path, device: torch.device, arch: str, data: Splits, foreign: bool = False) -> nn.Module:
    """The network in a weights file, for ``data``.

    foreign: the file may be somebody else's state dict; ``arch`` is what it is of, where it does not say so itself.
    """
    tensors, card = read_weights(path, foreign)
    card = {"arch": arch, "num_classes": data.num_classes, "in_channels": data.in_channels} | card
    if card["num_classes"] != data.num_classes:
        raise UserError(f"{path} knows {card['num_classes']} classes, the data has {data.num_classes}")
    if card["in_channels"] != data.in_channels:
        raise UserError(f"{path} takes {card['in_channels']} channels, the images have {data.in_channels}")
    names = list(zip(card.get("class_names", data.class_names), data.class_names, strict=True))
    if other := [pair for pair in names if pair[0] != pair[1]]:
        raise UserError(f"{path} knows other classes than the data: {other[0][0]!r} where the data has {other[0][1]!r}")
    return build_from_card(path, tensors, card).to(device, memory_format=torch.channels_last)


def build_from_card(path: Path, tensors: dict[str, Tensor], card: dict) -> nn.Module:
    """The network that the ``card`` of a weights file describes, with its ``tensors``."""
    model = build_model(card["arch"], card["num_classes"], in_channels=card["in_channels"])
    if "method" in card:
        try:
            method = METHODS[card["method"]](**card["method_options"])
        except (KeyError, TypeError):
            raise UserError(f"{path} is of a method this version does not know, {card['method']!r}") from None
        model = method.wrap_model(model, torch.tensor(card["class_counts"]))
    load_weights(model, tensors, path, card["arch"])
    return model


def weights_file(path: Path, which: str = "last") -> Path:
    """The weights file meant by ``path``, a run folder or a file."""
    file = path / "checkpoints" / f"{which}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} has no finished weights: {file} does not exist")
    return file


def weights_digest(path: Path) -> str:
    """The checksum a weights file carries, to tell whether a result belongs to it."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("sha256", "")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error})") from None
