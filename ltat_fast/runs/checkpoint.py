"""The state from which a stage resumes: weights, optimizer and progress.

One file, ``resume.safetensors``, holds all of it, so that two files cannot disagree. The previous state is kept in
``resume.previous.safetensors``, in case the disk damages the newest one.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ltat_fast import files
from ltat_fast.errors import UserError
from ltat_fast.runs import log, schema
from ltat_fast.runs.weights import load_weights, read_weights, write_weights


@dataclass
class Progress:
    """Position and results of a stage.

    epoch: number of finished epochs. step: number of steps taken in the next epoch. best: epoch and scores of the best
    epoch. sums: :meth:`TrainStep.totals` of the current epoch. seconds: time spent in the current epoch. recorded: the
    sums, steps ("done") and seconds of the current epoch at its last record of steps. skipped: epoch and step, from 0,
    of the batch that is skipped because it gave numbers that are not finite.
    """

    epoch: int = 0
    step: int = 0
    finished: bool = False
    best: dict = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    recorded: dict[str, float] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)

    def steps_done(self, per_epoch: int) -> int:
        """The number of steps taken in the stage, which has ``per_epoch`` steps per epoch."""
        return self.epoch * per_epoch + self.step

    def steps_recorded(self, per_epoch: int) -> int:
        """The number of steps in records of steps. A state at the end of an epoch can be from before its last one."""
        return self.epoch * per_epoch + int(self.recorded.get("done", 0))


def previous_state_file(path: Path) -> Path:
    """Return the file that keeps the state saved before the one in ``path``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def has_state(path: Path) -> bool:
    """Return whether ``path`` or its previous state exists."""
    return path.exists() or previous_state_file(path).exists()


def training_tensors(model: nn.Module, optimizer: torch.optim.SGD, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors that a step changes, by name.

    state: those besides model and momentum, with names that start with neither "model." nor "momentum.".
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | state
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
    state: dict[str, Tensor],
) -> None:
    """Load ``tensors``, made by :func:`training_tensors` and read from ``source``, into the other arguments.

    The tensors are overwritten in place, because a captured step uses their addresses.
    """
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    load_weights(model, weights, source, arch)
    momentum = {f"momentum.{name}": optimizer.state[p].get("momentum_buffer") for name, p in model.named_parameters()}
    for name, tensor in (state | {name: buffer for name, buffer in momentum.items() if buffer is not None}).items():
        if (saved := tensors.get(name)) is None and name in momentum:
            continue
        if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise UserError(f"{source} is not a saved state of this run: {name} does not fit")
        tensor.copy_(saved)


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, progress: Progress, state: dict[str, Tensor]
) -> None:
    """Write everything that a bit-equal resumption needs.

    Random streams need no storage, because they depend only on the position in the run.
    """
    tensors = training_tensors(model, optimizer, state)
    write_weights(path, tensors, vars(progress), previous=previous_state_file(path))


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, arch: str, state: dict[str, Tensor]
) -> Progress:
    """Load the state in ``path``, or the previous state if that file is damaged, in place. Return its progress.

    The damaged file is renamed, so that the next save does not overwrite the previous state with it. Raises UserError
    if no undamaged state is left.
    """
    tensors, metadata, source = _read_newest(path)
    if metadata.keys() != schema.PROGRESS.keys():
        raise UserError(f"{source} is not the saved state of a run")
    schema.check(source, metadata, schema.PROGRESS)
    restore(tensors, source, model, optimizer, arch, state)
    return Progress(**metadata)


def _read_newest(path: Path) -> tuple[dict[str, Tensor], dict, Path]:
    """Return tensors, metadata and path of the newest undamaged state."""
    previous = previous_state_file(path)
    if not path.exists():  # a save was killed between its two renames
        return *read_weights(previous), previous
    try:
        return *read_weights(path), path
    except UserError as error:
        if not previous.exists():
            raise
        try:
            content = read_weights(previous)
        except UserError:
            raise UserError(f"{error}, and so is {previous}: no state is left to resume from") from None
        damaged = path.with_name(f"{path.name}.damaged")
        with files.oserror_as_user_error(damaged):
            os.replace(path, damaged)
        log.say(f"WARNING: {error}; renamed it to {damaged.name}, resuming from {previous.name}")
        return *content, previous
