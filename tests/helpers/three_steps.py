"""Three training steps of a method, compared with a float64 reference that is written from its formulas."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.toy_networks import images, labels
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import Method, MethodContext, modifiers
from ltat_fast.models.classifier import ImageClassifier
from ltat_fast.ops import pgd_init
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

HARDWARE = Hardware(torch.device("cpu"), torch.float32, "test")
CLASSES = 7
COUNTS = [40, 31, 22, 15, 9, 5, 2]
N = torch.tensor(COUNTS, dtype=torch.float64)  # n_c in the formulas
EPS, STEP_SIZE, ATTACK_STEPS = 0.1, 0.03, 4
EPOCHS = 4  # the three steps are the first steps of epochs 1 to 3, each of one step
LR, MOMENTUM, WEIGHT_DECAY = [0.125, 0.0625, 0.03125], 0.9, 5e-4  # rates that float32 represents exactly


class ToyClassifier(ImageClassifier):
    """Convolution, batch norm, ReLU, convolution, Softplus, for 6x6 images."""

    def __init__(self):
        super().__init__(8, CLASSES)
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def feature_maps(self, x: Tensor) -> Tensor:
        return F.softplus(self.conv2(F.relu(self.bn(self.conv1(x)))))


def toy_classifier(method: Method, seed: int = 0) -> nn.Module:
    """Return the float64 network that the trainer would build for ``method``.

    Batch norm has random statistics and parameters, as after some training.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = method.wrap_model(ToyClassifier(), torch.tensor(COUNTS))
        for p in net.fc.parameters():
            p.data *= 4  # confident predictions give larger gradients
        net.bn.running_mean.normal_(0, 0.2)
        net.bn.running_var.uniform_(0.3, 1.5)
        net.bn.weight.data.uniform_(0.5, 1.5)
        net.bn.bias.data.normal_(0, 0.2)
    return net.double()


def train_step(
    method: Method,
    net: nn.Module,
    lr: float = 1.0,
    teacher: nn.Module | None = None,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
    **settings,
) -> TrainStep:
    """Return the eager step of ``method`` on ``net``. settings: those of :func:`modifiers.build`."""
    frozen_teacher = None if teacher is None else frozen_twin(teacher, HARDWARE)
    method.setup(MethodContext(torch.tensor(COUNTS), frozen_teacher, label_smoothing))
    attack = AttackConfig(EPS, STEP_SIZE, ATTACK_STEPS, method.noise)
    optimizer = make_optimizer(net, lr, MOMENTUM, WEIGHT_DECAY)
    own = modifiers.build(method, net, torch.tensor(COUNTS), **settings)
    return TrainStep(net, method, optimizer, attack, HARDWARE, modifiers=own, accumulate=accumulate)


def batch(seed: int = 0, n: int = 16) -> tuple[Tensor, Tensor]:
    return images(n, seed=seed).double(), labels(n, CLASSES, seed=seed)


def picked(z: Tensor, y: Tensor) -> Tensor:
    """Return z_i[y_i] for each row i."""
    return torch.stack([row[label] for row, label in zip(z, y.tolist(), strict=True)])


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return -picked(z.softmax(1), y).log().mean()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of probabilities, summed over classes, averaged over the batch."""
    return (p * (p.log() - q.log())).sum(1).mean()


class Float64Method:
    """Reference for a training method: PGD on CE in eval mode, SGD with momentum and weight decay.

    A subclass writes down the loss of its method, and its attack objective if that is not CE.
    """

    def __init__(self, net: nn.Module):
        self.net = copy.deepcopy(net)
        self.velocity = {name: torch.zeros_like(p) for name, p in self.net.named_parameters()}
        self.step = 1  # number of the step, which is also that of its epoch

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
        """Take one step of SGD on the loss and return the loss."""
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
    reference_of: Callable[[nn.Module], Float64Method],
    tolerance: float = 1e-8,
    teacher: nn.Module | None = None,
    label_smoothing: float = 0.0,
    **settings,
) -> None:
    """Assert equal adversarial examples, losses, weights and batch norm statistics in three steps.

    Each step is the only step of its epoch. tolerance: use a larger one if the method computes a part in float32 even
    for a float64 network. settings: those of :func:`modifiers.build`. With ``ema`` the reference has the averaged
    weights in ``average``.
    """
    net = toy_classifier(method, seed=1)
    reference = reference_of(net)
    step = train_step(method, net, teacher=teacher, label_smoothing=label_smoothing, **settings)
    for epoch in range(3):
        x, y = batch(epoch)
        start = pgd_init(x, EPS, method.noise, generator=torch.Generator().manual_seed(50 + epoch))
        method.on_epoch_start(epoch)
        strengths = step.modifiers.strengths(epoch, 0, EPOCHS, 1)
        step.modifiers.fill(**strengths)
        step.frozen.refresh()
        step.generator.manual_seed(50 + epoch)
        x_adv = step.perturb(x, y)
        step.restart()
        step(x, y, lr=LR[epoch], progress=(epoch + 1) / EPOCHS, seed=50 + epoch, **strengths)

        expected_x_adv = reference.attack(x, y, start)
        expected_loss = reference.descend(x, expected_x_adv, y, LR[epoch], epoch)
        reference.step += 1
        torch.testing.assert_close(x_adv, expected_x_adv, atol=1e-9, rtol=0)
        assert step.totals()["loss"] == pytest.approx(expected_loss.item(), rel=tolerance)
        ours, expected = net.state_dict(), reference.net.state_dict()
        if step.modifiers.ema:
            ours |= {f"average.{name}": tensor for name, tensor in step.modifiers.state().items()}
            expected |= {f"average.{name}": tensor for name, tensor in reference.average.items()}
        for name in expected:
            torch.testing.assert_close(
                ours[name], expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n} {m}"
            )
