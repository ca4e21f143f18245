"""A stage that is killed, whose files are damaged, or whose numbers stop being finite, and what it goes on from."""

import contextlib
import os
import signal

import pytest
import torch

from helpers.toy_networks import small_net
from helpers.toy_stage import (
    EPOCHS,
    HARDWARE,
    PER_EPOCH,
    Method,
    Poisoned,
    assert_same_outcome,
    finite_with_infinite_gradient,
    not_a_number,
    outcome,
    saved,
    send,
    stage,
)
from ltat_fast import files
from ltat_fast.errors import UserError
from ltat_fast.runs import checkpoint, log
from ltat_fast.runs.weights import read_weights, write_weights
from ltat_fast.training.fit import fit
from ltat_fast.training.recovery import Diverged
from ltat_fast.training.signals import Interrupted
from ltat_fast.training.stage import Selection

pytestmark = pytest.mark.usefixtures("unmeasured")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


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
    before = read_weights(tmp_path / "checkpoints" / "resume.previous.safetensors")[1]
    damage(newest)
    content = newest.read_bytes()
    rest = Method()
    assert fit(stage(tmp_path, rest), HARDWARE).finished
    assert rest.calls == EPOCHS * PER_EPOCH - before["epoch"] * PER_EPOCH - before["step"]
    assert "WARNING" in (said := capsys.readouterr().out)
    assert "resume.safetensors is damaged" in said
    assert newest.with_name("resume.safetensors.damaged").read_bytes() == content
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def test_an_epoch_recorded_after_the_older_state_is_recorded_once(tmp_path, uninterrupted, monkeypatch):
    """Killed after epoch 2, the best, was saved; that state is damaged, and the older one knows of epoch 1 alone."""
    with monkeypatch.context() as patched:
        kill_at_call(patched, checkpoint, "save_state", 3, before=False)
        with pytest.raises(Killed):
            fit(stage(tmp_path), HARDWARE)
    assert [record["epoch"] for record in log.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    flip_a_bit(tmp_path / "checkpoints" / "resume.safetensors")
    rest = Method()
    fit(stage(tmp_path, rest), HARDWARE)
    assert rest.calls == 2 * PER_EPOCH
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
    with pytest.raises(UserError, match=r"resume\.safetensors is damaged: .*resume\.previous\.safetensors.*no state"):
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
    selection = Selection(lambda model: {"test_pgd20": 40.0}, lambda epoch: True, "test_pgd20")
    again = stage(tmp_path, selection=selection)
    assert fit(again, HARDWARE).best == {"epoch": 2, "test_pgd20": 50.0, "test_clean": 60.0}
    assert read_weights(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 2


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, os.remove])
def test_best_weights_that_are_lost_are_picked_anew(tmp_path, capsys, damage):
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, 12))), HARDWARE)
    damage(tmp_path / "checkpoints" / "best.safetensors")
    assert fit(stage(tmp_path), HARDWARE).best["epoch"] == 3
    assert "the best epoch is selected from the remaining epochs" in capsys.readouterr().out
    assert read_weights(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 3


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
    assert f"the last good state (epoch 1, step 0) is in {tmp_path / 'checkpoints'}" in message
    assert saved(tmp_path)["epoch"] == 1
    for file in [*(tmp_path / "checkpoints").iterdir(), *(tmp_path / "nan").iterdir()]:
        tensors, _ = read_weights(file)
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
    dump, card = read_weights(tmp_path / "bad" / "nan" / f"epoch-2-step-{at + 1}.safetensors")
    good, _ = read_weights(tmp_path / "good" / "checkpoints" / "resume.safetensors")
    assert dump.keys() - good.keys() == {"images", "labels"}
    assert all(torch.equal(dump[name], good[name]) for name in good)
    x, y = next(stage(tmp_path).loader.batches(1, at))
    assert torch.equal(dump["images"], x)
    assert torch.equal(dump["labels"], y)
    assert card["arguments"] == stage(tmp_path).step_arguments(1, at)


def test_divergence_in_the_first_epoch_goes_back_to_the_start(tmp_path):
    with pytest.raises(Diverged, match=r"epoch 1, step 3; .*the last good state \(epoch 0, step 0\) is in"):
        fit(stage(tmp_path, Poisoned(not_a_number, (0, 2))), HARDWARE)
    assert torch.equal(
        read_weights(tmp_path / "checkpoints" / "resume.safetensors")[0]["model.0.weight"],
        small_net(seed=5).state_dict()["0.weight"],
    )


def test_divergence_that_does_not_come_back_is_said_to(tmp_path):
    once = Method(lambda step: not_a_number if step == 7 else None)
    with pytest.raises(Diverged, match=r"loss not finite in epoch 2; repeating the steps .* gave finite numbers"):
        fit(stage(tmp_path, once, on_nan="rollback"), HARDWARE)
    assert saved(tmp_path)["epoch"] == 1


def test_it_is_seen_within_an_epoch(tmp_path, monkeypatch):
    """Every 50 steps, which are here two: the batches after the next look are not trained on."""
    monkeypatch.setattr("ltat_fast.training.fit.CHECK_EVERY", 2)
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
    tensors, card = read_weights(file)
    write_weights(file, tensors, card | {"skipped": [1, 2]})
    fit(without, HARDWARE)

    assert_same_outcome(outcome(tmp_path / "rolled"), outcome(tmp_path / "without"))
    records = log.read_metrics(tmp_path / "rolled" / "metrics.jsonl")
    assert [(r["steps"], r.get("skipped_step")) for r in records] == [(5, None), (4, 3), (5, None)]
    assert saved(tmp_path / "rolled")["skipped"] == [1, 2]


def test_a_second_divergence_stops(tmp_path):
    poisoned = Poisoned(not_a_number, (1, 1), (2, 3))
    with pytest.raises(Diverged, match=r"epoch 3, step 4; .* a batch was skipped before, so the run stops"):
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
