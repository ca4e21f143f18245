"""Float64 references of the modifiers, written from their formulas, on top of the reference of any method."""

import copy
import math

import torch

from helpers.float64_distillation import teacher_classifier
from helpers.three_steps import (
    ATTACK_STEPS,
    COUNTS,
    EPOCHS,
    EPS,
    STEP_SIZE,
    Float64Method,
    N,
    cross_entropy,
    kl,
)


class Float64PgdAt(Float64Method):
    def loss(self, x, x_adv, y):
        return cross_entropy(self.logits(x_adv), y)


class Float64AtBsl(Float64Method):
    def loss(self, x, x_adv, y):
        return cross_entropy(self.logits(x_adv) + N.log(), y)


class Float64Ltat(Float64AtBsl):
    """BSL + alpha_e IGDM with alpha 20."""

    def loss(self, x, x_adv, y):
        teacher, student = copy.deepcopy(teacher_classifier()).eval(), self.logits(x_adv)
        bsl, delta = cross_entropy(student + N.log(), y), x_adv - x
        with torch.no_grad():
            guide = teacher(x_adv) - teacher(x - delta)
        return bsl + 20 * self.step / EPOCHS * kl(guide.softmax(1), (student - self.logits(x - delta)).softmax(1))


def with_awp(base: type[Float64Method], gamma: float, first: int = 1) -> type[Float64Method]:
    """AWP as in the authors' code: an ascent step of SGD on a proxy network gives the direction."""

    class Float64Awp(base):
        def descend(self, x, x_adv, y, lr, epoch):
            if epoch + 1 < first:
                return super().descend(x, x_adv, y, lr, epoch)
            proxy = copy.copy(self)
            proxy.net = copy.deepcopy(self.net)
            names = [name for name, p in self.net.named_parameters() if p.ndim > 1]
            assert names == ["fc.weight", "conv1.weight", "conv2.weight"]
            weights, moved = dict(self.net.named_parameters()), dict(proxy.net.named_parameters())
            grads = torch.autograd.grad(-proxy.loss(x, x_adv, y), [moved[name] for name in names])
            shifts = {}
            with torch.no_grad():
                for name, grad in zip(names, grads, strict=True):
                    difference = (moved[name] - 0.01 * grad) - weights[name]
                    shifts[name] = gamma * weights[name].norm() / (difference.norm() + 1e-20) * difference
                    weights[name] += shifts[name]
            loss = super().descend(x, x_adv, y, lr, epoch)
            with torch.no_grad():
                for name in names:
                    weights[name] -= shifts[name]
            return loss

    return Float64Awp


def with_ema(base: type[Float64Method], decay: float) -> type[Float64Method]:
    """The average in ``average``, by name. One step is one epoch, so the warm-up of 2.5 % is one step."""

    class Float64Ema(base):
        def descend(self, x, x_adv, y, lr, epoch):
            loss = super().descend(x, x_adv, y, lr, epoch)
            weights = {name: p.detach().clone() for name, p in self.net.named_parameters()}
            if epoch == 0:
                self.average = weights
            else:
                d = min(decay, epoch / (9 + epoch))
                self.average = {name: d * self.average[name] + (1 - d) * w for name, w in weights.items()}
            return loss

    return Float64Ema


def with_budget(base: type[Float64Method], a: float, b: float) -> type[Float64Method]:
    """The attack of RobustLT, one image at a time."""
    s = [math.sqrt(math.log(max(COUNTS) / n)) for n in COUNTS]
    kappa = a / sum(n / sum(COUNTS) * s_c for n, s_c in zip(COUNTS, s, strict=True))
    eps = [EPS * ((1 - a) + kappa * s_c) for s_c in s]

    class Float64Budget(base):
        def attack(self, x, y, start):
            self.net.eval()
            points = start.clone()
            warm_up = min((self.step - 1) / (b * EPOCHS), 1) if b else 1
            for _ in range(ATTACK_STEPS):
                point = points.clone().requires_grad_()
                (grad,) = torch.autograd.grad(self.objective(x, point, y), point)
                for i, label in enumerate(y.tolist()):
                    radius = eps[label] * warm_up
                    moved = points[i] + STEP_SIZE * radius / EPS * grad[i].sign()
                    points[i] = (x[i] + (moved - x[i]).clamp(-radius, radius)).clamp(0, 1)
            self.net.train()
            return points

    return Float64Budget
