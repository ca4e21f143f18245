"""APGD against the package of its authors, step by step from the same start, and on a model with a known optimum."""

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from helpers.toy_networks import Linear, images, small_net
from ltat_fast.attacks.apgd import APGD, checkpoints, dlr_targeted
from ltat_fast.attacks.balls import Ball
from ltat_fast.attacks.search import Batch

EPS = {"linf": 0.03, "l2": 0.4}
STREAM = (0, "test")


def run(attack, net, x, y, target):
    """The state at the start and after all steps. No image leaves the batch."""
    batch = Batch(x, y, target, torch.arange(len(x)))
    state = attack.start(net, batch, STREAM)
    start = state.x_adv.clone()
    for i in range(attack.steps):
        attack.step(net, state, i, STREAM)
    return start, state


def case(num_classes=6, n=16):
    net = small_net(num_classes, seed=3).eval().requires_grad_(False)
    x = images(n)
    ranking = net(x).argsort(1, descending=True)
    return net, x, ranking[:, 0], ranking[:, 2]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_every_step_is_that_of_the_package(norm, loss):
    net, x, y, target = case()
    start, state = run(APGD(Ball(norm, EPS[norm]), loss, 40), net, x, y, target)
    options = {"n_iter": 40, "norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": EPS[norm], "device": "cpu", "seed": 0}
    theirs = APGDAttack(net, loss="ce", **options) if loss == "ce" else APGDAttack_targeted(net, **options)
    theirs.init_hyperparam(x)
    theirs.y_target = target
    best, _, best_loss, _ = theirs.attack_single_run(x, y, x_init=start)
    assert torch.allclose(state.best, best, atol=1e-6)
    assert torch.allclose(state.best_loss, best_loss, atol=1e-5)
    sizes = state.step_size / (2 * EPS[norm])
    assert len(sizes.unique()) > 1  # otherwise the check says nothing about the step sizes
    assert (best - start).abs().max() > EPS[norm] / 10


def test_the_checkpoints_are_those_of_the_paper():
    """p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), as shares of 100 steps."""
    assert [step + 1 for step in checkpoints(100)] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_finds_the_optimum_of_a_linear_model(norm):
    """Two classes: the worst perturbation is eps times the sign, or the direction, of the difference of the rows."""
    weight = torch.randn(2, 27, generator=torch.Generator().manual_seed(0))
    x = 0.4 + 0.2 * torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    net = Linear(weight)
    y = net(x).argmax(1)
    _, state = run(APGD(Ball(norm, EPS[norm]), "ce"), net, x, y, y)
    towards = (weight[1 - y] - weight[y]).view_as(x)
    expected = EPS[norm] * (
        towards.sign() if norm == "linf" else towards / towards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    )
    assert torch.allclose(state.best - x, expected, atol=1e-4)
    assert torch.equal(state.margin < 0, net(x + expected).argmax(1) != y)


def test_the_targeted_loss_by_hand():
    logits = torch.tensor([[5.0, 1.0, 4.0, 2.0, 0.0]])
    loss = dlr_targeted(logits, torch.tensor([0]), torch.tensor([1]))
    assert loss.item() == pytest.approx(-(5 - 1) / (5 - (2 + 1) / 2))
