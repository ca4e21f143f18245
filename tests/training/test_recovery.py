"""The state from which a stage resumes after a kill, damaged files, or numbers that are not finite."""

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
from ltat_fast.runs import checkpoint
from ltat_fast.runs.records import StageLog, read_metrics
from ltat_fast.runs.weights import read_weights, write_weights
from ltat_fast.signals import Interrupted
from ltat_fast.training.fit import fit
from ltat_fast.training.recovery import Diverged
from ltat_fast.training.stage import Selection

pytestmark = pytest.mark.usefixtures("unmeasured")


class Killed(BaseException):
    """A stand-in for SIGKILL: no code of ours catches it."""


def kill_at_call(monkeypatch, module, name, number, *, before: bool):
    """Raise Killed at the ``number``-th call of ``module.name``, before or after the original function runs."""
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
        *((files.os, "replace", number) for number in range(1, 13)),  # all renames of the stage
        (StageLog, "epoch", 1),
        (StageLog, "epoch", 2),
        (StageLog, "epoch", 3),
    ],
)
def test_a_stage_killed_around_any_write_resumes_to_the_same_numbers(
    tmp_path, uninterrupted, monkeypatch, module, name, number, before
):
    with monkeypatch.context() as patched:
        kill_at_call(patched, module, name, number, before=before)
        with pytest.raises(Killed):
            fit(stage(tmp_path), HARDWARE)
    assert checkpoint.has_state(tmp_path / "checkpoints" / "resume.safetensors") or number <= 3
    assert fit(stage(tmp_path), HARDWARE).finished
    assert_same_outcome(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("number", [1, 3, 6])
def test_a_stage_killed_around_a_record_of_steps_has_each_once(tmp_path, uninterrupted, monkeypatch, number, before):
    """The third and the sixth record are of the last step of an epoch, after whose save the epoch is not over yet."""
    with monkeypatch.context() as patched:
        kill_at_call(patched, StageLog, "step", number, before=before)
        with pytest.raises(Killed):
            fit(stage(tmp_path, save_minutes=1e-9), HARDWARE)
    assert fit(stage(tmp_path), HARDWARE).finished
    assert_same_outcome(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("at", [1, 4, 6, 8, 15])
@pytest.mark.parametrize("save_minutes", [1e-9, 10.0])
def test_a_stage_killed_in_any_step_resumes_to_the_same_numbers(tmp_path, uninterrupted, at, save_minutes):
    """The stage saves after every step, or only after every epoch."""

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
def test_a_damaged_state_is_replaced_by_the_previous_one(tmp_path, uninterrupted, capsys, at, damage, save_minutes):
    """The repeated steps have left records and best weights, which must not change the result."""
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


def test_a_repeated_epoch_is_recorded_once(tmp_path, uninterrupted, monkeypatch):
    """The stage is killed after it saved epoch 2, the best. That state is damaged; the previous one is of epoch 1."""
    with monkeypatch.context() as patched:
        kill_at_call(patched, checkpoint, "save_state", 3, before=False)
        with pytest.raises(Killed):
            fit(stage(tmp_path), HARDWARE)
    assert [record["epoch"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    flip_a_bit(tmp_path / "checkpoints" / "resume.safetensors")
    rest = Method()
    fit(stage(tmp_path, rest), HARDWARE)
    assert rest.calls == 2 * PER_EPOCH
    assert_same_outcome(outcome(tmp_path), uninterrupted)


def test_a_damaged_state_never_replaces_the_previous_one(tmp_path, monkeypatch):
    """The stage is killed in its first save after it fell back to the previous state, which must still exist."""
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


def test_two_damaged_states_are_refused_and_kept(tmp_path):
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


def test_best_weights_of_a_repeated_epoch_keep_their_score(tmp_path, monkeypatch):
    """On a GPU a repeated epoch can score less: best.safetensors and the recorded best score must still agree."""
    with monkeypatch.context() as patched:
        kill_at_call(
            patched, checkpoint, "save_state", 3, before=True
        )  # best.safetensors is of epoch 2, the state of epoch 1
        with pytest.raises(Killed):
            fit(stage(tmp_path), HARDWARE)
    assert saved(tmp_path)["best"]["epoch"] == 1
    selection = Selection(lambda: {"test_pgd20": 40.0}, lambda epoch: True, "test_pgd20")
    again = stage(tmp_path, selection=selection)
    assert fit(again, HARDWARE).best == {"epoch": 2, "test_pgd20": 50.0, "test_clean": 60.0}
    assert read_weights(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 2


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, os.remove])
def test_lost_best_weights_are_selected_from_the_remaining_epochs(tmp_path, capsys, damage):
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, 12))), HARDWARE)
    damage(tmp_path / "checkpoints" / "best.safetensors")
    assert fit(stage(tmp_path), HARDWARE).best["epoch"] == 3
    assert "the best epoch is selected from the remaining epochs" in capsys.readouterr().out
    assert read_weights(tmp_path / "checkpoints" / "best.safetensors")[1]["epoch"] == 3


