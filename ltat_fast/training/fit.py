"""One stage of training, the teacher's or the student's: epochs of steps, evaluated, recorded, saved, resumable."""

import time
from dataclasses import replace

import torch
from torch import nn

from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.models.sync_batch_norm import synchronise_batch_norm
from ltat_fast.runs import checkpoint, log
from ltat_fast.runs.checkpoint import Progress
from ltat_fast.runs.weights import write_weights
from ltat_fast.training import distributed, recovery, speed
from ltat_fast.training.backend import choose_backend
from ltat_fast.training.device import Hardware
from ltat_fast.training.precision import gradient_health
from ltat_fast.training.recovery import Diverged
from ltat_fast.training.signals import Interrupted, StopOnSignal
from ltat_fast.training.stage import Stage
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

AGREE_EVERY = 10  # steps between the moments at which several processes agree to save or to stop
# Recorded, but not worth the terminal's width, or shown in a form of their own.
NOT_IN_LINE = {"epoch", "steps", "lr", "seconds", "images_per_second"}
NOT_IN_LINE |= {"share_of_ceiling", "zero_gradients", "sign_disagreement"}
CHECK_EVERY = 50  # steps between looks at the device: for a loss that is not finite, and for the progress bar


def fit(stage: Stage, hardware: Hardware) -> Progress:
    """Train ``stage`` to its end, from wherever its folder says it is.

    Raises :class:`Diverged` and :class:`Interrupted`.
    """
    allow_joint_calls(synchronise_batch_norm(stage.model))
    optimizer = make_optimizer(stage.model, stage.config.lr, stage.config.momentum, stage.config.weight_decay)
    progress = Progress()
    if checkpoint.has_state(stage.state_file):
        progress = recovery.last_good_state(stage, optimizer)
        if progress.finished:
            log.say(f"{stage.name}: already trained, {progress.epoch} epochs")
            return progress
        log.say(f"{stage.name}: goes on after epoch {progress.epoch}, step {progress.step}")
    wrapped = distributed.wrap(stage.model)

    def build(backend: str) -> TrainStep:
        return train_step(stage, optimizer, hardware, backend, wrapped)

    x, y = next(stage.loader.batches(progress.epoch))
    step = choose_backend(stage.config.compile, build, x, y, stage.config.run_dir / ".capturing")
    flops = speed.flops_per_image(build("eager"), x, y)
    ceiling = speed.matmul_ceiling(hardware.device, hardware.dtype)
    log.say(f"{stage.name}: {flops / 1e9:.3g} GFLOP an image; matrix products reach {ceiling / 1e12:.3g} TFLOP/s")
    record = log.StageLog(stage.folder, progress.epoch) if distributed.current().is_main else log.NoLog()
    try:
        with StopOnSignal() as stop:
            return _Fit(stage, step, progress, record, stop, flops / ceiling).run()
    finally:
        record.close()


def train_step(
    stage: Stage,
    optimizer: torch.optim.SGD,
    hardware: Hardware,
    backend: str = "eager",
    train_model: nn.Module | None = None,
) -> TrainStep:
    """The training step of ``stage``; its attack in the precision that the stage asks for."""
    twin = frozen_twin(stage.model, replace(hardware, dtype=torch.float32) if stage.attacks_in_fp32 else hardware)
    return TrainStep(stage.model, stage.method, optimizer, stage.attack, hardware, backend, train_model, twin)


