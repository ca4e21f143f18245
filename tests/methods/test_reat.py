"""REAT against its formulas; its class weights follow their formula, change no example and survive a resume."""

import itertools

import numpy as np
import pytest
import torch

from helpers.three_steps import (
    CLASSES,
    COUNTS,
    HARDWARE,
    Float64Method,
    N,
    assert_three_steps_equal,
    batch,
    cross_entropy,
    toy_classifier,
    train_step,
)
from ltat_fast.config import Config
from ltat_fast.data import DeviceLoader
from ltat_fast.methods import MethodContext
from ltat_fast.methods.reat import Reat, effective_number_weights
from ltat_fast.training.fit import Stage, fit

TAIL = {5, 6}  # from floor(7 / 3) * 2 + 1 on


def float64_reat(tail_weight: float, pairwise: bool) -> type[Float64Method]:
    """The loss with loops as in the authors' code, one pair of samples at a time."""

    class Float64Reat(Float64Method):
        def loss(self, x, x_adv, y):
            h = self.net.features(x_adv)
            z, q, labels = h @ self.net.fc.weight.T + self.net.fc.bias, h.softmax(1), y.tolist()
            omega = (N.sum() / N).sqrt()
            tail = [b for b, label in enumerate(labels) if label in TAIL]
            assert tail, "the batch must have tail samples"
            total = 0.0
            for b in tail:
                held = q[b].detach()
                divergences = [(held * (held.log() - q_j.log())).sum() for q_j in q]
                weights = [(-1 if y_j == labels[b] else 1) * (omega[labels[b]] + omega[y_j]) for y_j in labels]
                if pairwise:
                    total = total + sum(w * d for w, d in zip(weights, divergences, strict=True)) / len(y)
                else:
                    k = sum(divergences) / (len(y) * h.shape[1])
                    total = total + k * sum(weights) / len(y)
            return cross_entropy(z + N.log(), y) + tail_weight * total / len(tail)

    return Float64Reat


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, float64_reat(1.0, pairwise=False)),
        # The as-coded term is so small that weight 1 would hide mistakes.
        ({"tail_weight": 60.0}, float64_reat(60.0, pairwise=False)),
        ({"tail_form": "pairwise"}, float64_reat(1.0, pairwise=True)),
    ],
    ids=str,
)
def test_three_steps_equal_the_formulas(options, reference):
    """The attack of the reference ascends plain cross-entropy, without the class weights."""
    method = Reat(**options)
    assert method.noise == "uniform"
    assert_three_steps_equal(method, reference, tolerance=1e-6)


@pytest.mark.parametrize("form", ["as-coded", "pairwise"])
def test_a_batch_without_tail_samples_has_no_tail_term(form):
    method = Reat(tail_form=form)
    net = toy_classifier(method)
    train_step(method, net)
    x, _ = batch()
    loss, parts = method.loss(net, x, x, torch.arange(16) % 5, None)
    loss.backward()
    assert parts["tail"] == 0
    assert loss == parts["bsl"]
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("classes", "first"), [(2, 1), (10, 7), (100, 67), (200, 133)])
def test_tail_classes_begin_after_two_thirds(classes, first):
    method = Reat()
    method.setup(MethodContext(torch.full((classes,), 5)))
    assert method._is_tail.nonzero()[:, 0].tolist() == list(range(first, classes))


def test_tail_classes_are_the_rare_classes_in_any_order():
    method = Reat()
    method.setup(MethodContext(torch.tensor([2, 5, 10, 20, 40, 60, 3])))
    assert method._is_tail.nonzero()[:, 0].tolist() == [0, 6]


def test_class_weights_are_inverse_effective_numbers():
    n, seen = [5000, 500, 50, 1, 1, 20], [9000, 0, 3, 0, 7, 20]
    effective = []
    for n_c, m_c in zip(n, seen, strict=True):
        b = (n_c - 1) / n_c
        effective.append((1 - b**m_c) / (1 - b))
    inverse = [1 / (e + 1e-5) for e in effective]
    expected = [w * len(n) / sum(inverse) for w in inverse]
    assert effective_number_weights(torch.tensor(n), torch.tensor(seen)).tolist() == pytest.approx(expected, rel=1e-6)


