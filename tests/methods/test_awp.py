"""AWP against its formula; which tensors it perturbs; it restores weights and batch norm statistics."""

import copy

import pytest
import torch
from test_trades import Float64BalancedTrades, Float64Trades

from helpers.three_steps import (
    Float64Method,
    N,
    assert_three_steps_equal,
    batch,
    cross_entropy,
    toy_classifier,
    train_step,
)
from ltat_fast.methods.awp import Awp
from ltat_fast.methods.pgd_at import PgdAt


class Float64PgdAt(Float64Method):
    def loss(self, x, x_adv, y):
        return cross_entropy(self.logits(x_adv), y)


class Float64AtBsl(Float64Method):
    def loss(self, x, x_adv, y):
        return cross_entropy(self.logits(x_adv) + N.log(), y)


def with_awp(base: type[Float64Method], gamma: float, first: int) -> type[Float64Method]:
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


@pytest.mark.parametrize(
    ("options", "base", "gamma", "first"),
    [
        ({}, Float64PgdAt, 0.01, 1),
        ({"awp_gamma": 0.2, "awp_from": 2}, Float64PgdAt, 0.2, 2),
        ({"balanced": True}, Float64AtBsl, 0.01, 1),
        ({"awp_base": "trades"}, Float64Trades, 0.005, 10),
        ({"awp_base": "trades", "awp_from": 1}, Float64Trades, 0.005, 1),
        ({"awp_base": "trades", "awp_from": 0, "beta": 1.5, "balanced": True}, Float64BalancedTrades, 0.005, 0),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_three_steps_equal_the_formula(options, base, gamma, first):
    assert_three_steps_equal(Awp(**options), with_awp(base, gamma, first), tolerance=1e-6)


def test_the_start_noise_is_that_of_the_base_method():
    assert (Awp().noise, Awp(awp_base="trades").noise, Awp(balanced=True).noise) == ("uniform", "gaussian", "gaussian")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", ["pgd-at", "trades"])
def test_weights_are_restored_bit_for_bit(base, dtype):
    method = Awp(awp_base=base, awp_from=1, awp_gamma=0.03)
    net = toy_classifier(method).to(dtype)
    before = copy.deepcopy(net.state_dict())
    step = train_step(method, net)
    x, y = batch()
    for seed in range(3):
        step(x.to(dtype), y, lr=0.0, progress=1.0, seed=seed)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name
    momentum = step.optimizer.state[net.conv1.weight]["momentum_buffer"]
    assert momentum.abs().max() > 0


def test_each_weight_tensor_is_perturbed_uphill_by_gamma_of_its_norm():
    """The second call of the loss is at the perturbed weights. Biases and batch norm parameters do not change."""
    method, seen = Awp(awp_gamma=0.05), []
    net = toy_classifier(method)
    step = train_step(method, net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.register_forward_pre_hook(lambda *_: seen.append({n: p.detach().clone() for n, p in net.named_parameters()}))
    base_loss, losses = method.base.loss, []

    def loss(*args):
        value, parts = base_loss(*args)
        losses.append(value.item())
        return value, parts

    method.base.loss = loss
    step(*batch(), lr=0.125, progress=1.0, seed=0)
    at_weights, perturbed = seen
    assert all(torch.equal(at_weights[name], before[name]) for name in before)
    for name, p in before.items():
        moved = (perturbed[name] - p).norm() / p.norm()
        assert moved.item() == pytest.approx(0.05 if p.ndim > 1 else 0.0, rel=1e-6), name
    assert losses[1] > losses[0] + 0.01
    assert step.totals()["loss"] == pytest.approx(losses[1], rel=1e-6), "the loss is logged at the perturbed weights"


def test_batch_norm_counts_only_the_forward_at_the_perturbed_weights():
    """With gamma 0 the perturbed weights are the weights, so the statistics are those of plain PGD-AT."""
    statistics = []
    for method in (Awp(awp_gamma=0.0), PgdAt()):
        net = toy_classifier(method)
        train_step(method, net)(*batch(), lr=0.125, progress=1.0, seed=0)
        statistics.append(dict(net.named_buffers()))
    assert statistics[0]["bn.num_batches_tracked"] == 1
    for name, buffer in statistics[0].items():
        assert torch.equal(buffer, statistics[1][name]), name


def test_a_resumed_epoch_keeps_its_strength():
    """The trainer does not call ``on_epoch_start`` when it resumes in the middle of an epoch."""
    method, resumed = Awp(awp_base="trades"), Awp(awp_base="trades")
    for m in (method, resumed):
        train_step(m, toy_classifier(m))
    method.on_epoch_start(9)
    assert (method.state()["strength"], resumed.state()["strength"]) == (torch.tensor(0.005), 0)
    for name, tensor in resumed.state().items():
        tensor.copy_(method.state()[name])
    assert resumed.strength == torch.tensor(0.005)
