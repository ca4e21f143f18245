"""The state that a stage of training resumes from: weights, optimizer and progress in one file.

``resume.safetensors`` holds everything, so that no two files can disagree. The state saved before it is kept beside it,
for the case that the disk damages the newest one.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ltat_fast import files
from ltat_fast.errors import UserError
from ltat_fast.runs import log
from ltat_fast.runs.weights import load_weights, read_weights, write_weights


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
    write_weights(path, training_tensors(model, optimizer, method), vars(progress), previous=previous_of(path))


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
        return *read_weights(previous), previous
    try:
        return *read_weights(path), path
    except UserError as error:
        if not previous.exists():
            raise
        try:
            content = read_weights(previous)
        except UserError:
            raise UserError(f"{error}, and so is {previous}: nothing is left to go on from") from None
        damaged = path.with_name(f"{path.name}.damaged")
        with files.oserror_as_user_error(damaged):
            os.replace(path, damaged)
        log.say(f"WARNING: {error}; it is now {damaged.name}, and the run goes on from {previous.name}")
        return *content, previous
