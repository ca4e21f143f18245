"""A stage of training, stopped and killed at every place it can be: it must always end with the same numbers."""

import contextlib
import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from toys import small_net

from ltat_fast.attacks import AttackConfig
from ltat_fast.data import DeviceLoader
from ltat_fast.engine import checkpoint, files, log, speed
from ltat_fast.engine.device import Hardware
from ltat_fast.engine.fit import Diverged, Interrupted, Stage, fit
from ltat_fast.engine.schedule import learning_rate
from ltat_fast.engine.signals import SIGNALS
from ltat_fast.errors import UserError
from ltat_fast.methods import Setting
from ltat_fast.methods.pgd_at import PgdAt

HARDWARE = Hardware(torch.device("cpu"), torch.float32, "test")
EPOCHS, PER_EPOCH = 3, 5
SCORES = [30.0, 50.0, 50.0]  # of epochs 1, 2, 3


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """No time for the FLOPs of a step and the speed of the machine. The uninterrupted stage does measure them: that the
    others end with its numbers also shows that measuring changes nothing."""
    monkeypatch.setattr(speed, "flops_per_image", lambda eager, x, y: 1e9)
    monkeypatch.setattr(speed, "matmul_ceiling", lambda device, dtype: 1e12)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


class Method(PgdAt):
    """PGD-AT that calls ``at_step(number)`` before each step's loss, numbered from 1 over the life of the process."""

    def __init__(self, at_step=lambda number: None):
        self.calls, self.at_step, self.progress = 0, at_step, []
        self.setup(Setting(torch.ones(3)))

    def loss(self, model, x, x_adv, y, progress):
        self.calls += 1
        self.progress.append(progress.item())
        replacement = self.at_step(self.calls)
        loss, parts = super().loss(model, x, x_adv, y, progress)
        return (loss if replacement is None else replacement(model, loss)), parts


def stage(folder, method=None, **changes) -> Stage:
    rng = np.random.RandomState(0)
    loader = DeviceLoader(
        rng.randint(0, 256, (42, 3, 6, 6)).astype(np.uint8),
        rng.randint(0, 3, 42),
        batch_size=8,
        seed=1,
        pad=1,
        flip=True,
        device="cpu",
    )
    assert len(loader) == PER_EPOCH

    def evaluate(model):
        return {"test_pgd20": SCORES[evaluate.calls - 1], "test_clean": 60.0}

    def evaluate_when(epoch):
        evaluate.calls = epoch + 1  # scripted by epoch, so that a resumed stage sees what the first saw
        return True

    settings = {
        "name": "student",
        "folder": folder,
        "model": small_net(seed=5).to(memory_format=torch.channels_last),
        "arch": "toy",
        "method": method or Method(),
        "loader": loader,
        "attack": AttackConfig(0.1, 0.05, 2),
        "epochs": EPOCHS,
        "lr": 0.1,
        "lr_schedule": "onecycle",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "seed": 3,
        "card": lambda epoch: {"arch": "toy", "epoch": epoch},
        "evaluate": evaluate,
        "evaluate_when": evaluate_when,
        "select_by": "test_pgd20",
        "backend": "none",
    }
    return Stage(**(settings | changes))


TIMES = {"seconds", "images_per_second", "share_of_ceiling"}


def outcome(folder):
    """All that a stage leaves, but for its times."""
    records = log.read_metrics(folder / "metrics.jsonl")
    metrics = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    files = {name: checkpoint.read(folder / "checkpoints" / f"{name}.safetensors") for name in ("best", "last")}
    return metrics, files