def test_class_weights_do_not_change_the_sign_attack():
    method = Reat()
    step = train_step(method, toy_classifier(method))
    x, y = batch()
    examples = []
    for weights in (torch.ones(CLASSES), torch.tensor([1e-6, 3.0, 0.2, 7.0, 1e3, 1.0, 0.03])):
        method.class_weights.copy_(weights)
        step.generator.manual_seed(0)
        examples.append(step.perturb(x, y))
    assert torch.equal(*examples)

    logits = torch.randn(16, CLASSES, generator=torch.Generator().manual_seed(0))
    weighted = sum(weights[c] * cross_entropy(row[None], c[None]) for row, c in zip(logits, y, strict=True))
    assert method.objective(x, logits, y).item() == pytest.approx(weighted.item(), rel=1e-5)


def test_predictions_of_one_epoch_give_the_class_weights_of_the_next():
    method = Reat()
    net = toy_classifier(method)
    step = train_step(method, net)
    from_counts = effective_number_weights(torch.tensor(COUNTS), torch.tensor(COUNTS))
    predicted = []

    def record(module, arguments, output):
        if isinstance(output, tuple):
            logits, _ = output
            predicted.append(logits.argmax(1))

    net.register_forward_hook(record)
    method.on_epoch_start(0)
    for seed in range(3):
        assert torch.equal(method.class_weights, from_counts)
        step(*batch(seed), lr=0.125, progress=0.5, seed=seed)
    counted = torch.cat(predicted).bincount(minlength=CLASSES)
    assert len(predicted) == 3
    assert torch.equal(method.predicted, counted)
    assert counted.sum() == 48
    method.on_epoch_start(1)
    assert torch.equal(method.class_weights, effective_number_weights(torch.tensor(COUNTS), counted))
    assert method.predicted.sum() == 0


class Killed(BaseException):
    """Stands for SIGKILL."""


def stage(folder, die_at: int | None = None) -> Stage:
    """Three epochs of five steps, saved after every step. die_at: step, counted from 1, at which the run dies."""
    rng = np.random.RandomState(0)
    loader = DeviceLoader(
        rng.randint(0, 256, (42, 3, 6, 6)).astype(np.uint8),
        rng.randint(0, CLASSES, 42),
        batch_size=8,
        seed=1,
        pad=1,
        flip=True,
        device="cpu",
    )
    method, steps = Reat(), itertools.count(1)
    loss = method.loss

    def dying_loss(*args):
        if next(steps) == die_at:
            raise Killed
        return loss(*args)

    method.loss = dying_loss
    model = toy_classifier(method, seed=5).float()
    method.setup(MethodContext(torch.tensor(COUNTS)))
    config = Config(
        out=folder,
        arch="toy",
        eps="0.1",
        step_size="0.05",
        attack_steps=2,
        epochs=3,
        lr_schedule="onecycle",
        seed=3,
        compile="none",
    )
    return Stage("student", config, model, method, loader, card=lambda epoch: {})


def test_a_resumed_run_keeps_its_counts(tmp_path):
    """A run killed in the second epoch and resumed ends with the weights and counts of an uninterrupted run."""
    whole = stage(tmp_path / "whole")
    fit(whole, HARDWARE)
    with pytest.raises(Killed):
        fit(stage(tmp_path / "killed", die_at=8), HARDWARE)
    resumed = stage(tmp_path / "killed")
    fit(resumed, HARDWARE)
    assert whole.method.predicted.sum() == 40
    for name, tensor in whole.method.state().items():
        assert torch.equal(resumed.method.state()[name], tensor), name
    # With fewer distinct values the weights would hardly depend on the counts.
    assert whole.method.class_weights.unique().numel() > 3
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