class _Fit:
    """The loop of :func:`fit`. In several processes each runs it; what is decided here is decided alike in all."""

    def __init__(
        self,
        stage: Stage,
        step: TrainStep,
        progress: Progress,
        record: log.StageLog,
        stop: StopOnSignal,
        seconds_per_image: float,
    ):
        """seconds_per_image: what a step takes for each image at the ceiling of one device's matrix products."""
        self.stage, self.step, self.progress, self.record, self.stop = stage, step, progress, record, stop
        self.seconds_per_image = seconds_per_image
        self.check_batch = next(stage.loader.batches(0))
        self.per_epoch = len(stage.loader)
        self.last_save = time.monotonic()
        self.world = distributed.current()

    def run(self) -> Progress:
        if not checkpoint.has_state(self.stage.state_file):
            self._save()  # there always is a good state to go back to
        while not self.progress.finished:
            try:
                self._epoch()
            except Diverged as diverged:
                self.progress = recovery.without_bad_batch(self.stage, self.step, diverged)
                self._save()
        return self.progress

    def _epoch(self) -> None:
        started = time.monotonic() - self.progress.seconds
        self.step.restart(self.progress.sums)
        if self.progress.step == 0:
            self.stage.method.on_epoch_start(self.progress.epoch)
        done = self._steps(started)
        self._end_epoch(done, time.monotonic() - started)

    def _steps(self, started: float) -> int:
        """The steps of an epoch, from where it was left; how many of them are done."""
        stage, step, epoch, done = self.stage, self.step, self.progress.epoch, self.progress.step
        with log.progress_bar(f"{stage.name} epoch {epoch + 1}/{stage.epochs}", self.per_epoch, done) as bar:
            for x, y in stage.loader.batches(epoch, start=done):
                if self._out_of_steps(done):
                    break
                if self.progress.skipped != [epoch, done]:
                    step(x, y, **stage.step_arguments(epoch, done))
                done += 1
                if done % CHECK_EVERY == 0:
                    totals = self._totals(done)
                    bar.update(0, completed=done, rate=f"loss {totals['loss'] / totals['steps']:.3f}")
                if self._time_to_save(done):
                    self.progress.step, self.progress.sums = done, self._totals(done)
                    self.progress.seconds = time.monotonic() - started
                    self._save()
                    self._stop_if_asked(f"in epoch {epoch + 1}, step {done}")
        return done

    def _end_epoch(self, done: int, seconds: float) -> None:
        """Record and evaluate the epoch; save, so that a resumed run begins with the next."""
        stage, progress, epoch = self.stage, self.progress, self.progress.epoch + 1
        totals = self._totals(done)
        steps = int(totals.pop("steps"))
        entry = {"epoch": epoch, "steps": steps, "lr": stage.rate(epoch - 1, done - 1)}
        entry |= {name: total / max(steps, 1) for name, total in totals.items() if name != "first_bad"}
        if progress.skipped and progress.skipped[0] == epoch - 1:
            entry["skipped_step"] = progress.skipped[1] + 1
        entry["seconds"] = round(seconds, 3)
        images_per_second = steps * stage.loader.batch_size / seconds
        entry["images_per_second"] = round(images_per_second, 1)
        entry["share_of_ceiling"] = round(images_per_second * self.seconds_per_image / self.world.size, 4)

        finished = epoch == stage.epochs or self._out_of_steps(done)
        scores = {}
        if (selection := stage.selection) and (selection.after(epoch - 1) or finished):
            scores = selection.evaluate(stage.model)
            entry |= scores
            if stage.method.uses_attack:
                entry |= gradient_health(self.step, *self.check_batch)
            if scores[selection.by] > progress.best.get(selection.by, -1.0):
                progress.best = {"epoch": epoch, **scores}
                self._save_weights("best", epoch, scores)
        self.record.epoch(entry)
        if finished:
            self._save_weights("last", epoch, scores)
        # The state goes last: a run that dies before it repeats this epoch, and writes all of the above again.
        progress.epoch, progress.finished, progress.step, progress.sums, progress.seconds = epoch, finished, 0, {}, 0.0
        self._save()
        log.say(f"{stage.name} {_line(entry, stage.epochs)}")
        self._stop_if_asked(f"after epoch {epoch}")

    def _out_of_steps(self, done: int) -> bool:
        most = self.stage.config.max_steps
        return most is not None and self.progress.epoch * self.per_epoch + done >= most

    def _time_to_save(self, done: int) -> bool:
        if done % (AGREE_EVERY if self.world.size > 1 else 1):
            return False
        minutes = (time.monotonic() - self.last_save) / 60
        due = bool(self.stop.asked) or minutes > self.stage.config.save_minutes
        return distributed.any_process(due, self.step.device)

    def _save(self) -> None:
        if self.world.is_main:
            kept = self.stage.method.state()
            checkpoint.save_state(self.stage.state_file, self.stage.model, self.step.optimizer, self.progress, kept)
        self.last_save = time.monotonic()

    def _save_weights(self, which: str, epoch: int, scores: dict[str, float]) -> None:
        if self.world.is_main:
            card = self.stage.card(epoch) | {"scores": scores}
            write_weights(self.stage.checkpoints / f"{which}.safetensors", self.stage.model.state_dict(), card)

    def _stop_if_asked(self, where: str) -> None:
        if distributed.any_process(bool(self.stop.asked), self.step.device):
            raise Interrupted(f"stopped by {self.stop.asked or 'another process'} {where}; state saved")

    def _totals(self, done: int) -> dict[str, float]:
        """The sums of the epoch so far. Raises :class:`Diverged` if loss or weights are not finite numbers."""
        totals = self.step.totals()
        if what := recovery.not_finite(self.step, totals):
            raise Diverged(what, self.progress.epoch, done)
        return totals


def _line(entry: dict, epochs: int) -> str:
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in entry.items() if name not in NOT_IN_LINE)
    rate = f"{entry['seconds']:.1f} s  {entry['images_per_second']:.0f} images/s"
    return f"{entry['epoch']:>3}/{epochs}  lr {entry['lr']:.4g}  {numbers}  {rate}"
