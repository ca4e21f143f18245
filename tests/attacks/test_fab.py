"""Targeted FAB against the package of its authors, and on a model whose minimal distances are known."""

import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT

from helpers.toy_networks import Linear, images, small_net
from ltat_fast.attacks.balls import Ball
from ltat_fast.attacks.fab import FAB
from ltat_fast.attacks.search import Batch, margins

STREAM = (0, "test")


def closest_distances(net, x, y, target, norm, steps):
    """The distance of the closest adversarial example among all points that FAB looks at."""
    ball = Ball(norm, 10.0)
    distance = torch.full((len(x),), torch.inf)

    def watched(points):
        logits = net(points)
        if not torch.is_grad_enabled():
            adversarial = margins(logits, y) < 0
            found = torch.where(adversarial, ball.length(points - x).flatten(), torch.inf)
            distance.copy_(distance.minimum(found))
        return logits

    attack = FAB(ball, steps)
    state = attack.start(watched, Batch(x, y, target, torch.arange(len(x))), STREAM)
    for i in range(steps):
        attack.step(watched, state, i, STREAM)
    assert torch.equal(distance.isfinite(), state.margin < 0)
    return distance


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_finds_the_distances_of_the_package(norm):
    net, x = small_net(3, seed=4).eval().requires_grad_(False), images(16)
    ranking = net(x).argsort(1, descending=True)
    y, target = ranking[:, 0], ranking[:, 1]
    options = {"n_iter": 20, "eps": 10.0, "device": "cpu", "targeted": True}
    theirs = FABAttack_PT(net, norm={"linf": "Linf", "l2": "L2"}[norm], **options)
    theirs.target_class = 2
    adversarial = theirs.attack_single_run(x, y, is_targeted=True)
    expected = Ball(norm, 1.0).length(adversarial - x).flatten()
    ours = closest_distances(net, x, y, target, norm, 20)
    assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_finds_the_minimal_distance_of_a_linear_model(norm):
    """The distance of a plane is the gap over the dual norm of its normal; FAB overshoots by up to 5 %."""
    weight = torch.randn(2, 27, generator=torch.Generator().manual_seed(0)) / 3
    x = 0.4 + 0.2 * torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    net = Linear(weight)
    y = net(x).argmax(1)
    gap = margins(net(x), y)
    normal = weight[0] - weight[1]
    minimal = gap / (normal.abs().sum() if norm == "linf" else normal.norm())
    assert minimal.max() < 0.35
    found = closest_distances(net, x, y, 1 - y, norm, 10)
    assert (minimal <= found).all()
    assert (found <= 1.0501 * minimal).all()
