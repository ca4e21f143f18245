"""A stage of training ends with the same numbers after a signal stopped it at any place."""

import contextlib
import json
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.toy_stage import (
    EPOCHS,
    HARDWARE,
    PER_EPOCH,
    SCORES,
    Method,
    assert_same_outcome,
    outcome,
    saved,
    send,
    stage,
)
from ltat_fast.runs import log
from ltat_fast.runs.records import read_metrics, read_steps
from ltat_fast.runs.weights import read_weights
from ltat_fast.schedule import learning_rate
from ltat_fast.signals import SIGNALS, Interrupted
from ltat_fast.training.fit import fit
from ltat_fast.training.stage import Selection
from ltat_fast.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("unmeasured")


def test_each_epoch_is_recorded(uninterrupted):
    metrics, *_ = uninterrupted
    assert [(r["epoch"], r["steps"]) for r in metrics] == [(1, 5), (2, 5), (3, 5)]
    assert [r["test_pgd20"] for r in metrics] == SCORES
    last_rates = [learning_rate("onecycle", 0.1, e, PER_EPOCH - 1, EPOCHS, PER_EPOCH) for e in range(EPOCHS)]
    assert [r["lr"] for r in metrics] == pytest.approx(last_rates)
    assert all(0.3 < r["loss"] == r["ce"] < 3 for r in metrics)


def test_steps_are_recorded(uninterrupted):
    """Every second step, and what is left at the end of an epoch."""
    metrics, _, steps = uninterrupted
    assert [(r["epoch"], r["step"], r["steps"]) for r in steps] == [
        (epoch + 1, PER_EPOCH * epoch + done, count)
        for epoch in range(EPOCHS)
        for done, count in ((2, 2), (4, 2), (5, 1))
    ]
    rates = [learning_rate("onecycle", 0.1, (r["step"] - 1) // 5, (r["step"] - 1) % 5, EPOCHS, 5) for r in steps]
    assert [r["lr"] for r in steps] == pytest.approx(rates)
    for epoch in metrics:
        of_epoch = [r for r in steps if r["epoch"] == epoch["epoch"]]
        assert sum(r["loss"] * r["steps"] for r in of_epoch) / PER_EPOCH == pytest.approx(epoch["loss"])
        assert len({r["loss"] for r in of_epoch}) == 3


def test_records_of_steps_have_speed_and_memory(tmp_path):
    fit(stage(tmp_path), HARDWARE)
    of_steps, of_epochs = read_steps(tmp_path / "steps.jsonl"), read_metrics(tmp_path / "metrics.jsonl")
    for record in of_steps:
        images, seconds = 8 * record["steps"], record["seconds"]  # rounded to milliseconds
        assert images / (seconds + 6e-4) < record["images_per_second"] + 0.1
        assert seconds < 6e-4 or record["images_per_second"] - 0.1 < images / (seconds - 6e-4)
        assert 50 < record["memory_mib"] < 50_000
    for epoch in of_epochs:
        own = [record["seconds"] for record in of_steps if record["epoch"] == epoch["epoch"]]
        assert sum(own) == pytest.approx(epoch["seconds"], abs=0.003)


@pytest.mark.parametrize(("log_every", "per_epoch"), [(2, 3), (5, 2), (1000, 1)])
def test_the_host_reads_the_sums_only_every_n_steps(tmp_path, monkeypatch, log_every, per_epoch):
    """Reading them waits for the device. An epoch ends with one more read."""
    training, totals, reads = stage(tmp_path, log_every=log_every), TrainStep.totals, []
    monkeypatch.setattr(TrainStep, "totals", lambda step: reads.append(step) or totals(step))
    fit(training, HARDWARE)
    assert len(reads) == EPOCHS * per_epoch


@pytest.mark.parametrize(
    ("max_steps", "expected"),
    [(None, [("student", 15), ("epoch 1/3", 5), ("epoch 2/3", 5), ("epoch 3/3", 5)]),
     (7, [("student", 7), ("epoch 1/3", 5), ("epoch 2/3", 2)])],
)  # fmt: skip
def test_bars_know_how_many_steps_there_are(tmp_path, monkeypatch, max_steps, expected):
    bars, progress = [], log.progress

    @contextlib.contextmanager
    def seen(*args, **kwargs):
        with progress(*args, **kwargs) as bar:
            bars.append(bar)
            yield bar

    monkeypatch.setattr(log, "progress", seen)
    fit(stage(tmp_path, max_steps=max_steps), HARDWARE)
    assert [(bar.description, bar.total) for bar in bars] == expected
    assert [bar.done for bar in bars] == [bar.total for bar in bars]


def test_log_every_can_change_when_a_run_resumes(tmp_path, uninterrupted):
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, 8))), HARDWARE)
    fit(stage(tmp_path, log_every=4), HARDWARE)
    steps = [(record["step"], record["steps"]) for record in read_steps(tmp_path / "steps.jsonl")]
    assert steps == [(2, 2), (4, 2), (5, 1), (7, 2), (9, 2), (10, 1), (14, 4), (15, 1)]
    assert outcome(tmp_path)[0] == uninterrupted[0]


