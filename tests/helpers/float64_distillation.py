"""Float64 twins of the distillation methods: :mod:`three_steps` with a teacher and IGDM."""

import copy

import torch

from helpers.three_steps import Twin, assert_three_steps_equal, kl, toy_classifier
from ltat_fast.methods import Method
from ltat_fast.methods.pgd_at import PgdAt

EPOCHS = 4  # of which the three steps are the first three


def teacher_classifier(seed: int = 7):
    return toy_classifier(PgdAt(), seed=seed)


class DistilledTwin(Twin):
    """``base``, which a subclass writes down, and IGDM."""

    def __init__(self, net, options):
        super().__init__(net)
        self.teacher = copy.deepcopy(teacher_classifier()).eval()
        self.options = options
        self.epoch = 0

    def taught(self, x):
        return self.teacher(x).detach()

    def base(self, adv, x, x_adv, y):
        """The loss without IGDM. adv: the student's logits at x_adv."""
        raise NotImplementedError

    def loss(self, x, x_adv, y):
        adv = self.logits(x_adv)
        loss = self.base(adv, x, x_adv, y)
        if alpha := self.options.get("igdm_alpha"):
            delta = x_adv - x
            student = adv - self.logits(x - delta)
            teacher = self.taught(x_adv) - self.taught(x - delta)
            loss = loss + alpha * self.epoch / EPOCHS * kl(teacher.softmax(1), student.softmax(1))
        return loss

    def descend(self, x, x_adv, y, lr, epoch):
        self.epoch = epoch + 1
        return super().descend(x, x_adv, y, lr, epoch)


def assert_equals_the_formula(method_of: type[Method], twin_of: type[DistilledTwin], options: dict) -> None:
    assert_three_steps_equal(method_of(**options), lambda net: twin_of(net, options), teacher=teacher_classifier())


def softened(z: torch.Tensor, temperature: float) -> torch.Tensor:
    return (z / temperature).softmax(1)
