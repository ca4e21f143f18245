"""RSLAD against its formula; its attack has a fixed target."""

import pytest
import torch

from helpers.float64_distillation import DistilledTwin, assert_equals_the_formula, teacher_classifier
from helpers.three_steps import batch, kl, toy_classifier, train_step
from ltat_fast.methods.rslad import Rslad


class RsladTwin(DistilledTwin):
    def objective(self, x, point, y):
        return kl(self.taught(x).softmax(1), self.logits(point).softmax(1))

    def base(self, adv, x, x_adv, y):
        share, scale = self.options.get("adversarial_weight", 5 / 6), self.options.get("loss_scale", 0.1)
        p = self.taught(x).softmax(1)
        return scale * (share * kl(p, adv.softmax(1)) + (1 - share) * kl(p, self.logits(x).softmax(1)))


@pytest.mark.parametrize("options", [{}, {"igdm_alpha": 2.0}, {"adversarial_weight": 0.4, "loss_scale": 1.0}], ids=str)
def test_three_steps_equal_the_formula(options):
    assert Rslad.noise == "gaussian"
    assert_equals_the_formula(Rslad, RsladTwin, options)


def test_the_teacher_sees_each_clean_image_once():
    method, net, seen = Rslad(), toy_classifier(Rslad()), []
    step = train_step(method, net, teacher=teacher_classifier())
    teacher = method.context.teacher
    method.context.teacher = lambda x: (seen.append(x.clone()), teacher(x))[1]
    for seed in range(2):
        step(*batch(seed), lr=0.1, progress=1.0, seed=seed)
    assert len(seen) == 2
    assert all(torch.equal(images, batch(seed)[0]) for seed, images in enumerate(seen))


def test_the_answer_for_other_images_is_not_used():
    method, net = Rslad(), toy_classifier(Rslad()).eval()
    step = train_step(method, net, teacher=teacher_classifier())
    (x, y), (other, _) = batch(0), batch(1)
    fresh = method.loss(net, x, x, y, torch.tensor(1.0))[0]
    step.perturb(other, y)
    assert method.loss(net, x, x, y, torch.tensor(1.0))[0] == fresh
