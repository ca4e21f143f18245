"""The Square Attack: its schedule, its budget, and that the skipped queries change nothing."""

import pytest
import torch
from pyautoattack.square import SquareAttack

from helpers.toy_networks import Linear, images, small_net
from ltat_fast.attacks import square
from ltat_fast.attacks.balls import Ball
from ltat_fast.attacks.search import Batch, margins
from ltat_fast.attacks.square import Square

STREAM = (0, "test")


def run(attack, net, x, y):
    state = attack.start(net, Batch(x, y, y, torch.arange(len(x))), STREAM)
    first = state.best_margin.clone()
    for i in range(attack.steps):
        attack.step(net, state, i, STREAM)
    return first, state


@pytest.mark.parametrize("height", [8, 32, 224])
def test_the_sizes_of_the_windows_are_those_of_the_package(height):
    theirs = SquareAttack(None, p_init=0.8, n_queries=5000, eps=0.1, resc_schedule=False)
    for i in (*range(0, 60), 199, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999):
        side = max(round((theirs.p_selection(i) * height**2) ** 0.5), 1)
        assert Square(Ball("linf", 0.1)).side(i, height, height) == min(side, height), i


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_lowers_margins_inside_the_ball(norm, channels):
    eps = {"linf": 0.05, "l2": 0.5}[norm]
    net, x = small_net(4, channels, seed=3).eval(), images(12, channels)
    y = net(x).argmax(1)
    with torch.no_grad():
        first, state = run(Square(Ball(norm, eps), 100), net, x, y)
        assert torch.allclose(margins(net(state.best), y), state.best_margin, atol=1e-5)
    assert (state.best_margin <= first).all()
    assert (state.best_margin < first).float().mean() > 0.5
    assert Ball(norm, eps).length(state.best - x).max() <= eps + 1e-6
    assert 0 <= state.best.min() <= state.best.max() <= 1


def test_skipped_queries_change_nothing(monkeypatch):
    """An image of one channel has few proposals. Without the table, only proposals that change nothing are skipped."""
    net, x = small_net(4, 1, seed=3).eval(), images(12, 1)
    y = net(x).argmax(1)
    queries = []

    def counted(points):
        queries[-1] += len(points)
        return net(points)

    found = []
    for table in (square.LARGEST_TABLE, 0):
        monkeypatch.setattr(square, "LARGEST_TABLE", table)
        queries.append(0)
        with torch.no_grad():
            found.append(run(Square(Ball("linf", 0.05), 400), counted, x, y)[1].best)
    assert torch.allclose(*found)
    assert queries[0] < queries[1] / 2
    assert queries[1] < 0.8 * 12 * 400


def test_it_breaks_every_image_of_a_linear_model_that_can_be_broken():
    """Random search finds the corner of the ball. As in the original, no window reaches the last row and column."""
    weight = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    weight[:, -1] = weight[:, :, -1] = 0
    x = 0.4 + 0.2 * torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    net = Linear(weight.flatten(1))
    y = net(x).argmax(1)
    radius = margins(net(x), y) / (weight[0] - weight[1]).abs().sum()
    eps = radius.sort().values[19:21].mean().item()
    with torch.no_grad():
        _, state = run(Square(Ball("linf", eps), 3000), net, x, y)
    assert torch.equal(state.best_margin < 0, radius < eps)
