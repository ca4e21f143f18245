"""The training loop of one stage, teacher or student: steps, evaluation, records, saving and resuming."""

import math
import time
from dataclasses import replace

import torch
from torch import nn

from ltat_fast.errors import Interrupted
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.models.sync_batch_norm import synchronise_batch_norm
from ltat_fast.out_of_memory import explained
from ltat_fast.runs import checkpoint, log
from ltat_fast.runs.checkpoint import Progress
from ltat_fast.runs.records import NoLog, StageLog
from ltat_fast.runs.weights import write_weights
from ltat_fast.signals import StopOnSignal
from ltat_fast.training import distributed, entries, recovery, speed
from ltat_fast.training.backend import choose_backend
from ltat_fast.training.collapse import Collapsed, collapse, one_step_health
from ltat_fast.training.device import Hardware
from ltat_fast.training.micro_batches import has_batch_norm
from ltat_fast.training.precision import gradient_health
from ltat_fast.training.recovery import Diverged
from ltat_fast.training.stage import Stage
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

AGREE_EVERY = 10  # number of steps after which several processes agree whether to save or to stop


def fit(stage: Stage, hardware: Hardware) -> Progress:
    """Train ``stage`` to its end. Start from the state in its folder, if there is one.

    Raises :class:`Diverged` if a loss or a weight is not finite, :class:`Collapsed` if a one-step attack collapses and
    ``--on-collapse`` says stop, :class:`Interrupted` after a signal, and OutOfMemory.
    """
    with explained(less_memory(stage)):
        return _train(stage, hardware)


def less_memory(stage: Stage) -> str:
    """Return which flags of ``stage`` to change if its steps need too much memory."""
    name, size = ("--teacher-batch-size" if stage.name == "teacher" else "--batch-size"), stage.loader.batch_size
    now, share = stage.config.accumulate, size // distributed.current().size
    advice = f"use a smaller {name} (it is {size})"
    if more := next((n for n in range(now + 1, share + 1) if share % n == 0 and n >= 2 * now), None):
        advice += f", or --accumulate {more}, which computes each batch in {more} parts"
    return advice


def _train(stage: Stage, hardware: Hardware) -> Progress:
    allow_joint_calls(synchronise_batch_norm(stage.model))
    optimizer = make_optimizer(stage.model, stage.config.lr, stage.config.momentum, stage.config.weight_decay)
    progress = Progress()
    if checkpoint.has_state(stage.state_file):
        progress = recovery.load_last_good_state(stage, optimizer)
        if progress.finished:
            log.say(f"{stage.name}: already trained, {progress.epoch} epochs")
            return progress
        log.say(f"{stage.name}: resumes after epoch {progress.epoch}, step {progress.step}")
    wrapped = distributed.wrap(stage.model)
    if (parts := stage.config.accumulate) > 1 and has_batch_norm(stage.model):
        seen, batch = stage.loader.batch_size // parts, stage.loader.batch_size
        log.say(f"{stage.name}: --accumulate {parts}: batch norm takes its statistics from {seen} images, not {batch}")

    def build(backend: str) -> TrainStep:
        return train_step(stage, optimizer, hardware, backend, wrapped)

    x, y = next(stage.loader.batches(progress.epoch))
    step = choose_backend(stage.config.compile, build, x, y, stage.config.run_dir / ".capturing")
    flops = speed.flops_per_image(build("eager"), x, y)
    ceiling = speed.matmul_ceiling(hardware.device, hardware.dtype)
    log.say(f"{stage.name}: {flops / 1e9:.3g} GFLOP per image; matrix products reach {ceiling / 1e12:.3g} TFLOP/s")
    is_main, per_epoch = distributed.current().is_main, len(stage.loader)
    record = StageLog(stage.folder, progress.epoch, progress.steps_recorded(per_epoch)) if is_main else NoLog()
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
    """Return the training step of ``stage``. The other arguments are those of :class:`TrainStep`."""
    attack_hardware = replace(hardware, dtype=torch.float32) if stage.attacks_in_fp32 else hardware
    twin = frozen_twin(stage.model, attack_hardware)
    return TrainStep(
        stage.model,
        stage.method,
        optimizer,
        stage.attack,
        hardware,
        backend,
        train_model,
        twin,
        modifiers=stage.modifiers,
        accumulate=stage.config.accumulate,
    )


