"""MART against its formula, also where plain float32 loses precision, and its preset."""

import pytest
import torch

from helpers.three_steps import COUNTS, Float64Method, N, assert_three_steps_equal, picked
from ltat_fast.flags import parse_args
from ltat_fast.methods import MethodContext
from ltat_fast.methods.mart import Mart


def formula(clean, adv, y, beta, log_prior=0.0):
    """The loss with the constants of the authors' code, one sample at a time where it picks classes."""
    p, q, b = clean.softmax(1), adv.softmax(1), (adv + log_prior).softmax(1)
    wrong = torch.stack([torch.cat([row[:c], row[c + 1 :]]).max() for row, c in zip(b, y.tolist(), strict=True)])
    boosted = -picked(b, y).log() - (1.0001 - wrong + 1e-12).log()
    divergence = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return (boosted + beta * (1.0000001 - picked(p, y)) * divergence).mean()


class Float64Mart(Float64Method):
    beta, log_prior = 5.0, 0.0

    def loss(self, x, x_adv, y):
        return formula(self.logits(x), self.logits(x_adv), y, self.beta, self.log_prior)


class Float64BalancedMart(Float64Mart):
    beta, log_prior = 6.0, N.log()


@pytest.mark.parametrize(
    ("method", "reference"),
    [(Mart(), Float64Mart), (Mart(beta=6.0, balanced=True), Float64BalancedMart)],
    ids=["", "balanced"],
)
def test_three_steps_equal_the_formula(method, reference):
    assert method.noise == "gaussian"
    assert_three_steps_equal(method, reference)


@pytest.mark.parametrize("size", [1.0, 12.0, 25.0])
def test_float32_follows_the_formula_at_confident_logits(size):
    """If the model is confident of the wrong class, 1.0001 - q has few correct bits in float32, and q can be 0."""
    generator = torch.Generator().manual_seed(0)
    clean, adv = size * torch.randn(2, 40, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(7, (40,), generator=generator)
    expected = formula(clean.requires_grad_(), adv.requires_grad_(), y, 5.0)
    expected_grads = torch.autograd.grad(expected, (clean, adv))

    method = Mart()
    method.setup(MethodContext(torch.tensor(COUNTS)))
    points = [z.detach().float().requires_grad_() for z in (clean, adv)]
    logits = iter(points)
    loss, _ = method.loss(lambda x: next(logits), None, None, y, None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, expected_grad in zip(torch.autograd.grad(loss, points), expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, atol=1e-6, rtol=1e-3)


def test_the_small_constants_are_not_lost_in_float32():
    """The clean prediction is confident and right, the adversarial one confident and wrong: 1 - p is nearly 0."""
    clean = torch.tensor([[17.0, 0, 0, 0, 0, 0, 0], [0, 0, 40.0, 0, 0, 0, 0]], dtype=torch.float64)
    adv = torch.tensor([[0, 12.3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 14.1, 0]], dtype=torch.float64)
    for c, a, y in zip(clean[:, None], adv[:, None], torch.tensor([[0], [2]]), strict=True):
        method = Mart()
        method.setup(MethodContext(torch.tensor(COUNTS)))
        logits = iter((c.float(), a.float()))
        _, parts = method.loss(lambda x, logits=logits: next(logits), None, None, y, None)
        boosted = formula(c, a, y, 0.0).item()
        assert parts["bce"].item() == pytest.approx(boosted, rel=3e-7)
        # In float64 the subtraction from 1.0000001 in the formula keeps nine correct digits.
        assert parts["weighted_kl"].item() == pytest.approx(
            formula(c, a, y, 1e6).item() / 1e6 - boosted / 1e6, rel=1e-5
        )


def test_extreme_logits_stay_finite():
    method = Mart()
    method.setup(MethodContext(torch.tensor(COUNTS)))
    z = torch.tensor([[1e4, -1e4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 3e3]]).requires_grad_()
    loss, _ = method.loss(lambda x: z, None, None, torch.tensor([1, 2]), None)
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_the_default_beta_depends_on_the_network():
    def beta(*flags):
        return parse_args(["--method", "mart", *flags])[1].beta

    assert beta() == beta("--dataset", "cifar10-lt") == beta("--arch", "preactresnet18") == 5.0
    assert beta("--dataset", "cifar10-lt", "--arch", "wrn-34-10") == 6.0
    assert beta("--arch", "wrn-34-10", "--beta", "4") == 4.0