@pytest.mark.parametrize("line", [b"\xff", b"1", b'{"epoch": 1, "note": "\x1e"}', b"[" * 100_000])
def test_a_damaged_log_does_not_stop_a_resumption(tmp_path, uninterrupted, capsys, line):
    """Only the damaged records are lost."""
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, 12))), HARDWARE)
    for name in ("metrics.jsonl", "steps.jsonl"):
        _, rest = (tmp_path / name).read_bytes().split(b"\n", 1)
        (tmp_path / name).write_bytes(line + b"\n" + rest)
    assert fit(stage(tmp_path), HARDWARE).finished
    said = capsys.readouterr().out
    assert said.count("WARNING") == 2
    assert "steps.jsonl: damaged and skipped: line 1; the damaged file is kept as steps.jsonl.damaged" in said
    metrics, files, steps = uninterrupted
    assert_same_outcome(outcome(tmp_path), (metrics[1:], files, steps[1:]))


def dumps(folder) -> list[str]:
    return sorted(path.name for path in (folder / "nan").glob("*"))


@pytest.mark.parametrize("replacement", [not_a_number, finite_with_infinite_gradient])
@pytest.mark.parametrize("at", [1, 4])
def test_divergence_names_its_step_and_keeps_the_last_good_state(tmp_path, replacement, at):
    """An infinite gradient is found in its own step, not in the next step, whose loss is not finite."""
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
    assert [r["epoch"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("at", [1, 4])
def test_the_dump_holds_the_state_before_the_bad_step(tmp_path, at):
    """Weights, momentum, batch and seed equal those of a healthy run that was stopped there."""
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


def test_divergence_that_cannot_be_repeated_is_reported(tmp_path):
    once = Method(lambda step: not_a_number if step == 7 else None)
    with pytest.raises(Diverged, match=r"loss not finite in epoch 2; repeating the steps .* gave finite numbers"):
        fit(stage(tmp_path, once, on_nan="rollback"), HARDWARE)
    assert saved(tmp_path)["epoch"] == 1


def test_divergence_is_seen_within_an_epoch(tmp_path):
    """The loss is checked every --log-every steps, here every two. Later batches are not trained on."""
    method = Poisoned(not_a_number, (0, 0))
    with pytest.raises(Diverged):
        fit(stage(tmp_path, method, log_every=2), HARDWARE)
    assert method.calls == 2 + 1  # two steps, and the bad one again to find it


@pytest.mark.parametrize("replacement", [not_a_number, finite_with_infinite_gradient])
@pytest.mark.parametrize("save_minutes", [1e-9, 10.0])
def test_rollback_skips_the_bad_batch(tmp_path, replacement, save_minutes):
    """The result equals that of a run that never saw this batch."""
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
    records = read_metrics(tmp_path / "rolled" / "metrics.jsonl")
    assert [(r["steps"], r.get("skipped_step")) for r in records] == [(5, None), (4, 3), (5, None)]
    assert saved(tmp_path / "rolled")["skipped"] == [1, 2]


def test_a_second_divergence_stops_the_run(tmp_path):
    poisoned = Poisoned(not_a_number, (1, 1), (2, 3))
    with pytest.raises(Diverged, match=r"epoch 3, step 4; .* a batch was skipped before, so the run stops"):
        fit(stage(tmp_path, poisoned, on_nan="rollback"), HARDWARE)
    assert dumps(tmp_path) == ["epoch-2-step-2.safetensors", "epoch-3-step-4.safetensors"]
    assert saved(tmp_path)["epoch"] == 2


def test_a_killed_run_still_skips_the_batch_after_a_rollback(tmp_path):
    class Mortal(Poisoned):
        def loss(self, *args):
            if self.calls == 14:  # 10 until divergence is seen, 3 to find its step, 1 more
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