def test_progress_counts_epochs_from_one(tmp_path):
    method = Method()
    fit(stage(tmp_path, method), HARDWARE)
    expected = np.repeat(np.arange(1, EPOCHS + 1) / EPOCHS, PER_EPOCH)
    np.testing.assert_allclose(method.progress, expected, rtol=1e-6)


def test_best_is_the_first_epoch_with_the_highest_score(uninterrupted):
    _, files, _ = uninterrupted
    assert files["best"][1]["epoch"] == 2
    assert files["last"][1]["epoch"] == 3
    assert not torch.equal(files["best"][0]["0.weight"], files["last"][0]["0.weight"])


def test_best_is_selected_by_the_given_score(tmp_path):
    """Clean accuracy peaks in epoch 1, robust accuracy in epoch 3."""
    by_epoch = iter([{"pgd20": 10.0, "clean": 90.0}, {"pgd20": 20.0, "clean": 80.0}, {"pgd20": 30.0, "clean": 70.0}])
    fit(stage(tmp_path, selection=Selection(lambda: next(by_epoch), lambda epoch: True, "pgd20")), HARDWARE)
    assert read_weights(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 3
    assert saved(tmp_path)["best"] == {"epoch": 3, "pgd20": 30.0, "clean": 70.0}


def test_the_last_epoch_is_evaluated_even_if_no_other_is(tmp_path):
    never = stage(tmp_path, selection=Selection(lambda: {"pgd20": 0.0}, lambda epoch: False, "pgd20"))
    fit(never, HARDWARE)
    assert ["pgd20" in r for r in read_metrics(tmp_path / "metrics.jsonl")] == [False, False, True]
    assert read_weights(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 3


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (5, 1), (6, 2), (1000, 3)])
def test_max_steps_ends_a_stage(tmp_path, steps, epochs):
    method = Method()
    fit(stage(tmp_path, method, max_steps=steps), HARDWARE)
    assert method.calls == min(steps, EPOCHS * PER_EPOCH)
    metrics, files, _ = outcome(tmp_path)
    assert sum(r["steps"] for r in metrics) == method.calls
    assert len(metrics) == files["last"][1]["epoch"] == epochs
    again = Method()
    assert fit(stage(tmp_path, again, max_steps=steps), HARDWARE).finished
    assert again.calls == 0


def test_another_seed_gives_another_result(tmp_path, uninterrupted):
    fit(stage(tmp_path, seed=4), HARDWARE)
    assert outcome(tmp_path)[0] != uninterrupted[0]


def test_a_finished_stage_loads_its_weights_and_does_not_train(tmp_path, uninterrupted):
    fit(stage(tmp_path), HARDWARE)
    later = stage(tmp_path, Method(lambda number: pytest.fail("trained again")))
    assert fit(later, HARDWARE).finished
    assert torch.equal(later.model.state_dict()["0.weight"], uninterrupted[1]["last"][0]["0.weight"])


