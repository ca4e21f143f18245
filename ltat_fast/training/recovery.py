"""Back to the last good state: after a process was killed, a disk damaged a file, or a number stopped being finite.

While all is well a run only looks at its sums now and then. Everything a step draws is a function of its place, so the
steps since the last good state can be taken again, with a look after each: the one that goes wrong is found exactly as
it was, and written to a file for ``python -m ltat_fast.replay``, at no cost before.
"""

import shlex
from pathlib import Path

import torch
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.runs import checkpoint, log
from ltat_fast.runs.checkpoint import Progress
from ltat_fast.runs.weights import read_weights, write_weights
from ltat_fast.training import distributed
from ltat_fast.training.stage import Stage
from ltat_fast.training.step import TrainStep


class Diverged(Exception):
    """Loss or weights are not finite numbers; seen in ``epoch`` after ``done`` of its steps, both from 0."""

    def __init__(self, message: str, epoch: int, done: int):
        super().__init__(message)
        self.epoch, self.done = epoch, done


def last_good_state(stage: Stage, optimizer: torch.optim.SGD) -> Progress:
    """Load the newest state of ``stage`` that is whole, in place."""
    with distributed.main_first():  # it sets a damaged file aside
        progress = checkpoint.load_state(
            stage.state_file, stage.model, optimizer, stage.config.arch, stage.method.state()
        )
    if progress.best and not progress.finished:
        progress.best = _best_on_disk(stage)
    return progress


def _best_on_disk(stage: Stage) -> dict:
    """What best.safetensors says it holds: it may be of an epoch after the state's, which is then taken again."""
    try:
        _, card = read_weights(stage.checkpoints / "best.safetensors")
    except UserError as error:
        log.say(f"WARNING: {error}; the best epoch is picked from those still to come")
        return {}
    return {"epoch": card["epoch"], **card["scores"]}


def not_finite(step: TrainStep, totals: dict[str, float]) -> str:
    """Which of "loss" and "weights" is not finite after the steps that gave ``totals``; empty if both are.

    A gradient that is not finite makes the weights so.
    """
    if totals["first_bad"] >= 0:
        return "loss"
    finite = torch.stack([tensor.isfinite().all() for tensor in step.model.state_dict().values()]).all()
    return "weights" if distributed.any_process(not finite, step.device) else ""


def without_bad_batch(stage: Stage, step: TrainStep, diverged: Diverged) -> Progress:
    """The last good state, loaded, and in it the place of the batch to leave out.

    Raises :class:`Diverged` with the whole story where the run is to stop: by ``--on-nan``, if a batch had been
    left out before, or if the step did not go wrong again.
    """
    good = last_good_state(stage, step.optimizer)
    found = _first_bad_step(stage, step, good, (diverged.epoch, diverged.done))
    state = f"the last good state, of epoch {good.epoch}, step {good.step}, is in {stage.checkpoints}"
    if found is None:
        again = "it did not come back when the steps since were taken again, so no batch is to blame"
        story = f"{stage.name}: {diverged} not finite in epoch {diverged.epoch + 1}; {again}; {state}"
        raise Diverged(story, diverged.epoch, diverged.done)
    what, epoch, number, dump = found
    replay = f"python -m ltat_fast.replay {shlex.quote(str(dump))} shows where it begins"
    story = f"{stage.name}: {what} not finite at epoch {epoch + 1}, step {number + 1}; {replay}"
    if stage.config.on_nan != "rollback":
        raise Diverged(f"{story}; {state}; a lower --lr is the usual remedy", epoch, number)
    if good.skipped:
        raise Diverged(f"{story}; a batch had been left out before, so the run stops; {state}", epoch, number)
    log.say(f"WARNING: {story}; the run goes back to epoch {good.epoch}, step {good.step}, and leaves that batch out")
    good = last_good_state(stage, step.optimizer)
    good.skipped = [epoch, number]
    return good


def _first_bad_step(
    stage: Stage, step: TrainStep, good: Progress, end: tuple[int, int]
) -> tuple[str, int, int, Path] | None:
    """Train on from ``good`` up to ``end``, epoch and steps done. What went wrong, epoch, step, and its dump."""
    for epoch in range(good.epoch, end[0] + 1):
        first = good.step if epoch == good.epoch else 0
        if first == 0:
            stage.method.on_epoch_start(epoch)
        for number, (x, y) in enumerate(stage.loader.batches(epoch, first), first):
            if (epoch, number) >= end:
                break
            if [epoch, number] == good.skipped:
                continue
            put_back = step.snapshot()
            step.restart()
            step(x, y, **stage.step_arguments(epoch, number))
            if what := not_finite(step, step.totals()):
                put_back()
                return what, epoch, number, _dump(stage, step, epoch, number, x, y, what)
    return None


def _dump(stage: Stage, step: TrainStep, epoch: int, number: int, x: Tensor, y: Tensor, what: str) -> Path:
    """Everything before the step, its batch and its seed in one file; each process writes that of its share."""
    world = distributed.current()
    process = f"-process-{world.rank}" if world.size > 1 else ""
    path = stage.folder / "nan" / f"epoch-{epoch + 1}-step-{number + 1}{process}.safetensors"
    tensors = checkpoint.training_tensors(stage.model, step.optimizer, stage.method.state())
    card = {"stage": stage.name, "found": what, "epoch": epoch, "step": number, "backend": step.backend}
    card |= {"processes": world.size, "arguments": stage.step_arguments(epoch, number)}
    write_weights(path, tensors | {"images": x, "labels": y}, card)
    return path
