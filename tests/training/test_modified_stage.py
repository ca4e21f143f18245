"""A stage with every modifier saves averaged weights; stops, rollbacks and replays do not change its numbers."""

import signal

import pytest
import torch

from helpers.toy_stage import (
    EPOCHS,
    HARDWARE,
    PER_EPOCH,
    Method,
    Poisoned,
    assert_same_outcome,
    not_a_number,
    outcome,
    send,
    stage,
)
from ltat_fast.runs import checkpoint
from ltat_fast.runs.weights import read_weights, write_weights
from ltat_fast.signals import Interrupted
from ltat_fast.training import replay
from ltat_fast.training.evaluation import selection_twin
from ltat_fast.training.fit import fit, train_step
from ltat_fast.training.recovery import Diverged
from ltat_fast.training.stage import Selection
from ltat_fast.training.step import make_optimizer

pytestmark = pytest.mark.usefixtures("unmeasured")

ALL = {"awp": 0.01, "awp_from": 2, "ema": 0.3, "eps_balance": 0.4, "eps_warmup": 0.5}
STEPS = EPOCHS * PER_EPOCH


def weights(file) -> dict[str, torch.Tensor]:
    return read_weights(file)[0]


def average_of(state, prefix="average.") -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a stage with all modifiers that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert fit(stage(folder, modified=ALL), HARDWARE).finished
    return folder


class Recording(Method):
    """Keeps the weights and batch norm statistics that each step starts from."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def loss(self, model, *args):
        self.seen.append({name: t.clone() for name, t in model.state_dict().items()})
        return super().loss(model, *args)


def test_best_and_last_are_the_average_with_the_statistics_of_the_live_network(tmp_path):
    method, decay = Recording(), 0.3
    fit(stage(tmp_path, method, modified={"ema": decay}), HARDWARE)
    live = [*method.seen[1:], average_of(weights(tmp_path / "checkpoints" / "resume.safetensors"), "model.")]
    average = {name: t.double() for name, t in live[0].items()}  # 2.5 % of 15 steps are one step
    after = {0: average}
    for t, now in enumerate(live[1:]):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * now[name].double() for name in now}
        after[t + 1] = average
    for which, step in (("best", 2 * PER_EPOCH - 1), ("last", STEPS - 1)):
        saved = weights(tmp_path / "checkpoints" / f"{which}.safetensors")
        for name, tensor in saved.items():
            if name.startswith("1.running") or name.endswith("tracked"):
                assert torch.equal(tensor, live[step][name]), name
            else:
                torch.testing.assert_close(tensor.double(), after[step][name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved["0.weight"], live[step]["0.weight"])


def test_the_trajectory_of_the_live_weights_does_not_depend_on_the_average(tmp_path):
    for name, modified in (("with", {"ema": 0.9}), ("without", {})):
        fit(stage(tmp_path / name, modified=modified), HARDWARE)
    ours, theirs = (weights(tmp_path / name / "checkpoints" / "resume.safetensors") for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours.keys() - theirs.keys() == {f"average.{name}" for name, _ in stage(None).model.named_parameters()}


def test_each_evaluation_sees_the_average(tmp_path):
    of = stage(tmp_path, modified={"ema": 0.9})
    twin, seen = selection_twin(of.trained, of.config, HARDWARE), []

    def evaluate():
        twin.refresh()
        seen.append(twin(torch.ones(2, 3, 6, 6)))
        return {"pgd20": float(len(seen))}

    of.selection = Selection(evaluate, lambda epoch: True, "pgd20")
    fit(of, HARDWARE)
    network = stage(None).model
    network.load_state_dict(weights(tmp_path / "checkpoints" / "last.safetensors"))
    torch.testing.assert_close(seen[-1], network.eval()(torch.ones(2, 3, 6, 6)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[-1], of.model.eval()(torch.ones(2, 3, 6, 6)), rtol=1e-2)


@pytest.mark.parametrize("at", [1, 5, 7, 14])
def test_a_stage_stopped_by_a_signal_resumes_to_the_same_numbers(tmp_path, whole, at):
    with pytest.raises(Interrupted):
        fit(stage(tmp_path, Method(send(signal.SIGTERM, at)), modified=ALL), HARDWARE)
    assert fit(stage(tmp_path, modified=ALL), HARDWARE).finished
    assert_same_outcome(outcome(tmp_path), outcome(whole))


def test_a_stage_stopped_after_every_step_ends_with_the_same_numbers(tmp_path, whole):
    for _ in range(STEPS):
        with pytest.raises(Interrupted):
            fit(stage(tmp_path, Method(send(signal.SIGTERM, 1)), modified=ALL), HARDWARE)
    assert fit(stage(tmp_path, modified=ALL), HARDWARE).finished
    assert_same_outcome(outcome(tmp_path), outcome(whole))


def test_a_finished_stage_loads_its_average(whole):
    """The teacher of a resumed student is such a stage."""
    again = stage(whole, modified=ALL)
    assert fit(again, HARDWARE).finished
    expected = weights(whole / "checkpoints" / "last.safetensors")
    loaded = again.trained.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("save_minutes", [1e-9, 10.0])
def test_rollback_restores_the_average_and_skips_the_bad_batch(tmp_path, save_minutes):
    """The result equals that of a run that never saw this batch."""
    rolled = Poisoned(not_a_number, (1, 2))
    settings = {"on_nan": "rollback", "save_minutes": save_minutes, "modified": ALL}
    assert fit(stage(tmp_path / "rolled", rolled, **settings), HARDWARE).finished
    stop = EarlyStop(PER_EPOCH + 2)
    with pytest.raises(Interrupted):
        fit(stage(tmp_path / "without", stop, modified=ALL), HARDWARE)
    file = tmp_path / "without" / "checkpoints" / "resume.safetensors"
    tensors, card = read_weights(file)
    write_weights(file, tensors, card | {"skipped": [1, 2]})
    fit(stage(tmp_path / "without", modified=ALL), HARDWARE)
    assert_same_outcome(outcome(tmp_path / "rolled"), outcome(tmp_path / "without"))


class EarlyStop(Method):
    """Sends a signal in step ``at``. The loss of a step in which the weights are perturbed is evaluated twice."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.batches = at, []

    def loss(self, model, x, x_adv, y, progress):
        if not self.batches or not torch.equal(self.batches[-1], x):
            self.batches.append(x.clone())
            send(signal.SIGTERM, self.at)(len(self.batches))
        return super().loss(model, x, x_adv, y, progress)


def test_a_bad_step_is_replayed_from_its_dump(tmp_path):
    with pytest.raises(Diverged):
        fit(stage(tmp_path, Poisoned(not_a_number, (1, 2)), modified=ALL), HARDWARE)
    (dump,) = (tmp_path / "nan").iterdir()
    tensors, card = read_weights(dump)
    assert card["arguments"].items() >= {"awp": 0.01, "ema": 0.3, "budget": pytest.approx(2 / 3)}.items()
    assert average_of(tensors).keys() == dict(stage(None).model.named_parameters()).keys()
    for method, first in ((Method(), None), (Poisoned(not_a_number, (1, 2)), "loss (1 of 1 values)")):
        of = stage(None, method, modified=ALL)
        optimizer = make_optimizer(of.model, 0.1, 0.9, 5e-4)
        checkpoint.restore(tensors, dump, of.model, optimizer, "toy", of.state)
        step = train_step(of, optimizer, HARDWARE)
        findings = replay.examine(step, tensors["images"], tensors["labels"], card["arguments"])
        assert next(iter(findings), None) == first
