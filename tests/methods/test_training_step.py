"""Whole training steps of PGD-AT, AT-BSL and LTAT against a float64 reference that is written from the formulas.

The reference shares only the images, the initial weights and the start of the attack with our code.
"""

import pytest
import torch

from helpers.toy_networks import double, images, labels, small_net
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.ops import pgd_init
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

HARDWARE = Hardware(torch.device("cpu"), torch.float32, "test")
COUNTS = [40, 11, 3]
EPS, STEP_SIZE, ATTACK_STEPS = 0.1, 0.03, 4
LR, MOMENTUM, WEIGHT_DECAY = [0.1, 0.05, 0.02], 0.9, 5e-4
EPOCHS = 4  # step e of a test is in epoch e


def cross_entropy(z, y):
    return -z.log_softmax(1)[torch.arange(len(y)), y].mean()


def balanced_cross_entropy(z, y, tau):
    return cross_entropy(z + tau * torch.tensor(COUNTS, dtype=torch.float64).log(), y)


def kl(target, logits):
    """Return KL(softmax target || softmax logits), summed over classes, averaged over the batch."""
    p = target.softmax(1)
    return (p * (target.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()


class Float64Training:
    """PGD on CE in eval mode, the method's loss in train mode, SGD with momentum and weight decay, in float64."""

    def __init__(self, net, teacher):
        self.net, self.teacher = double(net), double(teacher).eval()
        self.velocity = [torch.zeros_like(p) for p in self.net.parameters()]

    def attack(self, x, y, start):
        self.net.eval()
        x_adv = start.double()
        for _ in range(ATTACK_STEPS):
            point = x_adv.clone().requires_grad_()
            (grad,) = torch.autograd.grad(cross_entropy(self.net(point), y), point)
            x_adv = x + (x_adv + STEP_SIZE * grad.sign() - x).clamp(-EPS, EPS)
            x_adv = x_adv.clamp(0, 1)
        return x_adv

    def loss(self, name, options, x, x_adv, y, epoch):
        self.net.train()
        z = self.net(x_adv)
        if name == "pgd-at":
            return cross_entropy(z, y)
        loss = balanced_cross_entropy(z, y, options.get("tau", 1.0))
        if name == "at-bsl":
            return loss
        x_minus = x - (x_adv - x)
        with torch.no_grad():
            t, t_minus = self.teacher(x_adv), self.teacher(x_minus)
        if options.get("kl_weight"):
            temperature = options.get("temperature", 1.0)
            with torch.no_grad():
                target = self.teacher(x) if options.get("kl_target") == "clean" else t
            prior = options.get("tau", 1.0) * torch.tensor(COUNTS).log() if options.get("kl_prior") else 0.0
            loss = loss + options["kl_weight"] * kl(target / temperature, (z + prior) / temperature)
        if options["alpha"]:
            ramp = epoch / EPOCHS if options.get("ramp", "linear") == "linear" else 1.0
            loss = loss + options["alpha"] * ramp * kl(t - t_minus, z - self.net(x_minus))
        return loss

    def step(self, name, options, x, y, start, epoch, lr):
        x = x.double()
        x_adv = self.attack(x, y, start)
        loss = self.loss(name, options, x, x_adv, y, epoch)
        grads = torch.autograd.grad(loss, list(self.net.parameters()))
        with torch.no_grad():
            for p, grad, v in zip(self.net.parameters(), grads, self.velocity, strict=True):
                v.mul_(MOMENTUM).add_(grad + WEIGHT_DECAY * p)
                p -= lr * v
        return x_adv, loss.item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd-at", {}),
        ("at-bsl", {}),
        ("at-bsl", {"tau": 1.7}),
        ("ltat", {"alpha": 20.0}),
        ("ltat", {"alpha": 3.0, "ramp": "constant", "tau": 0.5}),
        ("ltat", {"alpha": 0.0, "kl_weight": 0.7, "temperature": 2.0}),
        ("ltat", {"alpha": 5.0, "kl_weight": 1.3}),
        ("ltat", {"alpha": 0.0, "kl_weight": 1.3, "kl_target": "clean"}),
        ("ltat", {"alpha": 5.0, "kl_weight": 1.3, "kl_target": "clean", "noise": "gaussian"}),
        ("ltat", {"alpha": 0.0, "kl_weight": 1.3, "kl_prior": True}),
        ("ltat", {"alpha": 5.0, "kl_weight": 0.7, "kl_prior": True, "tau": 0.5, "temperature": 2.0}),
        ("ltat", {"alpha": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "default",
)
def test_three_steps_equal_the_formulas(name, options):
    net, teacher = small_net(seed=1), small_net(seed=2)
    teacher_before = {k: v.clone() for k, v in teacher.state_dict().items()}
    reference = Float64Training(net, teacher)
    method = METHODS[name](**options)
    method.setup(MethodContext(torch.tensor(COUNTS), frozen_twin(teacher.train(), HARDWARE)))
    examples, loss = [], method.loss

    def recording_loss(model, x, x_adv, *rest):
        examples.append(x_adv)
        return loss(model, x, x_adv, *rest)

    method.loss = recording_loss
    attack = AttackConfig(EPS, STEP_SIZE, ATTACK_STEPS, method.noise)
    step = TrainStep(net, method, make_optimizer(net, 1.0, MOMENTUM, WEIGHT_DECAY), attack, HARDWARE)

    for e in range(3):
        x, y = images(16, seed=e), labels(16, seed=e)
        start = pgd_init(x, EPS, method.noise, generator=torch.Generator().manual_seed(50 + e))
        step.restart()
        net.eval()  # an evaluation may leave it in eval mode
        step(x, y, lr=LR[e], progress=(e + 1) / EPOCHS, seed=50 + e)
        expected_x_adv, expected_loss = reference.step(name, options, x, y, start, e + 1, LR[e])

        torch.testing.assert_close(examples[-1].double(), expected_x_adv, atol=1e-5, rtol=0)
        assert step.totals()["loss"] == pytest.approx(expected_loss, rel=1e-5)
        for (key, ours), expected in zip(net.state_dict().items(), reference.net.state_dict().values(), strict=True):
            torch.testing.assert_close(
                ours.double(), expected.double(), atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k} {m}"
            )

    # The teacher is unchanged, and it ran in eval mode although the live module is in train mode.
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("name", "noise", "teacher"),
    [("pgd-at", "uniform", "none"), ("at-bsl", "gaussian", "none"), ("ltat", "uniform", "balanced")],
)
def test_start_noise_and_teacher(name, noise, teacher):
    assert (METHODS[name].noise, METHODS[name]().teacher) == (noise, teacher)


def test_the_attack_does_not_know_the_class_prior():
    """With the same start noise, all three methods train on the same examples."""
    net, x, y = small_net(), images(16), labels(16)
    examples = []
    for name in ("pgd-at", "at-bsl", "ltat"):
        method = METHODS[name]()
        method.setup(MethodContext(torch.tensor([1000, 10, 1]), frozen_twin(small_net(seed=2), HARDWARE)))
        config = AttackConfig(EPS, STEP_SIZE, ATTACK_STEPS, "uniform")
        step = TrainStep(net, method, make_optimizer(net, 0.1, 0.9, 0.0), config, HARDWARE)
        step.generator.manual_seed(0)
        examples.append(step.perturb(x, y))
    assert torch.equal(examples[0], examples[1])
    assert torch.equal(examples[0], examples[2])