def assert_same_outcome(ours, theirs):
    (metrics, files), (expected_metrics, expected_files) = ours, theirs
    assert metrics == expected_metrics
    assert [list(record) for record in metrics] == [list(record) for record in expected_metrics]  # in the same order
    for name, (tensors, card) in files.items():
        expected, expected_card = expected_files[name]
        assert card == expected_card
        assert all(torch.equal(tensors[k], expected[k]) for k in expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    progress = fit(stage(folder), HARDWARE)
    assert progress.finished
    return outcome(folder)


def saved(folder) -> dict:
    return checkpoint.read(folder / "checkpoints" / "resume.safetensors")[1]


# -- what an uninterrupted stage does -------------------------------------------------------------------------------


def test_records(uninterrupted):
    metrics, _ = uninterrupted
    assert [(r["epoch"], r["steps"]) for r in metrics] == [(1, 5), (2, 5), (3, 5)]
    assert [r["test_pgd20"] for r in metrics] == SCORES
    last_rates = [learning_rate("onecycle", 0.1, e, PER_EPOCH - 1, EPOCHS, PER_EPOCH) for e in range(EPOCHS)]
    assert [r["lr"] for r in metrics] == pytest.approx(last_rates)
    assert all(0.3 < r["loss"] == r["ce"] < 3 for r in metrics)


def test_progress_counts_epochs_from_one(tmp_path):
    method = Method()
    fit(stage(tmp_path, method), HARDWARE)
    expected = np.repeat(np.arange(1, EPOCHS + 1) / EPOCHS, PER_EPOCH)
    np.testing.assert_allclose(method.progress, expected, rtol=1e-6)


def test_best_is_the_first_of_the_highest(uninterrupted):
    _, files = uninterrupted
    assert files["best"][1]["epoch"] == 2
    assert files["last"][1]["epoch"] == 3
    assert not torch.equal(files["best"][0]["0.weight"], files["last"][0]["0.weight"])


def test_best_goes_by_the_number_that_selects(tmp_path):
    """Clean accuracy peaks in epoch 1, robust accuracy in epoch 3."""
    by_epoch = iter([{"pgd20": 10.0, "clean": 90.0}, {"pgd20": 20.0, "clean": 80.0}, {"pgd20": 30.0, "clean": 70.0}])
    fit(stage(tmp_path, evaluate=lambda model: next(by_epoch), select_by="pgd20"), HARDWARE)
    assert checkpoint.read(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 3
    assert saved(tmp_path)["best"] == {"epoch": 3, "pgd20": 30.0, "clean": 70.0}


def test_the_last_epoch_is_evaluated_even_if_no_other_is(tmp_path):
    never = stage(tmp_path, evaluate=lambda model: {"pgd20": 0.0}, select_by="pgd20", evaluate_when=lambda epoch: False)
    fit(never, HARDWARE)
    assert ["pgd20" in r for r in log.read_metrics(tmp_path / "metrics.jsonl")] == [False, False, True]
    assert checkpoint.read(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 3


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (5, 1), (6, 2), (1000, 3)])
def test_max_steps(tmp_path, steps, epochs):
    method = Method()
    fit(stage(tmp_path, method, max_steps=steps), HARDWARE)
    assert method.calls == min(steps, EPOCHS * PER_EPOCH)
    metrics, files = outcome(tmp_path)
    assert sum(r["steps"] for r in metrics) == method.calls
    assert len(metrics) == files["last"][1]["epoch"] == epochs
    again = Method()
    assert fit(stage(tmp_path, again, max_steps=steps), HARDWARE).finished
    assert again.calls == 0


def test_another_seed_is_another_run(tmp_path, uninterrupted):
    fit(stage(tmp_path, seed=4), HARDWARE)
    assert outcome(tmp_path)[0] != uninterrupted[0]


def test_a_finished_stage_gives_its_weights_and_trains_no_more(tmp_path, uninterrupted):
    fit(stage(tmp_path), HARDWARE)
    later = stage(tmp_path, Method(lambda number: pytest.fail("trained again")))
    assert fit(later, HARDWARE).finished
    assert torch.equal(later.model.state_dict()["0.weight"], uninterrupted[1]["last"][0]["0.weight"])


def test_images_a_second_and_the_share_of_the_ceiling(tmp_path):
    fit(stage(tmp_path), HARDWARE)
    for record in log.read_metrics(tmp_path / "metrics.jsonl"):
        assert record["images_per_second"] == pytest.approx(40 / record["seconds"], rel=0.1)
        assert record["share_of_ceiling"] == pytest.approx(record["images_per_second"] * 1e9 / 1e12, abs=1e-3)


# -- signals --------------------------------------------------------------------------------------------------------


def send(number: int, at: int):
    def at_step(step):
        if step == at:
            os.kill(os.getpid(), number)

    return at_step


@pytest.mark.parametrize("at", range(1, EPOCHS * PER_EPOCH + 1))
def test_a_signal_in_any_step_saves_and_stops_and_the_numbers_stay_the_same(tmp_path, uninterrupted, at):
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, at))), HARDWARE)
    assert saved(tmp_path)["epoch"] * PER_EPOCH + saved(tmp_path)["step"] == at
    rest = Method()
    assert fit(stage(tmp_path, rest), HARDWARE).finished
    assert rest.calls == EPOCHS * PER_EPOCH - at
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def test_stopped_over_and_over(tmp_path, uninterrupted):
    for _ in range(EPOCHS * PER_EPOCH):
        with pytest.raises(Interrupted):
            fit(stage(tmp_path, Method(send(signal.SIGUSR1, 1))), HARDWARE)
    assert fit(stage(tmp_path), HARDWARE).finished
    assert_same_outcome(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("epoch", [1, EPOCHS])
def test_a_signal_during_an_evaluation_is_not_lost(tmp_path, uninterrupted, epoch):
    """Also in the last epoch: what would come next is another stage, or hours of AutoAttack."""
    first = stage(tmp_path)
    evaluate = first.evaluate

    def evaluate_and_signal(model):
        if len(log.read_metrics(tmp_path / "metrics.jsonl")) == epoch - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model)

    first.evaluate = evaluate_and_signal
    with pytest.raises(Interrupted):
        fit(first, HARDWARE)
    # The step after an evaluation may still be taken before the signal is seen, but no epoch.
    assert saved(tmp_path)["epoch"] == epoch
    assert saved(tmp_path)["step"] <= 1
    fit(stage(tmp_path), HARDWARE)
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def test_the_handlers_of_before_are_back_afterwards(tmp_path):
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGINT, 2))), HARDWARE)
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_a_second_interrupt_does_not_wait(tmp_path):
    def twice(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(stage(tmp_path, Method(twice)), HARDWARE)


class Counting(Method):
    """A method with a tensor of its own, one that its loss depends on."""

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
def test_what_a_method_keeps_is_resumed_with_the_rest(tmp_path, at):
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


# -- kills ----------------------------------------------------------------------------------------------------------


def kill_at_call(monkeypatch, module, name, number, *, before: bool):
    """Die at the ``number``-th call of ``module.name``, before or after it has done its work."""
    original, calls = getattr(module, name), []

    def deadly(*args, **kwargs):
        calls.append(None)
        if len(calls) == number and before:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == number:
            raise Killed
        return result

    monkeypatch.setattr(module, name, deadly)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (checkpoint, "save_state", 1),
        (checkpoint, "save_state", 2),
        (checkpoint, "save_state", 3),
        *((files.os, "replace", number) for number in range(1, 12)),  # every rename there is
        (log.StageLog, "epoch", 1),
        (log.StageLog, "epoch", 2),
        (log.StageLog, "epoch", 3),
    ],
)
def test_killed_around_every_write(tmp_path, uninterrupted, monkeypatch, module, name, number, before):
    with monkeypatch.context() as patched:
        kill_at_call(patched, module, name, number, before=before)
        with pytest.raises(Killed):
            fit(stage(tmp_path), HARDWARE)
    assert checkpoint.has_state(tmp_path / "checkpoints" / "resume.safetensors") or number <= 2
    assert fit(stage(tmp_path), HARDWARE).finished
    assert_same_outcome(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("at", [1, 4, 6, 8, 15])
@pytest.mark.parametrize("save_minutes", [1e-9, 10.0])
def test_killed_in_a_step(tmp_path, uninterrupted, at, save_minutes):
    """Saved after every step, or after every epoch only."""

    def die(step):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        fit(stage(tmp_path, Method(die), save_minutes=save_minutes), HARDWARE)
    if save_minutes < 1 and at > 1:
        assert saved(tmp_path)["epoch"] * PER_EPOCH + saved(tmp_path)["step"] == at - 1
    fit(stage(tmp_path), HARDWARE)
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def flip_a_bit(file):
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)


