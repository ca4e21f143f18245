"""Properties that every distillation method has, whatever its formula."""

import json
import math

import pytest
import torch

from helpers import train_runs
from helpers.float64_distillation import teacher_classifier
from helpers.three_steps import batch, toy_classifier, train_step
from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS
from ltat_fast.methods.distillation import Distillation, kl
from ltat_fast.runs.records import read_metrics

DISTILLATION = sorted(name for name, method in METHODS.items() if issubclass(method, Distillation))
HALF = torch.tensor(0.5)


def ready(name, net, teacher, **options):
    method = METHODS[name](**options)
    train_step(method, net, teacher=teacher)
    return method


def test_all_distillation_methods_are_tested_and_have_a_robust_teacher():
    assert DISTILLATION == ["adaad", "adaiad", "akd", "ard", "iad", "rslad"]
    assert all(METHODS[name].teacher == "robust" for name in DISTILLATION)


def test_kl_takes_the_expectation_under_the_teacher():
    """P = (1/2, 1/2), Q = (1/4, 3/4): KL(P || Q) = log(2 / sqrt 3); KL(Q || P) differs."""
    p, q = torch.zeros(1, 2).double(), torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert kl(p, q).item() == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-12)
    assert kl(q, p).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    assert kl(p, q * 5, temperature=5.0).item() == pytest.approx(kl(p, q).item(), rel=1e-12)


def test_the_kl_of_confident_predictions_is_finite():
    certain = torch.tensor([[0.0, 2000.0, -2000.0]], requires_grad=True)
    divergence = kl(certain, torch.tensor([[0.0, 1.0, 2.0]]))
    divergence.sum().backward()
    assert divergence.isfinite().all()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("name", DISTILLATION)
def test_igdm_of_a_network_with_itself_adds_no_gradient(name):
    net, (x, y) = toy_classifier(METHODS[name]()).eval(), batch()
    x_adv = torch.where(x < 0.5, x + 0.1, x)
    gradients = []
    for alpha in (0.0, 1000.0):
        method = ready(name, net, net, igdm_alpha=alpha)
        net.zero_grad()
        loss, parts = method.loss(net, x, x_adv, y, HALF)
        loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert abs(parts["igdm"].item()) < 1e-15
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", DISTILLATION)
def test_igdm_is_added_with_its_weight_and_ramp(name):
    net, teacher, (x, y) = toy_classifier(METHODS[name]()).eval(), teacher_classifier(), batch()
    x_adv = torch.where(x < 0.5, x + 0.1, x)
    # With begin 0 the loss of IAD does not depend on the progress.
    options = {"begin": 0.0} if name in ("iad", "adaiad") else {}
    losses = {}
    for alpha, progress in ((0.0, 0.5), (8.0, 0.25), (8.0, 1.0)):
        method = ready(name, net, teacher, igdm_alpha=alpha, **options)
        losses[alpha, progress], parts = method.loss(net, x, x_adv, y, torch.tensor(progress))
    assert parts["igdm"] > 1e-4
    for progress in (0.25, 1.0):
        added = losses[8.0, progress] - losses[0.0, 0.5]
        assert added.item() == pytest.approx(8.0 * progress * parts["igdm"].item(), rel=1e-9)


@pytest.mark.parametrize("name", DISTILLATION)
def test_the_loss_scale_does_not_apply_to_igdm(name):
    net, (x, y) = toy_classifier(METHODS[name]()).eval(), batch()
    x_adv = torch.where(x < 0.5, x + 0.1, x)
    losses = []
    for scale in (1.0, 0.25):
        method = ready(name, net, teacher_classifier(), igdm_alpha=8.0, loss_scale=scale)
        loss, parts = method.loss(net, x, x_adv, y, HALF)
        losses.append((loss - 4.0 * parts["igdm"]).item())
    assert losses[1] == pytest.approx(losses[0] / 4, rel=1e-9)
    assert losses[0] > 1e-3


class Recorder:
    """A network that records its inputs."""

    def __init__(self, net):
        self.net, self.seen = net, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return self.net(x)

    def times_seen(self, x):
        return sum(torch.equal(x, seen) for seen in self.seen)