class _Fit:
    """The loop of :func:`fit`. Every process runs it, and all processes make the same decisions."""

    def __init__(
        self,
        stage: Stage,
        step: TrainStep,
        progress: Progress,
        record: StageLog | NoLog,
        stop: StopOnSignal,
        seconds_per_image: float,
    ):
        """seconds_per_image: time per image of a step of the last epoch, at the rate of a large matrix product."""
        self.stage, self.step, self.progress, self.record, self.stop = stage, step, progress, record, stop
        self.seconds_per_image = seconds_per_image
        self.check_batch = next(stage.loader.batches(0))
        self.per_epoch = len(stage.loader)
        self.all_steps = min(stage.epochs * self.per_epoch, stage.config.max_steps or math.inf)
        self.last_save = time.monotonic()
        self.world = distributed.current()

    def run(self) -> Progress:
        if not checkpoint.has_state(self.stage.state_file):
            self._save()  # so that there always is a good state to return to
        done = self.progress.steps_done(self.per_epoch)
        with log.progress(self.stage.name, self.all_steps, "steps", done=done) as self.bar:
            while not self.progress.finished:
                try:
                    self._train_epoch()
                except Diverged as diverged:
                    self._go_back(diverged)
        return self.progress

    def _go_back(self, diverged: Diverged) -> None:
        self.progress = recovery.skip_bad_batch(self.stage, self.step, diverged)
        self.record.go_back(self.progress.epoch, self.progress.steps_recorded(self.per_epoch))
        self.bar.go_to(self.progress.steps_done(self.per_epoch))
        self._save()

    def _train_epoch(self) -> None:
        started = time.monotonic() - self.progress.seconds
        self.step.restart(self.progress.sums)
        if self.progress.step == 0:
            self.stage.method.on_epoch_start(self.progress.epoch)
        done = self._train_steps(started)
        self._end_epoch(done, started)

    def _train_steps(self, started: float) -> int:
        """Take the remaining steps of the epoch and return how many of its steps are done."""
        stage, step, epoch, done = self.stage, self.step, self.progress.epoch, self.progress.step
        steps = min(self.per_epoch, self.all_steps - epoch * self.per_epoch)
        name, images = f"epoch {epoch + 1}/{stage.epochs}", stage.loader.batch_size
        with log.progress(name, steps, "steps", done=done, images_per_unit=images) as bar:
            for x, y in stage.loader.batches(epoch, start=done):
                if done >= steps:
                    break
                if self.progress.skipped != [epoch, done]:
                    step(x, y, **stage.step_arguments(epoch, done))
                done += 1
                shown = {}
                if done % stage.config.log_every == 0:
                    shown = self._record_steps(done, self._totals(done), time.monotonic() - started)
                bar.advance(1, **shown)
                self.bar.advance(1)
                if self._time_to_save(done):
                    self.progress.step, self.progress.sums = done, self._totals(done)
                    self.progress.seconds = time.monotonic() - started
                    self._save()
                    self._stop_if_signalled(f"in epoch {epoch + 1}, step {done}")
        return done

    def _record_steps(self, done: int, totals: dict[str, float], seconds: float) -> dict[str, float]:
        """Record the steps since the last such record of the epoch; return what their bar shows.

        totals, seconds: those of all ``done`` steps of the epoch. The time must be read after the totals, which wait
        until the device has taken these steps.
        """
        before, epoch = self.progress.recorded, self.progress.epoch
        entry = entries.means(totals, before)
        if not entry["steps"]:  # the only one was skipped, or the epoch ended with a record
            return {}
        position = {"epoch": epoch + 1, "step": epoch * self.per_epoch + done, "lr": self.stage.rate(epoch, done - 1)}
        images = entry["steps"] * self.stage.loader.batch_size
        entry |= entries.speed(images, seconds - before.get("seconds", 0.0)) | entries.memory(self.step.device)
        self.record.step(position | entry)
        self.progress.recorded = totals | {"done": done, "seconds": seconds}
        return {"loss": entry["loss"]}

    def _end_epoch(self, done: int, started: float) -> None:
        """Evaluate and record the epoch, then save the state from which the next epoch starts."""
        stage, progress, epoch = self.stage, self.progress, self.progress.epoch + 1
        totals, seconds = self._totals(done), time.monotonic() - started
        self._record_steps(done, totals, seconds)
        means = entries.means(totals)
        entry = {"epoch": epoch, "steps": means.pop("steps"), "lr": stage.rate(epoch - 1, done - 1)} | means
        if progress.skipped and progress.skipped[0] == epoch - 1:
            entry["skipped_step"] = progress.skipped[1] + 1
        images = entry["steps"] * stage.loader.batch_size
        entry |= entries.speed(images, seconds)
        if self.step.attacks_at(epoch / stage.epochs) == self.step.attacks_at(1.0):  # the step that was measured
            entry["share_of_ceiling"] = round(images / seconds * self.seconds_per_image / self.world.size, 4)

        if stage.modifiers.ema:
            stage.modifiers.ema.copy_buffers(stage.model)
        finished = (epoch - 1) * self.per_epoch + done >= self.all_steps
        scores = {}
        if (selection := stage.selection) and (selection.after(epoch - 1) or finished):
            scores = selection.evaluate()
            entry |= scores
            if stage.method.uses_attack:
                entry |= gradient_health(self.step, *self.check_batch)
            if scores[selection.by] > progress.best.get(selection.by, -1.0):
                progress.best = {"epoch": epoch, **scores}
                self._save_weights("best", epoch, scores)
        collapsed = ""
        if self._takes_one_large_step(epoch):
            health = one_step_health(self.step, *self.check_batch, stage.config.attack_config.eps)
            entry |= health
            collapsed = collapse(health)
        self.record.epoch(entry)
        if finished:
            self._save_weights("last", epoch, scores)
        # Save the state last: a run killed before this point repeats the epoch and writes all of the above again.
        progress.epoch, progress.finished, progress.step = epoch, finished, 0
        progress.sums, progress.recorded, progress.seconds = {}, {}, 0.0
        self._save()
        log.say(f"{stage.name} {entries.line(entry, stage.epochs)}")
        if collapsed:
            self._warn_or_stop(collapsed, epoch)
        self._stop_if_signalled(f"after epoch {epoch}")

    def _takes_one_large_step(self, epoch: int) -> bool:
        """Whether the training attack of ``epoch``, from 1, is one step of at least eps with the full budget.

        A smaller step is a weak attack, and so is a budget in its warm-up: PGD-10 is then much stronger without any
        catastrophic overfitting.
        """
        stage, budget = self.stage, self.stage.modifiers.budget
        warm = budget is None or budget.warm_up_in(epoch - 1, stage.epochs) == 1
        is_large = stage.attack.steps == 1 and stage.attack.step_size >= stage.config.attack_config.eps
        return is_large and warm and self.step.attacks_at(epoch / stage.epochs)

    def _warn_or_stop(self, collapsed: str, epoch: int) -> None:
        message = f"{self.stage.name}: after epoch {epoch} {collapsed}"
        if self.stage.config.on_collapse == "stop":
            best = self.progress.best.get("epoch")
            advice = f"the best epoch is {best}" if best else "use a smaller --eps or --attack pgd"
            raise Collapsed(f"{message}; the state is saved; {advice}")
        log.say(f"WARNING: {message}")

    def _time_to_save(self, done: int) -> bool:
        if self.world.size > 1 and done % AGREE_EVERY != 0:
            return False
        minutes = (time.monotonic() - self.last_save) / 60
        due = self.stop.signal_name is not None or minutes > self.stage.config.save_minutes
        return distributed.any_process(due, self.step.device)

    def _save(self) -> None:
        if self.world.is_main:
            stage = self.stage
            self.record.sync()  # first: after a power cut the state must not claim records that are lost
            checkpoint.save_state(stage.state_file, stage.model, self.step.optimizer, self.progress, stage.state)
        self.last_save = time.monotonic()

    def _save_weights(self, which: str, epoch: int, scores: dict[str, float]) -> None:
        if self.world.is_main:
            card = self.stage.card(epoch) | {"scores": scores}
            write_weights(self.stage.checkpoints / f"{which}.safetensors", self.stage.trained.state_dict(), card)

    def _stop_if_signalled(self, where: str) -> None:
        if distributed.any_process(self.stop.signal_name is not None, self.step.device):
            raise Interrupted(f"stopped by {self.stop.signal_name or 'another process'} {where}; state saved")

    def _totals(self, done: int) -> dict[str, float]:
        """Return the sums of the epoch so far. Raise :class:`Diverged` if the loss or a weight is not finite."""
        totals = self.step.totals()
        if what := recovery.find_non_finite(self.step, totals):
            raise Diverged(what, self.progress.epoch, done)
        return totals
