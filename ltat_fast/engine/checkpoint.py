"""Safetensors files that are whole or not there: weights, and the state a run resumes from.

``best.safetensors`` and ``last.safetensors`` hold a model's ``state_dict`` under its own names, for anyone to load.
``resume.safetensors`` holds weights, optimizer and the place in the run in one file, so that there is no moment at
which two files disagree; the state saved before it stays beside it, for when the disk damages the newest. Nothing
here is pickle.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ltat_fast.engine import files, log
from ltat_fast.errors import UserError


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict, previous: Path | None = None) -> None:
    """Write ``tensors`` and JSON-able ``metadata`` to ``path``: after a crash it holds the old file or the new one.

    previous: the name under which the old file is kept. Raises UserError where the disk is full or read-only.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    card = {"ltat_fast": json.dumps(metadata)}
    card["sha256"] = _digest(tensors, metadata)
    for abandoned in path.parent.glob(f".{path.name}.*.partial"):  # by a process that was killed while writing
        with files.writing(path):
            abandoned.unlink(missing_ok=True)
    with files.whole(path, previous) as file:
        file.write(serialise(tensors, metadata=card))


def read(path: Path, foreign: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file written by :func:`write`.

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


@dataclass
class Progress:
    """Where a stage is. ``epoch`` epochs and ``step`` steps of the next one are done.

    skipped: epoch and step, from 0, of the batch that was left out because it gave numbers that are not finite.
    """

    epoch: int = 0
    step: int = 0
    finished: bool = False
    best: dict = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: list[int] = field(default_factory=list)


def previous_of(path: Path) -> Path:
    """Where the state saved before the one in ``path`` is."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def has_state(path: Path) -> bool:
    return path.exists() or previous_of(path).exists()


def training_tensors(model: nn.Module, optimizer: torch.optim.SGD, method: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a step reads and changes. method: tensors the training method keeps between steps."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"method.{name}": tensor for name, tensor in method.items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    return tensors


def restore(
    tensors: dict[str, Tensor],
    source: Path,
    model: nn.Module,
    optimizer: torch.optim.SGD,
    arch: str,
    method: dict[str, Tensor],
) -> None:
    """The inverse of :func:`training_tensors`, in place: a captured step knows these tensors by their addresses."""
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    load_weights(model, weights, source, arch)
    for name, tensor in method.items():
        tensor.copy_(tensors[f"method.{name}"])
    for name, parameter in model.named_parameters():
        if (buffer := tensors.get(f"momentum.{name}")) is not None:
            optimizer.state[parameter]["momentum_buffer"].copy_(buffer)


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, progress: Progress, method: dict[str, Tensor]
) -> None:
    """Everything a bit-exact continuation needs; random streams are functions of the place and need no storing."""
    write(path, training_tensors(model, optimizer, method), vars(progress), previous=previous_of(path))


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, arch: str, method: dict[str, Tensor]
) -> Progress:
    """The inverse of :func:`save_state`, in place: from ``path``, or, where that is damaged, from the state before it.

    A damaged file is set aside, so that the next save does not put it in the place of the one that is whole.
    """
    tensors, metadata, source = _newest(path)
    restore(tensors, source, model, optimizer, arch, method)
    try:
        return Progress(**metadata)
    except TypeError:
        raise UserError(f"{source} is not the saved state of a run") from None


def _newest(path: Path) -> tuple[dict[str, Tensor], dict, Path]:
    previous = previous_of(path)
    if not path.exists():  # a save was cut off between its two renames
        return *read(previous), previous
    try:
        return *read(path), path
    except UserError as error:
        if not previous.exists():
            raise
        try:
            content = read(previous)
        except UserError:
            raise UserError(f"{error}, and so is {previous}: nothing is left to go on from") from None
        damaged = path.with_name(f"{path.name}.damaged")
        with files.writing(damaged):
            os.replace(path, damaged)
        log.say(f"WARNING: {error}; it is now {damaged.name}, and the run goes on from {previous.name}")
        return *content, previous
