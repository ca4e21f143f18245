"""Three training steps of a method beside a twin written from its formulas, both in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import images, labels

from ltat_fast.attacks import AttackConfig
from ltat_fast.engine.device import Hardware
from ltat_fast.engine.step import TrainStep, frozen_twin, make_optimizer
from ltat_fast.methods import Method, Setting
from ltat_fast.models.classifier import ImageClassifier
from ltat_fast.ops import pgd_init

HARDWARE = Hardware(torch.device("cpu"), torch.float32, "test")
CLASSES = 7
COUNTS = [40, 31, 22, 15, 9, 5, 2]
N = torch.tensor(COUNTS, dtype=torch.float64)
EPS, STEP_SIZE, ATTACK_STEPS = 0.1, 0.03, 4
LR, MOMENTUM, WEIGHT_DECAY = [0.125, 0.0625, 0.03125], 0.9, 5e-4  # rates exact in the float32 of the optimizer's tensor


class ToyClassifier(ImageClassifier):
    """Convolution, batch norm, ReLU, convolution, Softplus: for 6x6 images."""

    def __init__(self):
        super().__init__(8, CLASSES)
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def feature_maps(self, x: Tensor) -> Tensor:
        return F.softplus(self.conv2(F.relu(self.bn(self.conv1(x)))))


def toy_classifier(method: Method, seed: int = 0) -> nn.Module:
    """As the engine makes it for ``method``, but in float64; statistics and affine of batch norm lived in."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = method.wrap_model(ToyClassifier(), torch.tensor(COUNTS))
        for p in net.fc.parameters():
            p.data *= 4  # predictions that differ, and so gradients to speak of
        net.bn.running_mean.normal_(0, 0.2)
        net.bn.running_var.uniform_(0.3, 1.5)
        net.bn.weight.data.uniform_(0.5, 1.5)
        net.bn.bias.data.normal_(0, 0.2)
    return net.double()


def train_step(method: Method, net: nn.Module, lr: float = 1.0, teacher: nn.Module | None = None) -> TrainStep:
    method.setup(Setting(torch.tensor(COUNTS), teacher and frozen_twin(teacher, HARDWARE)))
    attack = AttackConfig(EPS, STEP_SIZE, ATTACK_STEPS, method.noise)
    return TrainStep(net, method, make_optimizer(net, lr, MOMENTUM, WEIGHT_DECAY), attack, HARDWARE)


def batch(seed: int = 0, n: int = 16) -> tuple[Tensor, Tensor]:
    return images(n, seed=seed).double(), labels(n, CLASSES, seed=seed)


def picked(z: Tensor, y: Tensor) -> Tensor:
    return torch.stack([row[label] for row, label in zip(z, y.tolist(), strict=True)])


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return -picked(z.softmax(1), y).log().mean()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities, summed over classes, averaged over the batch."""
    return (p * (p.log() - q.log())).sum(1).mean()


class Twin:
    """PGD on CE in eval mode, SGD with momentum and weight decay; a subclass says what else its method does."""

    def __init__(self, net: nn.Module):
        self.net = copy.deepcopy(net)
        self.velocity = {name: torch.zeros_like(p) for name, p in self.net.named_parameters()}

    def logits(self, x: Tensor) -> Tensor:
        return self.net.features(x) @ self.net.fc.weight.T + self.net.fc.bias

    def objective(self, x: Tensor, point: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.logits(point), y)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def attack(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        self.net.eval()
        x_adv = start
        for _ in range(ATTACK_STEPS):
            point = x_adv.clone().requires_grad_()
            (grad,) = torch.autograd.grad(self.objective(x, point, y), point)
            x_adv = x + (x_adv + STEP_SIZE * grad.sign() - x).clamp(-EPS, EPS)
            x_adv = x_adv.clamp(0, 1)
        self.net.train()
        return x_adv

    def descend(self, x: Tensor, x_adv: Tensor, y: Tensor, lr: float, epoch: int) -> Tensor:
        """One step of SGD on the loss, which it returns."""
        loss = self.loss(x, x_adv, y)
        parameters = dict(self.net.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, p), grad in zip(parameters.items(), grads, strict=True):
                self.velocity[name] = MOMENTUM * self.velocity[name] + grad + WEIGHT_DECAY * p
                p -= lr * self.velocity[name]
        return loss.detach()


def assert_three_steps_equal(
    method: Method,
    twin_of: Callable[[nn.Module], Twin],
    tolerance: float = 1e-8,
    teacher: nn.Module | None = None,
) -> None:
    """The adversarial example, loss, weights and statistics of three steps, the first of each of three epochs.

    tolerance: wider where part of a method is in float32 whatever the network is.
    """
    net = toy_classifier(method, seed=1)
    twin = twin_of(net)
    step = train_step(method, net, teacher=teacher)
    for epoch in range(3):
        x, y = batch(epoch)
        start = pgd_init(x, EPS, method.noise, generator=torch.Generator().manual_seed(50 + epoch))
        method.on_epoch_start(epoch)
        step.frozen.refresh()
        step.generator.manual_seed(50 + epoch)
        x_adv = step.perturb(x, y)
        step.restart()
        step(x, y, lr=LR[epoch], progress=(epoch + 1) / 4, seed=50 + epoch)

        expected_x_adv = twin.attack(x, y, start)
        expected_loss = twin.descend(x, expected_x_adv, y, LR[epoch], epoch)
        torch.testing.assert_close(x_adv, expected_x_adv, atol=1e-9, rtol=0)
        assert step.totals()["loss"] == pytest.approx(expected_loss.item(), rel=tolerance)
        ours, theirs = net.state_dict(), twin.net.state_dict()
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n} {m}"
            )