def test_images_per_second_and_the_share_of_the_ceiling_are_recorded(tmp_path):
    fit(stage(tmp_path), HARDWARE)
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert record["images_per_second"] == pytest.approx(40 / record["seconds"], rel=0.1)
        assert record["share_of_ceiling"] == pytest.approx(record["images_per_second"] * 1e9 / 1e12, abs=1e-3)


@pytest.mark.parametrize("at", range(1, EPOCHS * PER_EPOCH + 1))
def test_a_stage_stopped_by_a_signal_in_any_step_resumes_to_the_same_numbers(tmp_path, uninterrupted, at):
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, at))), HARDWARE)
    assert saved(tmp_path)["epoch"] * PER_EPOCH + saved(tmp_path)["step"] == at
    rest = Method()
    assert fit(stage(tmp_path, rest), HARDWARE).finished
    assert rest.calls == EPOCHS * PER_EPOCH - at
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def test_a_stage_stopped_after_every_step_ends_with_the_same_numbers(tmp_path, uninterrupted):
    for _ in range(EPOCHS * PER_EPOCH):
        with pytest.raises(Interrupted):
            fit(stage(tmp_path, Method(send(signal.SIGUSR1, 1))), HARDWARE)
    assert fit(stage(tmp_path), HARDWARE).finished
    assert_same_outcome(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("epoch", [1, EPOCHS])
def test_a_signal_during_an_evaluation_is_not_lost(tmp_path, uninterrupted, epoch):
    """Nor in the last epoch, after which another stage or hours of AutoAttack would follow."""
    first = stage(tmp_path)
    evaluate = first.selection.evaluate

    def evaluate_and_signal():
        if len(read_metrics(tmp_path / "metrics.jsonl")) == epoch - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate()

    first.selection = replace(first.selection, evaluate=evaluate_and_signal)
    with pytest.raises(Interrupted):
        fit(first, HARDWARE)
    # The step after an evaluation may be finished before the stage looks for signals, but no epoch.
    assert saved(tmp_path)["epoch"] == epoch
    assert saved(tmp_path)["step"] <= 1
    fit(stage(tmp_path), HARDWARE)
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def test_the_previous_signal_handlers_are_restored(tmp_path):
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGINT, 2))), HARDWARE)
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_a_second_interrupt_stops_at_once(tmp_path):
    def twice(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(stage(tmp_path, Method(twice)), HARDWARE)


class Counting(Method):
    """A method whose loss depends on a tensor that the method keeps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.epochs = torch.zeros(()), []

    def state(self):
        return {"seen": self.seen}

    def on_epoch_start(self, epoch):
        self.epochs.append(epoch)

    def loss(self, model, x, x_adv, y, progress):
        loss, parts = super().loss(model, x, x_adv, y, progress)
        self.seen += 1
        return loss * (1 + self.seen / 10), parts


@pytest.mark.parametrize("at", [1, 5, 7])
def test_tensors_that_a_method_keeps_are_resumed(tmp_path, at):
    whole = Counting()
    fit(stage(tmp_path / "whole", whole), HARDWARE)
    assert whole.epochs == [0, 1, 2]
    first, second = Counting(send(signal.SIGTERM, at)), Counting()
    with pytest.raises(Interrupted):
        fit(stage(tmp_path / "parts", first), HARDWARE)
    fit(stage(tmp_path / "parts", second), HARDWARE)
    assert first.epochs + second.epochs == [0, 1, 2]
    assert second.seen == whole.seen
    assert_same_outcome(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_metrics_are_standard_json(tmp_path):
    fit(stage(tmp_path), HARDWARE)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
        assert {"epoch", "steps", "lr", "loss", "seconds", "images_per_second"} <= record.keys()


def test_a_stage_trains_in_another_thread(tmp_path):
    """A signal cannot stop it there, because Python handles signals in the main thread only."""
    result = []
    thread = threading.Thread(target=lambda: result.append(fit(stage(tmp_path), HARDWARE)))
    thread.start()
    thread.join()
    assert result
