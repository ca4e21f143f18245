"""AWP against its formula; which tensors it perturbs; it restores weights, batch norm statistics and method state."""

import copy

import pytest
import torch
from test_trades import Float64BalancedTrades, Float64Trades

from helpers.float64_modifiers import Float64AtBsl, Float64PgdAt, with_awp
from helpers.three_steps import assert_three_steps_equal, batch, toy_classifier, train_step
from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.awp import Awp
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.reat import Reat
from ltat_fast.methods.trades import Trades


@pytest.mark.parametrize(
    ("method", "base", "settings"),
    [
        (Awp(), Float64PgdAt, {}),
        (PgdAt(), Float64PgdAt, {"awp": 0.2, "awp_from": 2}),
        (AtBsl(), Float64AtBsl, {"awp": 0.01}),
        (Trades(), Float64Trades, {"awp": 0.005, "awp_from": 10}),
        (Trades(), Float64Trades, {"awp": 0.005}),
        (Trades(beta=1.5, balanced=True), Float64BalancedTrades, {"awp": 0.005}),
    ],
    ids=str,
)
def test_three_steps_equal_the_formula(method, base, settings):
    reference = with_awp(base, settings.get("awp", 0.01), settings.get("awp_from", 1))
    assert_three_steps_equal(method, reference, tolerance=1e-6, **settings)


def test_the_method_awp_is_pgd_at_with_a_perturbation():
    """``--awp 0`` switches it off."""
    steps = [
        train_step(method, toy_classifier(method), **settings)
        for method, settings in ((Awp(), {}), (PgdAt(), {"awp": 0.01}), (Awp(), {"awp": 0.0}), (PgdAt(), {}))
    ]
    for step in steps:
        step(*batch(), lr=0.125, progress=1.0, seed=0)
    on, also_on, off, also_off = (step.model.conv1.weight for step in steps)
    assert torch.equal(on, also_on)
    assert torch.equal(off, also_off)
    assert not torch.equal(on, off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [PgdAt(), Trades()], ids=["pgd-at", "trades"])
def test_weights_are_restored_bit_for_bit(method, dtype):
    net = toy_classifier(method).to(dtype)
    before = copy.deepcopy(net.state_dict())
    step = train_step(method, net, awp=0.03)
    x, y = batch()
    for seed in range(3):
        step(x.to(dtype), y, lr=0.0, progress=1.0, seed=seed)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name
    momentum = step.optimizer.state[net.conv1.weight]["momentum_buffer"]
    assert momentum.abs().max() > 0


def test_each_weight_tensor_is_perturbed_uphill_by_gamma_of_its_norm():
    """The second call of the loss is at the perturbed weights. Biases and batch norm parameters do not change."""
    method, seen, losses = PgdAt(), [], []
    net = toy_classifier(method)
    step = train_step(method, net, awp=0.05)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.register_forward_pre_hook(lambda *_: seen.append({n: p.detach().clone() for n, p in net.named_parameters()}))
    base_loss = method.loss

    def loss(*args):
        value, parts = base_loss(*args)
        losses.append(value.item())
        return value, parts

    method.loss = loss
    step(*batch(), lr=0.125, progress=1.0, seed=0)
    at_weights, perturbed = seen
    assert all(torch.equal(at_weights[name], before[name]) for name in before)
    for name, p in before.items():
        moved = (perturbed[name] - p).norm() / p.norm()
        assert moved.item() == pytest.approx(0.05 if p.ndim > 1 else 0.0, rel=1e-6), name
    assert losses[1] > losses[0] + 0.01
    assert step.totals()["loss"] == pytest.approx(losses[1], rel=1e-6), "the loss is logged at the perturbed weights"


def test_batch_norm_counts_only_the_forward_at_the_perturbed_weights():
    """With strength 0 the perturbed weights are the weights, so the statistics are those of the method alone."""
    statistics = []
    for settings, strengths in (({"awp": 0.1}, {"awp": 0.0}), ({}, {})):
        net = toy_classifier(PgdAt())
        train_step(PgdAt(), net, **settings)(*batch(), lr=0.125, progress=1.0, seed=0, **strengths)
        statistics.append(dict(net.named_buffers()))
    assert statistics[0]["bn.num_batches_tracked"] == 1
    for name, buffer in statistics[0].items():
        assert torch.equal(buffer, statistics[1][name]), name


def test_the_state_of_a_method_counts_a_batch_once():
    """REAT counts its predictions in the loss, which AWP evaluates twice."""
    method = Reat()
    step = train_step(method, toy_classifier(method), awp=0.01)
    x, y = batch()
    step(x, y, lr=0.125, progress=1.0, seed=0)
    assert method.predicted.sum() == len(y)


def test_the_perturbation_starts_in_its_first_epoch():
    """Its strength depends on the epoch alone, so that a resumed epoch has it too."""
    awp = train_step(Trades(), toy_classifier(Trades()), awp=0.005, awp_from=10).modifiers.awp
    assert [awp.strength_in(epoch) for epoch in (0, 8, 9, 99)] == [0.0, 0.0, 0.005, 0.005]
