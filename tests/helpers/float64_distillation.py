"""Float64 references of the distillation methods: :mod:`helpers.three_steps` with a teacher and IGDM."""

import copy

import torch

from helpers.three_steps import EPOCHS, Float64Method, assert_three_steps_equal, kl, toy_classifier
from ltat_fast.methods import Method
from ltat_fast.methods.pgd_at import PgdAt


def teacher_classifier(seed: int = 7):
    return toy_classifier(PgdAt(), seed=seed)


class Float64Distillation(Float64Method):
    """Adds IGDM to the loss ``base``, which a subclass writes down."""

    def __init__(self, net, options):
        super().__init__(net)
        self.teacher = copy.deepcopy(teacher_classifier()).eval()
        self.options = options
        self.epoch = 0

    def teacher_logits(self, x):
        return self.teacher(x).detach()

    def base(self, adv, x, x_adv, y):
        """Return the loss without IGDM. adv: logits of the student at x_adv."""
        raise NotImplementedError

    def loss(self, x, x_adv, y):
        adv = self.logits(x_adv)
        loss = self.base(adv, x, x_adv, y)
        alpha = self.options.get("igdm_alpha", 0.0)
        if alpha > 0:
            delta = x_adv - x
            student = adv - self.logits(x - delta)
            teacher = self.teacher_logits(x_adv) - self.teacher_logits(x - delta)
            loss = loss + alpha * self.epoch / EPOCHS * kl(teacher.softmax(1), student.softmax(1))
        return loss

    def descend(self, x, x_adv, y, lr, epoch):
        self.epoch = epoch + 1
        return super().descend(x, x_adv, y, lr, epoch)


def assert_equals_the_formula(
    method: type[Method], reference: type[Float64Distillation], options: dict, tolerance: float = 1e-8
) -> None:
    assert_three_steps_equal(
        method(**options), lambda net: reference(net, options), tolerance, teacher=teacher_classifier()
    )


def softened(z: torch.Tensor, temperature: float) -> torch.Tensor:
    return (z / temperature).softmax(1)
