"""Return to the last good state: after a process was killed, a disk damaged a file, or a number was not finite.

A run checks its sums only every ``--log-every`` steps. When a check fails, the run loads the last good state and
repeats the steps since then, with a check after each. Order, augmentation and noise depend only on the position in the
run, so the bad step is repeated exactly. Its inputs are written to a file for ``python -m ltat_fast.replay``.
"""

import shlex
from pathlib import Path

import torch
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.runs import checkpoint, log, schema
from ltat_fast.runs.checkpoint import Progress
from ltat_fast.runs.weights import read_weights, write_weights
from ltat_fast.training import distributed
from ltat_fast.training.stage import Stage
from ltat_fast.training.step import TrainStep


class Diverged(Exception):
    """A loss or a weight is not finite. Detected in ``epoch``, from 0, after ``steps_done`` of its steps."""

    def __init__(self, message: str, epoch: int, steps_done: int):
        super().__init__(message)
        self.epoch, self.steps_done = epoch, steps_done


def load_last_good_state(stage: Stage, optimizer: torch.optim.SGD) -> Progress:
    """Load the newest undamaged state into ``stage`` and ``optimizer``, in place, and return its progress."""
    with distributed.main_first():  # the main process renames a damaged file
        progress = checkpoint.load_state(stage.state_file, stage.model, optimizer, stage.config.arch, stage.state)
    if stage.modifiers.ema:
        stage.modifiers.ema.copy_buffers(stage.model)
    if progress.best and not progress.finished:
        progress.best = _best_on_disk(stage)
    return progress


def _best_on_disk(stage: Stage) -> dict:
    """Return epoch and scores of best.safetensors. Its epoch may be after the loaded state; it is then repeated."""
    try:
        file = stage.checkpoints / "best.safetensors"
        _, card = read_weights(file)
        schema.check(file, card, schema.CARD, needed=("epoch", "scores"))
    except UserError as error:
        log.say(f"WARNING: {error}; the best epoch is selected from the remaining epochs")
        return {}
    return {"epoch": card["epoch"], **card["scores"]}


def find_non_finite(step: TrainStep, totals: dict[str, float]) -> str | None:
    """Return "loss" or "weights", whichever is not finite after the steps summed in ``totals``, or None.

    A gradient that is not finite makes the weights non-finite.
    """
    if totals["first_bad"] >= 0:
        return "loss"
    finite = torch.stack([tensor.isfinite().all() for tensor in step.model.state_dict().values()]).all()
    return "weights" if distributed.any_process(not finite, step.device) else None


def skip_bad_batch(stage: Stage, step: TrainStep, diverged: Diverged) -> Progress:
    """Load the last good state and mark the batch that caused ``diverged`` to be skipped.

    Raises :class:`Diverged` with the complete message if the run must stop: because of ``--on-nan``, because a batch
    was skipped before, or because no repeated step gave a number that is not finite.
    """
    progress = load_last_good_state(stage, step.optimizer)
    found = _first_bad_step(stage, step, progress, (diverged.epoch, diverged.steps_done))
    state = f"the last good state (epoch {progress.epoch}, step {progress.step}) is in {stage.checkpoints}"
    if found is None:
        repeated = "repeating the steps since the last good state gave finite numbers, so no batch is to blame"
        message = f"{stage.name}: {diverged} not finite in epoch {diverged.epoch + 1}; {repeated}; {state}"
        raise Diverged(message, diverged.epoch, diverged.steps_done)
    what, epoch, number, dump = found
    replay = f"python -m ltat_fast.replay {shlex.quote(str(dump))} shows where it begins"
    message = f"{stage.name}: {what} not finite at epoch {epoch + 1}, step {number + 1}; {replay}"
    if stage.config.on_nan != "rollback":
        raise Diverged(f"{message}; {state}; a lower --lr usually helps", epoch, number)
    if progress.skipped:
        raise Diverged(f"{message}; a batch was skipped before, so the run stops; {state}", epoch, number)
    log.say(f"WARNING: {message}; going back to epoch {progress.epoch}, step {progress.step}, and skipping this batch")
    progress = load_last_good_state(stage, step.optimizer)
    progress.skipped = [epoch, number]
    return progress


def _first_bad_step(
    stage: Stage, step: TrainStep, progress: Progress, end: tuple[int, int]
) -> tuple[str, int, int, Path] | None:
    """Train from ``progress`` to ``end`` (epoch, steps done in it) and check the numbers after every step.

    Returns what was not finite, the epoch, the number of the step, and the path of its dump. None if all was finite.
    """
    for epoch in range(progress.epoch, end[0] + 1):
        first = progress.step if epoch == progress.epoch else 0
        if first == 0:
            stage.method.on_epoch_start(epoch)
        for number, (x, y) in enumerate(stage.loader.batches(epoch, first), first):
            if (epoch, number) >= end:
                break
            if [epoch, number] == progress.skipped:
                continue
            restore = step.snapshot()
            step.restart()
            step(x, y, **stage.step_arguments(epoch, number))
            if what := find_non_finite(step, step.totals()):
                restore()
                return what, epoch, number, _dump(stage, step, epoch, number, x, y, what)
    return None


def _dump(stage: Stage, step: TrainStep, epoch: int, number: int, x: Tensor, y: Tensor, what: str) -> Path:
    """Write the state before the step, its batch and its arguments to one file per process, and return its path."""
    world = distributed.current()
    process = f"-process-{world.rank}" if world.size > 1 else ""
    path = stage.folder / "nan" / f"epoch-{epoch + 1}-step-{number + 1}{process}.safetensors"
    tensors = checkpoint.training_tensors(stage.model, step.optimizer, stage.state)
    card = {"stage": stage.name, "found": what, "epoch": epoch, "step": number, "backend": step.backend}
    card |= {"processes": world.size, "arguments": stage.step_arguments(epoch, number)}
    write_weights(path, tensors | {"images": x, "labels": y}, card)
    return path
