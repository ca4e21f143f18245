"""TRADES against its formula, and without its second term."""

import pytest
import torch

from helpers.three_steps import (
    Float64Method,
    N,
    assert_three_steps_equal,
    batch,
    cross_entropy,
    kl,
    toy_classifier,
    train_step,
)
from ltat_fast.methods.natural import Natural
from ltat_fast.methods.trades import Trades


class Float64Trades(Float64Method):
    beta, log_prior = 6.0, 0.0

    def objective(self, x, point, y):
        return kl(self.logits(x).softmax(1).detach(), self.logits(point).softmax(1))

    def loss(self, x, x_adv, y):
        clean, adv = self.logits(x), self.logits(x_adv)
        return cross_entropy(clean + self.log_prior, y) + self.beta * kl(clean.softmax(1), adv.softmax(1))


class Float64BalancedTrades(Float64Trades):
    beta, log_prior = 1.5, N.log()


@pytest.mark.parametrize(
    ("method", "reference"),
    [(Trades(), Float64Trades), (Trades(beta=1.5, balanced=True), Float64BalancedTrades)],
    ids=["", "balanced"],
)
def test_three_steps_equal_the_formula(method, reference):
    assert method.noise == "gaussian"
    assert_three_steps_equal(method, reference)


def test_beta_0_is_clean_training():
    """The adversarial batch changes neither weights nor batch norm statistics."""
    nets = []
    for method in (Trades(beta=0.0), Natural()):
        net = toy_classifier(method)
        step = train_step(method, net)
        for seed in range(2):
            step(*batch(seed), lr=0.125, progress=1.0, seed=seed)
        nets.append(net.state_dict())
    for name, tensor in nets[0].items():
        # Natural computes its cross-entropy in float32.
        torch.testing.assert_close(tensor, nets[1][name], atol=1e-7, rtol=1e-6)


def test_the_attack_moves_away_from_the_clean_prediction_not_from_the_label():
    method = Trades()
    step = train_step(method, toy_classifier(method))
    x, y = batch()
    examples = []
    for labels in (y, (y + 1) % 7):
        step.generator.manual_seed(0)
        examples.append(step.perturb(x, labels))
    assert torch.equal(*examples)
    assert (examples[0] - x).abs().max() > 0.05
