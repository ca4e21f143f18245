"""A stage of training on random images, small enough to stop, kill or poison it at every step."""

import os

import numpy as np
import torch

from helpers.toy_networks import small_net
from helpers.train_runs import without_times
from ltat_fast.config import Config
from ltat_fast.data import DeviceLoader
from ltat_fast.methods import MethodContext, modifiers
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.runs.records import STEPS, read_metrics, read_steps
from ltat_fast.runs.weights import read_weights
from ltat_fast.training.device import Hardware
from ltat_fast.training.stage import Selection, Stage

HARDWARE = Hardware(torch.device("cpu"), torch.float32, "test")
EPOCHS, PER_EPOCH = 3, 5
SCORES = [30.0, 50.0, 50.0]  # of epochs 1, 2, 3


class Method(PgdAt):
    """PGD-AT that calls ``at_step(number)`` before the loss of each step, which are numbered from 1."""

    def __init__(self, at_step=lambda number: None):
        self.calls, self.at_step, self.progress = 0, at_step, []
        self.setup(MethodContext(torch.ones(3)))

    def loss(self, model, x, x_adv, y, progress):
        self.calls += 1
        self.progress.append(progress.item())
        replacement = self.at_step(self.calls)
        loss, parts = super().loss(model, x, x_adv, y, progress)
        return (loss if replacement is None else replacement(model, loss)), parts


def stage(folder, method=None, selection=None, modified=None, **changes) -> Stage:
    """Return a stage that writes into ``folder``.

    modified: arguments of :func:`modifiers.build`. changes: settings of the Config.
    """
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

    def evaluate():
        return {"test_pgd20": SCORES[evaluate.calls - 1], "test_clean": 60.0}

    def evaluate_when(epoch):
        evaluate.calls = epoch + 1  # scores depend on the epoch alone, also after a resume
        return True

    settings = {
        "out": folder,
        "arch": "toy",
        "eps": "0.1",
        "step_size": "0.05",
        "attack_steps": 2,
        "epochs": EPOCHS,
        "lr_schedule": "onecycle",
        "seed": 3,
        "log_every": 2,
        "compile": "none",
    }
    method, model = method or Method(), small_net(seed=5).to(memory_format=torch.channels_last)
    return Stage(
        "student",
        Config(**(settings | changes)),
        model,
        method,
        loader,
        card=lambda epoch: {"arch": "toy", "epoch": epoch},
        selection=selection or Selection(evaluate, evaluate_when, "test_pgd20"),
        modifiers=modifiers.build(method, model, torch.tensor([24, 12, 6]), **(modified or {})),
    )


def outcome(folder):
    """Return all results of a stage except its times: records of epochs, weights, records of steps."""
    files = {name: read_weights(folder / "checkpoints" / f"{name}.safetensors") for name in ("best", "last")}
    return without_times(read_metrics(folder / "metrics.jsonl")), files, without_times(read_steps(folder / STEPS))


def assert_same_outcome(ours, theirs):
    (metrics, files, steps), (expected_metrics, expected_files, expected_steps) = ours, theirs
    assert metrics == expected_metrics
    assert [list(record) for record in metrics] == [list(record) for record in expected_metrics]  # in the same order
    assert steps == expected_steps
    for name, (tensors, card) in files.items():
        expected, expected_card = expected_files[name]
        assert card == expected_card
        assert all(torch.equal(tensors[k], expected[k]) for k in expected)


def saved(folder) -> dict:
    return read_weights(folder / "checkpoints" / "resume.safetensors")[1]


def send(number: int, at: int):
    """Return a function for ``at_step`` that sends signal ``number`` to this process in step ``at``."""

    def at_step(step):
        if step == at:
            os.kill(os.getpid(), number)

    return at_step


class Poisoned(Method):
    """PGD-AT whose loss is ``replacement(model, loss)`` on the batches at ``places``: (epoch, step), both from 0."""

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
    # sqrt has an infinite slope at zero: the loss is finite, the weights after the step are not.
    return loss + (model[6].weight * 0).sum().sqrt()
