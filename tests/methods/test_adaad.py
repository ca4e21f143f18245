"""AdaAD against its formula, and the gradient of its attack against its closed form."""

import pytest
import torch

from helpers.float64_distillation import Float64Distillation, assert_equals_the_formula, teacher_classifier
from helpers.three_steps import batch, kl, toy_classifier, train_step
from ltat_fast.methods.adaad import AdaAd


class Float64AdaAd(Float64Distillation):
    def objective(self, x, point, y):
        return kl(self.teacher(point).softmax(1), self.logits(point).softmax(1))

    def base(self, adv, x, x_adv, y):
        weight = self.options.get("adversarial_weight", 1.0)
        loss = weight * kl(self.teacher_logits(x_adv).softmax(1), adv.softmax(1))
        if weight == 1:
            return loss
        return loss + (1 - weight) * kl(self.teacher_logits(x).softmax(1), self.logits(x).softmax(1))


@pytest.mark.parametrize(
    "options", [{}, {"igdm_alpha": 9.0}, {"adversarial_weight": 0.25}, {"adversarial_weight": 0.5, "igdm_alpha": 2.0}],
    ids=str,
)  # fmt: skip
def test_three_steps_equal_the_formula(options):
    assert AdaAd.noise == "gaussian"
    assert_equals_the_formula(AdaAd, Float64AdaAd, options)


def vector_jacobian(net, x, v):
    point = x.clone().requires_grad_()
    return torch.autograd.grad(net(point), point, v)[0]


def test_the_attack_gradient_flows_through_both_networks():
    """dKL/dS = Q - P and dKL/dT = P (log P - log Q - KL), each times the Jacobian of its network."""
    method, student, teacher = AdaAd(), toy_classifier(AdaAd()).eval(), teacher_classifier().eval()
    step = train_step(method, student, teacher=teacher)
    x, y = batch()
    p, q = teacher(x).detach().softmax(1), student(x).detach().softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1, keepdim=True)
    through_student = vector_jacobian(student, x, q - p)
    through_teacher = vector_jacobian(teacher, x, p * (p.log() - q.log() - divergence))

    ours = torch.func.grad(lambda point: method.objective(point, step.frozen(point), y))(x)
    torch.testing.assert_close(ours, through_student + through_teacher, atol=1e-12, rtol=1e-9)
    assert through_teacher.norm() > 0.1 * through_student.norm()


def test_the_teacher_is_attacked_but_never_trained():
    method, student, teacher = AdaAd(igdm_alpha=3.0), toy_classifier(AdaAd()), teacher_classifier().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    step = train_step(method, student, teacher=teacher)
    step(*batch(), lr=0.1, progress=1.0, seed=0)
    assert all(p.grad is None for p in (*teacher.parameters(), *method.context.teacher.parameters()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
