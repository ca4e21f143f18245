"""TAET against its formula: both stages, absent classes, gradients where the loss of every class is 0."""

import math

import pytest
import torch

from helpers import train_runs
from helpers.three_steps import (
    CLASSES,
    COUNTS,
    Float64Method,
    assert_three_steps_equal,
    batch,
    cross_entropy,
    picked,
    toy_classifier,
    train_step,
)
from ltat_fast.errors import UserError
from ltat_fast.methods import MethodContext
from ltat_fast.methods.taet import Taet, class_losses
from ltat_fast.runs.records import read_metrics


def hierarchical(of_class: list[torch.Tensor], a: float, b: float, g: float) -> torch.Tensor:
    mean, total = sum(of_class) / CLASSES, sum(of_class)
    variance = sum((loss - mean) ** 2 for loss in of_class) / CLASSES
    return a * mean + b * variance + g * sum((loss / total) ** 2 for loss in of_class)


class Float64Taet(Float64Method):
    """Epochs of the three steps: 1, 2 and 3 of 4."""

    clean_epochs, weights = 1, (0.1, 0.1, 0.1)
    epoch = 0

    def descend(self, x, x_adv, y, lr, epoch):
        self.epoch = epoch + 1
        return super().descend(x, x_adv, y, lr, epoch)

    def loss(self, x, x_adv, y):
        if self.epoch <= self.clean_epochs:
            return cross_entropy(self.logits(x), y)
        losses = -picked(self.logits(x_adv).softmax(1), y).log()
        of_class = [losses[y == c] for c in range(CLASSES)]
        return hierarchical([own.mean() if len(own) else torch.zeros(()).double() for own in of_class], *self.weights)


class OtherNumbers(Float64Taet):
    clean_epochs, weights = 2, (0.7, 1.3, 5.0)


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        (Taet(), Float64Taet),
        (Taet(attack_begin=0.5, mean_weight=0.7, variance_weight=1.3, share_weight=5.0), OtherNumbers),
    ],
    ids=["defaults", "other numbers"],
)
def test_three_steps_equal_the_formula(method, reference):
    assert method.noise == "gaussian"
    for epoch in range(3):
        assert len(batch(epoch)[1].unique()) < CLASSES, "a class without an image"
    assert_three_steps_equal(method, reference)


def test_class_losses_by_hand():
    losses, y = torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.tensor([2, 0, 0, 2])
    assert class_losses(losses, y, 4).tolist() == [4.0, 0.0, 2.5, 0.0]
    assert Taet(mean_weight=1.0, variance_weight=0.0, share_weight=0.0).hierarchical(
        torch.tensor([4.0, 0.0, 2.5, 0.0])
    ).item() == pytest.approx(6.5 / 4)


def gradient_of_second_stage(logits: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    method = Taet()
    method.setup(MethodContext(torch.tensor(COUNTS)))
    logits.requires_grad_()
    loss, _ = method.loss(lambda x: logits, torch.zeros(len(y)), torch.zeros(len(y)), y, torch.tensor(1.0))
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("margin", [1e4, 120.0, 20.0, 15.0])
def test_the_gradient_is_finite_where_every_loss_is_0_or_nearly(margin):
    """6 exp(-20) is below the resolution of float32 at 1, 6 exp(-15) is above it."""
    y = torch.tensor([0, 3, 3])
    logits = torch.zeros(3, CLASSES)
    logits[torch.arange(3), y] = margin
    loss, gradient = gradient_of_second_stage(logits, y)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (loss == 0) == (margin >= 20)


def test_a_class_of_a_single_image_weighs_as_much_as_a_class_of_many():
    y = torch.tensor([0] * 9 + [1])
    logits = torch.zeros(10, CLASSES)
    _, gradient = gradient_of_second_stage(logits, y)
    assert gradient[9].norm().item() == pytest.approx(9 * gradient[0].norm().item(), rel=1e-5)


def test_no_attack_is_run_in_the_first_stage(monkeypatch):
    method = Taet()
    step = train_step(method, toy_classifier(method))
    attacked = []
    perturb = step._perturb_each
    monkeypatch.setattr(step, "_perturb_each", lambda x, *rest: attacked.append(len(x)) or perturb(x, *rest))
    for epoch in range(1, 6):
        step(*batch(epoch), lr=0.1, progress=epoch / 5, seed=epoch)
        assert len(attacked) == max(0, epoch - 2)


def test_the_logged_cross_entropy_is_that_of_the_images_trained_on():
    """In the first stage the parts do not depend on x_adv, whatever the trainer passes there."""
    method = Taet(attack_begin=0.5)
    net = toy_classifier(method).eval()
    train_step(method, net)
    (x, y), x_adv = batch(), batch(1)[0]
    loss, parts = method.loss(net, x, x_adv, y, torch.tensor(0.5))
    assert loss.item() == parts["ce"].item() == pytest.approx(cross_entropy(net(x), y).item())
    loss, parts = method.loss(net, x, x_adv, y, torch.tensor(0.75))
    assert parts["ce"].item() == pytest.approx(cross_entropy(net(x_adv), y).item())
    assert not math.isclose(loss.item(), parts["ce"].item(), rel_tol=0.1)


def test_a_share_above_1_is_refused():
    with pytest.raises(UserError, match="--attack-begin must be between 0 and 1, not 40"):
        Taet(attack_begin=40.0).check()


def test_a_run_trains_both_stages(tmp_path):
    run = tmp_path / "run"
    flags = ("--epochs", "4", "--attack-steps", "2", "--attack-begin", "0.5", "--limit-eval", "50")
    assert train_runs.train("--method", "taet", *flags, "--eval-attacks", "clean", "--out", str(run)) == 0
    records = read_metrics(run / "metrics.jsonl")
    assert [record["loss"] == record["ce"] for record in records] == [True, True, False, False]
    assert all(math.isfinite(value) for record in records for value in record.values())
    # The operations per image were counted for a step with the attack.
    assert ["share_of_ceiling" in record for record in records] == [False, False, True, True]