def cut_short(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
@pytest.mark.parametrize("save_minutes", [1e-9, 10.0])
@pytest.mark.parametrize("at", [2, 5, 8, 11])
def test_a_damaged_newest_state_gives_way_to_the_one_before(tmp_path, uninterrupted, capsys, at, damage, save_minutes):
    """Records and best weights of what is taken again are there already: in the end all is as if nothing had been."""
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, at)), save_minutes=save_minutes), HARDWARE)
    newest = tmp_path / "checkpoints" / "resume.safetensors"
    before = checkpoint.read(tmp_path / "checkpoints" / "resume.previous.safetensors")[1]
    damage(newest)
    content = newest.read_bytes()
    rest = Method()
    assert fit(stage(tmp_path, rest), HARDWARE).finished
    assert rest.calls == EPOCHS * PER_EPOCH - before["epoch"] * PER_EPOCH - before["step"]
    assert "WARNING" in (said := capsys.readouterr().out)
    assert "resume.safetensors is damaged" in said
    assert newest.with_name("resume.safetensors.damaged").read_bytes() == content
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def test_a_damaged_state_never_takes_the_place_of_the_whole_one(tmp_path, monkeypatch):
    """Killed in the first save after the newest was found damaged: what it fell back to must still be there."""
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, 7))), HARDWARE)
    flip_a_bit(tmp_path / "checkpoints" / "resume.safetensors")
    replace = os.replace

    def die_before_the_new_state_is_named(source, target):
        if source.suffix == ".partial" and target.name == "resume.safetensors":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", die_before_the_new_state_is_named)
        with pytest.raises(Killed):
            fit(stage(tmp_path), HARDWARE)
    assert fit(stage(tmp_path), HARDWARE).finished