@pytest.mark.parametrize("name", DISTILLATION)
def test_no_point_is_evaluated_twice_and_the_mirrored_one_is_not_clipped(name):
    net, (x, y) = toy_classifier(METHODS[name]()), batch()
    x_adv = (x + 0.1).clamp(0, 1)
    method = ready(name, net, teacher_classifier(), igdm_alpha=1.0)
    student, method.context.teacher = Recorder(net), Recorder(method.context.teacher)
    method.loss(student, x, x_adv, y, HALF)
    for network in (student, method.context.teacher):
        assert network.times_seen(x_adv) == 1
        assert network.times_seen(2 * x - x_adv) == 1
        assert network.times_seen(x) == len(network.seen) - 2  # no other point
        assert network.times_seen(x) <= 1
    assert (2 * x - x_adv).min() < 0


@pytest.mark.parametrize("name", DISTILLATION)
def test_the_teacher_gets_no_gradient(name):
    net, teacher, (x, y) = toy_classifier(METHODS[name]()), teacher_classifier(), batch()
    method = ready(name, net, teacher, igdm_alpha=1.0)
    method.context.teacher = teacher.eval()  # the live network instead of a frozen twin
    loss, parts = method.loss(net, x, (x + 0.1).clamp(0, 1), y, HALF)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in net.parameters())
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("name", DISTILLATION)
def test_an_extra_clean_forward_changes_only_batch_norm_statistics(name):
    (x, y), losses, means, gradients = batch(), [], [], []
    for extra in (False, True):
        net = toy_classifier(METHODS[name]())
        method = ready(name, net, teacher_classifier(), igdm_alpha=1.0, extra_clean_forward=extra)
        loss, _ = method.loss(net, x, (x + 0.1).clamp(0, 1), y, HALF)
        loss.backward()
        losses.append(loss.item())
        means.append(net.bn.running_mean.clone())
        gradients.append([p.grad for p in net.parameters()])
    assert losses[0] == losses[1]
    torch.testing.assert_close(*gradients, atol=0, rtol=0)
    has_a_clean_forward = name in ("iad", "adaiad", "rslad")
    assert torch.equal(*means) == has_a_clean_forward


@pytest.mark.parametrize("name", [*DISTILLATION, "igd"])
def test_bf16_logits_give_a_float32_loss(name):
    net, (x, y) = toy_classifier(METHODS[name]()).float(), batch()
    method = ready(name, net, teacher_classifier().float())
    loss, _ = method.loss(lambda x: net(x).bfloat16(), x.float(), x.float(), y, HALF)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ard", {"teacher_weight": 1.5}, "--teacher-weight must be between 0 and 1, not 1.5"),
        ("ard", {"temperature": 0.0}, "--temperature must be above 0, not 0"),
        ("ard", {"igdm_alpha": -1.0}, "--igdm-alpha must be 0 or more and finite, not -1"),
        ("iad", {"begin": 60.0}, "--begin must be between 0 and 1, not 60"),
        ("rslad", {"adversarial_weight": 2.0}, "--adversarial-weight must be between 0 and 1, not 2"),
        ("adaad", {"igdm_alpha": float("nan")}, "--igdm-alpha must be 0 or more and finite, not nan"),
        ("igd", {"fd_step": 0.0}, "--fd-step must be above 0, not 0"),
    ],
)
def test_invalid_options_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        METHODS[name](**options).check()


FLAGS = ("--epochs", "1", "--teacher-epochs", "1", "--max-steps", "2", "--attack-steps", "2", "--limit-eval", "50")
FLAGS += ("--eval-attacks", "clean,pgd20")


@pytest.mark.parametrize("name", [*DISTILLATION, "igd"])
def test_two_steps_from_the_command_line(name, tmp_path):
    flags = ("--method", name, *FLAGS, "--out", str(tmp_path / "run"))
    flags += ("--igdm-alpha", "5") if name in DISTILLATION else ("--form", "finite-difference")
    assert train_runs.train(*flags) == 0
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(math.isfinite(value) for value in record.values())
    assert ("igdm" in record) == (name in DISTILLATION)
    assert (tmp_path / "run" / "teacher" / "checkpoints" / "last.safetensors").exists()
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["last"]["pgd20"]["images"] == 50
