"""IAD-I against its formula; its warm-up and its trust."""

import pytest
import torch

from helpers.float64_distillation import (
    EPOCHS,
    Float64Distillation,
    assert_equals_the_formula,
    softened,
    teacher_classifier,
)
from helpers.three_steps import batch, cross_entropy, picked, toy_classifier, train_step
from ltat_fast.methods.ard import Ard
from ltat_fast.methods.iad import Iad


def divergences(p, q):
    return (p * (p.log() - q.log())).sum(1)


class Float64Iad(Float64Distillation):
    target_is_adversarial = False

    def base(self, adv, x, x_adv, y):
        a, t = self.options.get("teacher_weight", 1.0), self.options.get("temperature", 1.0)
        clean = self.logits(x)
        trust = picked(self.teacher_logits(x_adv).softmax(1), y) ** self.options.get("trust_power", 0.1)
        if self.epoch / EPOCHS <= self.options.get("begin", 0.3):
            trust = torch.ones_like(trust)
        target = self.teacher_logits(x_adv if self.target_is_adversarial else x)
        teacher_kl = t**2 * divergences(softened(target, t), softened(adv, t))
        if self.options.get("weigh_teacher"):
            teacher_kl = trust * teacher_kl
        self_kl = (1 - trust) * divergences(clean.softmax(1), adv.softmax(1))
        return a * teacher_kl.mean() + a * self_kl.mean() + (1 - a) * cross_entropy(clean, y)


OPTIONS = [
    {},  # one step of warm-up, then two with the student's own term
    {"igdm_alpha": 9.0},
    {"begin": 0.0, "trust_power": 0.7, "weigh_teacher": True},
    {"begin": 0.5, "trust_power": 0.7, "teacher_weight": 0.8, "temperature": 2.0, "igdm_alpha": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_steps_equal_the_formula(options):
    assert_equals_the_formula(Iad, Float64Iad, options)


@pytest.mark.parametrize(("epoch", "has_own_term"), [(60, False), (61, True)])
def test_by_default_the_students_own_term_begins_after_epoch_60_of_200(epoch, has_own_term):
    """Before that the loss is that of ARD. The trainer keeps the progress in float32."""
    net, teacher, (x, y), (x_adv, _) = toy_classifier(Ard()).eval(), teacher_classifier(), batch(0), batch(1)
    losses = []
    for method in (Ard(), Iad()):
        step = train_step(method, net, teacher=teacher)
        step.progress.fill_(epoch / 200)
        losses.append(method.loss(net, x, x_adv, y, step.progress)[0].item())
    if has_own_term:
        assert losses[1] > losses[0] + 1e-5
    else:
        assert losses[1] == losses[0]


def test_the_students_own_term_is_zero_if_the_teacher_is_always_right():
    method, net, (x, y) = Iad(begin=0.0), toy_classifier(Ard()).eval(), batch()
    train_step(method, net)
    method.context.teacher = lambda x: torch.eye(7, dtype=torch.float64)[y] * 200
    _, parts = method.loss(net, x, (x + 0.1).clamp(0, 1), y, torch.tensor(1.0))
    assert parts["self_kl"].item() == 0
    assert parts["kl"] > 0
