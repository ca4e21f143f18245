"""One stage of training, the teacher's or the student's: epochs of steps, evaluated, recorded, saved, resumable."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ltat_fast import seeding
from ltat_fast.attacks.pgd import AttackConfig
from ltat_fast.data import DeviceLoader
from ltat_fast.engine import checkpoint, log
from ltat_fast.engine.backend import choose_backend
from ltat_fast.engine.checkpoint import Progress
from ltat_fast.engine.device import Hardware
from ltat_fast.engine.schedule import learning_rate
from ltat_fast.engine.step import TrainStep, make_optimizer
from ltat_fast.methods import Method

CHECK_EVERY = 50  # steps between looks at the device: for a loss that is not finite, and for the progress bar

# Evaluates the model as it stands: flat names to numbers.
Evaluate = Callable[[nn.Module], dict[str, float]]


class Diverged(Exception):
    """The loss is not a finite number. The run keeps its last good checkpoint."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class Stage:
    """What one stage trains, and how."""

    name: str
    folder: Path
    model: nn.Module
    arch: str
    method: Method
    loader: DeviceLoader
    attack: AttackConfig
    epochs: int
    lr: float
    lr_schedule: str
    momentum: float
    weight_decay: float
    seed: int
    card: Callable[[int], dict]
    """epoch to the metadata of a weights file"""
    evaluate: Evaluate | None = None
    evaluate_when: Callable[[int], bool] = field(default=lambda epoch: False)
    """epoch, from 0, to whether it is evaluated"""
    select_by: str = ""
    """which of the evaluated numbers picks the best epoch"""
    backend: str = "auto"
    max_steps: int | None = None
    save_minutes: float = 10.0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def fit(stage: Stage, hardware: Hardware) -> Progress:
    """Train ``stage`` to its end, from wherever its folder says it is.

    Raises :class:`Diverged` and :class:`Interrupted`.
    """
    optimizer = make_optimizer(stage.model, stage.lr, stage.momentum, stage.weight_decay)
    state_file = stage.checkpoints / "resume.safetensors"
    progress = Progress()
    if state_file.exists():
        progress = checkpoint.load_state(state_file, stage.model, optimizer, stage.arch)
        if progress.finished:
            log.say(f"{stage.name}: already trained, {progress.epoch} epochs")
            return progress
        log.say(f"{stage.name}: goes on after epoch {progress.epoch}, step {progress.step}")
    step = choose_backend(
        stage.backend,
        lambda backend: TrainStep(stage.model, stage.method, optimizer, stage.attack, hardware, backend),
        *next(stage.loader.batches(progress.epoch)),
    )
    record = log.StageLog(stage.folder, progress.epoch)
    try:
        with StopOnSignal() as stop:
            _train(stage, step, optimizer, progress, record, stop)
    finally:
        record.close()
    return progress


def _train(stage: Stage, step: TrainStep, optimizer, progress: Progress, record: log.StageLog, stop) -> None:
    state_file = stage.checkpoints / "resume.safetensors"
    per_epoch = len(stage.loader)
    last_save = time.monotonic()

    def out_of_steps(done: int) -> bool:
        return stage.max_steps is not None and progress.epoch * per_epoch + done >= stage.max_steps

    while not progress.finished:
        epoch, started = progress.epoch, time.monotonic()
        step.restart(progress.sums)
        done = progress.step
        with log.progress_bar(f"{stage.name} epoch {epoch + 1}/{stage.epochs}", per_epoch, done) as bar:
            for x, y in stage.loader.batches(epoch, start=done):
                if out_of_steps(done):
                    break
                step(
                    x,
                    y,
                    lr=learning_rate(stage.lr_schedule, stage.lr, epoch, done, stage.epochs, per_epoch),
                    progress=(epoch + 1) / stage.epochs,
                    seed=seeding.stream_seed(stage.seed, stage.name, "attack", epoch, done),
                )
                done += 1
                if done % CHECK_EVERY == 0:
                    totals = _finite(step.totals(), stage, epoch)
                    bar.update(0, completed=done, rate=f"loss {totals['loss'] / totals['steps']:.3f}")
                if stop.asked or time.monotonic() - last_save > 60 * stage.save_minutes:
                    progress.step, progress.sums = done, _finite(step.totals(), stage, epoch)
                    seconds = progress.seconds
                    progress.seconds += time.monotonic() - started
                    checkpoint.save_state(state_file, stage.model, optimizer, progress)
                    progress.seconds, last_save = seconds, time.monotonic()
                    if stop.asked:
                        raise Interrupted(f"stopped by {stop.asked} in epoch {epoch + 1}, step {done}; state saved")

        totals = _finite(step.totals(), stage, epoch)
        steps = totals.pop("steps")
        seconds = progress.seconds + time.monotonic() - started
        entry = {"epoch": epoch + 1, "steps": int(steps), "lr": float(step.lr)}
        entry |= {name: total / max(steps, 1) for name, total in totals.items() if name != "first_bad"}
        entry |= {
            "seconds": round(seconds, 3),
            "images_per_second": round(steps * stage.loader.batch_size / seconds, 1),
        }

        progress.finished = epoch + 1 == stage.epochs or out_of_steps(done)
        progress.epoch, progress.step, progress.sums, progress.seconds = epoch + 1, 0, {}, 0.0
        if stage.evaluate and (stage.evaluate_when(epoch) or progress.finished):
            scores = stage.evaluate(stage.model)
            entry |= scores
            if scores[stage.select_by] > progress.best.get(stage.select_by, -1.0):
                progress.best = {"epoch": epoch + 1, **scores}
                checkpoint.write(
                    stage.checkpoints / "best.safetensors", stage.model.state_dict(), stage.card(epoch + 1)
                )
        record.epoch(entry)
        if progress.finished:
            checkpoint.write(stage.checkpoints / "last.safetensors", stage.model.state_dict(), stage.card(epoch + 1))
        checkpoint.save_state(state_file, stage.model, optimizer, progress)
        last_save = time.monotonic()
        log.say(f"{stage.name} {_line(entry, stage.epochs)}")


def _finite(totals: dict[str, float], stage: Stage, epoch: int) -> dict[str, float]:
    if totals["first_bad"] >= 0:
        raise Diverged(
            f"the loss of the {stage.name} is not a finite number at epoch {epoch + 1}, step "
            f"{int(totals['first_bad']) + 1}; the last good state is in {stage.checkpoints}; "
            "a lower --lr is the usual remedy"
        )
    return totals


def _line(entry: dict, epochs: int) -> str:
    skip = {"epoch", "steps", "seconds", "images_per_second", "lr"}
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in entry.items() if name not in skip)
    return f"{entry['epoch']:>3}/{epochs}  lr {entry['lr']:.4g}  {numbers}  {entry['seconds']:.1f} s"


class StopOnSignal:
    """While open, SIGTERM, SIGINT and SIGUSR1 set ``asked`` instead of killing: the step in hand is finished first."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self) -> "StopOnSignal":
        self.asked: str | None = None
        self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def _note(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not want to wait
        self.asked = signal.Signals(number).name

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