def test_two_damaged_states_are_refused_and_left_alone(tmp_path):
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, 7))), HARDWARE)
    states = [tmp_path / "checkpoints" / f"resume.{name}safetensors" for name in ("", "previous.")]
    for state in states:
        flip_a_bit(state)
    content = [state.read_bytes() for state in states]
    metrics = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"resume\.safetensors is damaged: .*resume\.previous\.safetensors.*nothing is"):
        fit(stage(tmp_path), HARDWARE)
    assert [state.read_bytes() for state in states] == content
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_best_weights_of_an_epoch_that_is_taken_again_keep_their_score(tmp_path, monkeypatch):
    """On a GPU an epoch taken again can score less: what best.safetensors holds and what the run says must agree."""
    with monkeypatch.context() as patched:
        kill_at_call(patched, checkpoint, "save_state", 3, before=True)  # epoch 2 is written as the best, but not saved
        with pytest.raises(Killed):
            fit(stage(tmp_path), HARDWARE)
    assert saved(tmp_path)["best"]["epoch"] == 1
    again = stage(tmp_path, evaluate=lambda model: {"test_pgd20": 40.0}, evaluate_when=lambda epoch: True)
    assert fit(again, HARDWARE).best == {"epoch": 2, "test_pgd20": 50.0, "test_clean": 60.0}
    assert checkpoint.read(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 2


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, os.remove])
def test_best_weights_that_are_lost_are_picked_anew(tmp_path, capsys, damage):
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, 12))), HARDWARE)
    damage(tmp_path / "checkpoints" / "best.safetensors")
    assert fit(stage(tmp_path), HARDWARE).best["epoch"] == 3
    assert "the best epoch is picked from those still to come" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 3


# -- numbers that are none ------------------------------------------------------------------------------------------


