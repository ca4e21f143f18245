"""RSLAD against its formula, and its reuse of the teacher's logits."""

import pytest
import torch

from helpers.float64_distillation import Float64Distillation, assert_equals_the_formula, teacher_classifier
from helpers.three_steps import batch, kl, toy_classifier, train_step
from ltat_fast.methods.rslad import Rslad


class Float64Rslad(Float64Distillation):
    def objective(self, x, point, y):
        return kl(self.teacher_logits(x).softmax(1), self.logits(point).softmax(1))

    def base(self, adv, x, x_adv, y):
        weight, scale = self.options.get("adversarial_weight", 5 / 6), self.options.get("loss_scale", 0.1)
        p = self.teacher_logits(x).softmax(1)
        return scale * (weight * kl(p, adv.softmax(1)) + (1 - weight) * kl(p, self.logits(x).softmax(1)))


@pytest.mark.parametrize("options", [{}, {"igdm_alpha": 2.0}, {"adversarial_weight": 0.4, "loss_scale": 1.0}], ids=str)
def test_three_steps_equal_the_formula(options):
    assert Rslad.noise == "gaussian"
    assert_equals_the_formula(Rslad, Float64Rslad, options)


def test_the_teacher_sees_each_clean_image_once():
    method, net, seen = Rslad(), toy_classifier(Rslad()), []
    step = train_step(method, net, teacher=teacher_classifier())
    teacher = method.context.teacher

    def recording_teacher(x):
        seen.append(x.clone())
        return teacher(x)

    method.context.teacher = recording_teacher
    for seed in range(2):
        step(*batch(seed), lr=0.1, progress=1.0, seed=seed)
    assert len(seen) == 2
    assert all(torch.equal(images, batch(seed)[0]) for seed, images in enumerate(seen))


def test_teacher_logits_of_other_images_are_not_reused():
    method, net = Rslad(), toy_classifier(Rslad()).eval()
    step = train_step(method, net, teacher=teacher_classifier())
    (x, y), (other, _) = batch(0), batch(1)
    fresh = method.loss(net, x, x, y, torch.tensor(1.0))[0]
    step.perturb(other, y)
    assert method.loss(net, x, x, y, torch.tensor(1.0))[0] == fresh
