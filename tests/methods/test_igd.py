"""IGD against its formula in both forms, and the two forms against each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.float64_distillation import Float64Distillation, assert_equals_the_formula, teacher_classifier
from helpers.three_steps import HARDWARE, batch, cross_entropy, picked, toy_classifier, train_step
from ltat_fast.config import Config
from ltat_fast.errors import UserError
from ltat_fast.methods.igd import Igd
from ltat_fast.methods.natural import Natural
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.training import distributed, pipeline
from ltat_fast.training.step import TrainStep


def gradient_images(scalars, point, create_graph=False):
    (gradient,) = torch.autograd.grad(scalars.sum(), point, create_graph=create_graph, retain_graph=True)
    return gradient.flatten(1)


class Float64Igd(Float64Distillation):
    def scalars(self, z, y):
        if self.options.get("gradient_of") == "ce":
            return -picked(z.softmax(1), y).log()
        return picked(z, y)

    def loss(self, x, x_adv, y):
        clean, adv = x.clone().requires_grad_(), x_adv.clone().requires_grad_()
        guide = gradient_images(self.scalars(self.teacher(clean), y), clean)
        z = self.logits(adv)
        point, at_point = (adv, z) if self.options.get("gradient_at") == "adv" else (clean, self.logits(clean))
        double_backward = self.options.get("form") != "finite-difference"
        student = gradient_images(self.scalars(at_point, y), point, double_backward)
        cos = (student * guide).sum(1) / (student.norm(dim=1) * guide.norm(dim=1))
        term = 1 - cos
        if not double_backward:
            term = term + self.difference(point, y, student, guide, cos)
        return cross_entropy(z, y) + self.options.get("igd_weight", 1.0) * term.mean()

    def difference(self, point, y, student, guide, cos):
        """The slope along v = -(g_T / |g_T| - cos g_S / |g_S|) / |g_S|, minus its value.

        The largest pixel moves by fd_step.
        """
        g_s, g_t = student / student.norm(dim=1, keepdim=True), guide / guide.norm(dim=1, keepdim=True)
        v = -(g_t - cos[:, None] * g_s) / student.norm(dim=1, keepdim=True)
        h = self.options.get("fd_step", 8 / 255) / v.abs().amax(1)
        move = (h[:, None] * v).view_as(point)
        up, down = (self.scalars(self.logits(point.detach() + sign * move), y) for sign in (1, -1))
        slope = (up - down) / (2 * h)
        return slope - slope.detach()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"igd_weight": 4.0, "gradient_at": "adv"},
        {"igd_weight": 2.0, "gradient_of": "ce"},
        {"form": "finite-difference", "igd_weight": 2.0},
        {"form": "finite-difference", "fd_step": 0.05, "gradient_at": "adv", "gradient_of": "ce"},
    ],
    ids=str,
)
def test_three_steps_equal_the_formula(options):
    assert Igd.teacher == "natural"
    assert_equals_the_formula(Igd, Float64Igd, options)


class Smooth(nn.Module):
    """Twice differentiable everywhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Linear(24, 7)

    def forward(self, x):
        return self.fc(F.softplus(3 * self.bn(self.conv(x))).flatten(1))


def weight_gradients(method, net, x, y):
    net = copy.deepcopy(net)
    train_step(method, net, teacher=teacher_classifier())
    loss, parts = method.loss(net, x, x, y, torch.tensor(1.0))
    loss.backward()
    return parts, torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("gradient_of", ["logit", "ce"])
def test_finite_differences_converge_to_the_double_backward(gradient_of, training):
    """In train mode a difference remains, because images affect each other through the batch statistics."""
    torch.manual_seed(0)
    net, (x, y) = Smooth().double().train(training), batch()
    plain = weight_gradients(Igd(igd_weight=0.0), net, x, y)[1]
    parts, exact = weight_gradients(Igd(gradient_of=gradient_of), net, x, y)
    assert (exact - plain).norm() > 1e-2 * plain.norm()  # the alignment term is large enough to compare
    errors = []
    for fd_step in (1e-2, 1e-3):
        ours, gradient = weight_gradients(
            Igd(form="finite-difference", gradient_of=gradient_of, fd_step=fd_step), net, x, y
        )
        assert ours["igd"].item() == pytest.approx(parts["igd"].item(), rel=1e-12)
        errors.append(((gradient - exact).norm() / (exact - plain).norm()).item())
    if training:
        assert errors[1] < 0.2
    else:
        assert errors[1] < 1e-4
        assert errors[1] < errors[0] / 50  # second order: a tenth of the step gives a hundredth of the error


def test_a_student_with_itself_as_guide_has_no_alignment_loss():
    net, (x, y) = teacher_classifier().eval(), batch()
    for form in ("double-backward", "finite-difference"):
        parts, gradient = weight_gradients(Igd(form=form, igd_weight=5.0), net, x, y)
        assert parts["igd"].item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(gradient, weight_gradients(Igd(igd_weight=0.0), net, x, y)[1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", ["double-backward", "finite-difference"])
def test_only_the_finite_difference_student_is_compiled(form, monkeypatch):
    compiled = []

    def record(function, **_):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", record)
    net = allow_joint_calls(toy_classifier(Natural()))
    step = train_step(Igd(form=form), net, teacher=teacher_classifier())
    teacher = step.method.context.teacher
    TrainStep(net, step.method, step.optimizer, step.attack, HARDWARE, backend="step")
    assert teacher in compiled
    others = [function for function in compiled if function is not net and function is not teacher]
    assert len(others) == 1, "the attack step is always compiled"
    assert (net in compiled) == (form == "finite-difference")


def test_double_backward_is_refused_with_several_processes(monkeypatch):
    monkeypatch.setattr(distributed, "current", lambda: distributed.World(0, 2))

    with pytest.raises(
        UserError, match="--method igd with these options needs a double backward: use a single process"
    ):
        pipeline.train(Config(method="igd"), Igd(), HARDWARE)