class Poisoned(Method):
    """PGD-AT with ``replacement(model, loss)`` for the loss on the given batches, at each (epoch, step), from 0."""

    def __init__(self, replacement, *places):
        super().__init__()
        loader = stage(None, Method()).loader
        self.bad = [next(loader.batches(epoch, step))[0] for epoch, step in places]
        self.replacement = replacement

    def loss(self, model, x, x_adv, y, progress):
        loss, parts = super().loss(model, x, x_adv, y, progress)
        return (self.replacement(model, loss) if any(torch.equal(x, bad) for bad in self.bad) else loss), parts


def not_a_number(model, loss):
    return loss * float("nan")


def finite_with_infinite_gradient(model, loss):
    # sqrt has an infinite slope at zero: the loss is a number, the weights after the step are not
    return loss + (model[6].weight * 0).sum().sqrt()


def dumps(folder) -> list[str]:
    return sorted(path.name for path in (folder / "nan").glob("*"))


@pytest.mark.parametrize("replacement", [not_a_number, finite_with_infinite_gradient])
@pytest.mark.parametrize("at", [1, 4])
def test_divergence_names_its_step_and_keeps_the_last_good_state(tmp_path, replacement, at):
    """The step in which the gradient is infinite, not the one after, whose loss it spoils."""
    with pytest.raises(Diverged) as error:
        fit(stage(tmp_path, Poisoned(replacement, (1, at))), HARDWARE)
    message = str(error.value)
    what = "loss" if replacement is not_a_number else "weights"
    assert f"student: {what} not finite at epoch 2, step {at + 1}; python -m ltat_fast.replay {tmp_path}" in message
    assert f"the last good state, of epoch 1, step 0, is in {tmp_path / 'checkpoints'}" in message
    assert saved(tmp_path)["epoch"] == 1
    for file in [*(tmp_path / "checkpoints").iterdir(), *(tmp_path / "nan").iterdir()]:
        tensors, _ = checkpoint.read(file)
        assert all(t.isfinite().all() for t in tensors.values()), file
    assert [r["epoch"] for r in log.read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("at", [1, 4])
def test_the_dump_is_what_stood_before_the_bad_step(tmp_path, at):
    """The same weights, momentum, batch and seed as of a run stopped there, which nothing has poisoned."""
    with pytest.raises(Diverged):
        fit(stage(tmp_path / "bad", Poisoned(not_a_number, (1, at))), HARDWARE)
    with pytest.raises(Interrupted):
        fit(stage(tmp_path / "good", Method(send(signal.SIGTERM, PER_EPOCH + at))), HARDWARE)
    assert dumps(tmp_path / "bad") == [f"epoch-2-step-{at + 1}.safetensors"]
    dump, card = checkpoint.read(tmp_path / "bad" / "nan" / f"epoch-2-step-{at + 1}.safetensors")
    good, _ = checkpoint.read(tmp_path / "good" / "checkpoints" / "resume.safetensors")
    assert dump.keys() - good.keys() == {"images", "labels"}
    assert all(torch.equal(dump[name], good[name]) for name in good)
    x, y = next(stage(tmp_path).loader.batches(1, at))
    assert torch.equal(dump["images"], x)
    assert torch.equal(dump["labels"], y)
    assert card["arguments"] == stage(tmp_path).step_arguments(1, at)


def test_divergence_in_the_first_epoch_goes_back_to_the_start(tmp_path):
    with pytest.raises(Diverged, match=r"epoch 1, step 3; .*the last good state, of epoch 0, step 0, is in"):
        fit(stage(tmp_path, Poisoned(not_a_number, (0, 2))), HARDWARE)
    assert torch.equal(
        checkpoint.read(tmp_path / "checkpoints" / "resume.safetensors")[0]["model.0.weight"],
        small_net(seed=5).state_dict()["0.weight"],
    )


def test_divergence_that_does_not_come_back_is_said_to(tmp_path):
    once = Method(lambda step: not_a_number if step == 7 else None)
    with pytest.raises(Diverged, match="loss not finite in epoch 2; it did not come back when the steps since were"):
        fit(stage(tmp_path, once, on_nan="rollback"), HARDWARE)
    assert saved(tmp_path)["epoch"] == 1


def test_it_is_seen_within_an_epoch(tmp_path, monkeypatch):
    """Every 50 steps, which are here two: the batches after the next look are not trained on."""
    monkeypatch.setattr("ltat_fast.engine.fit.CHECK_EVERY", 2)
    method = Poisoned(not_a_number, (0, 0))
    with pytest.raises(Diverged):
        fit(stage(tmp_path, method), HARDWARE)
    assert method.calls == 2 + 1  # and once more, to find it


@pytest.mark.parametrize("replacement", [not_a_number, finite_with_infinite_gradient])
@pytest.mark.parametrize("save_minutes", [1e-9, 10.0])
def test_rollback_leaves_the_bad_batch_out(tmp_path, replacement, save_minutes):
    """What the run then does is what one that never saw that batch does."""
    with_it = stage(tmp_path / "rolled", Poisoned(replacement, (1, 2)), on_nan="rollback", save_minutes=save_minutes)
    assert fit(with_it, HARDWARE).finished

    without = stage(tmp_path / "without", Method())
    with pytest.raises(Interrupted):
        fit(stage(tmp_path / "without", Method(send(signal.SIGTERM, PER_EPOCH + 2))), HARDWARE)
    file = tmp_path / "without" / "checkpoints" / "resume.safetensors"
    tensors, card = checkpoint.read(file)
    checkpoint.write(file, tensors, card | {"skipped": [1, 2]})
    fit(without, HARDWARE)

    assert_same_outcome(outcome(tmp_path / "rolled"), outcome(tmp_path / "without"))
    records = log.read_metrics(tmp_path / "rolled" / "metrics.jsonl")
    assert [(r["steps"], r.get("skipped_step")) for r in records] == [(5, None), (4, 3), (5, None)]
    assert saved(tmp_path / "rolled")["skipped"] == [1, 2]


def test_a_second_divergence_stops(tmp_path):
    poisoned = Poisoned(not_a_number, (1, 1), (2, 3))
    with pytest.raises(Diverged, match=r"epoch 3, step 4; .* a batch had been left out before, so the run stops"):
        fit(stage(tmp_path, poisoned, on_nan="rollback"), HARDWARE)
    assert dumps(tmp_path) == ["epoch-2-step-2.safetensors", "epoch-3-step-4.safetensors"]
    assert saved(tmp_path)["epoch"] == 2


def test_a_rolled_back_run_killed_later_still_knows_what_it_left_out(tmp_path):
    class Mortal(Poisoned):
        def loss(self, *args):
            if self.calls == 14:  # 10 until it is seen, 3 to find it, 1 since
                raise Killed
            return super().loss(*args)

    for folder, method in (("whole", Poisoned), ("killed", Mortal)):
        with contextlib.suppress(Killed):
            fit(stage(tmp_path / folder, method(not_a_number, (1, 2)), on_nan="rollback"), HARDWARE)
    assert saved(tmp_path / "killed")["skipped"] == [1, 2]
    fit(stage(tmp_path / "killed", Poisoned(not_a_number, (1, 2)), on_nan="stop"), HARDWARE)
    assert_same_outcome(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_a_signal_after_divergence_saves_nothing(tmp_path):
    class Stopped(Poisoned):
        def loss(self, *args):
            if self.calls == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(*args)

    with pytest.raises(Diverged):
        fit(stage(tmp_path, Stopped(not_a_number, (1, 1))), HARDWARE)
    assert saved(tmp_path)["epoch"] == 1


def test_metrics_are_json_that_anyone_can_read(tmp_path):
    fit(stage(tmp_path), HARDWARE)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
        assert {"epoch", "steps", "lr", "loss", "seconds", "images_per_second"} <= record.keys()


def test_signals_are_for_the_main_thread(tmp_path):
    """As a library, from another thread: training works, it just cannot be stopped by a signal."""
    result = []
    thread = threading.Thread(target=lambda: result.append(fit(stage(tmp_path), HARDWARE)))
    thread.start()
    thread.join()
    assert result
