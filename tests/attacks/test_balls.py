"""The geometry of the attacks: the projections against those of AutoAttack's package."""

import pytest
import torch
from pyautoattack.fab_projections import projection_l2, projection_linf

from helpers.toy_networks import images
from ltat_fast.attacks.balls import Ball

THEIRS = {"linf": projection_linf, "l2": projection_l2}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_step_to_a_plane_is_that_of_the_package(norm):
    """For planes that are near, far, and out of reach, on both sides, with gradients that are zero at some pixels."""
    generator = torch.Generator().manual_seed(1)
    x = images(60).double()
    w = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    w[:, 0, 0] = 0
    gap = torch.randn(60, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 60, dtype=torch.float64)
    b = (w * x).flatten(1).sum(1) - gap
    expected = THEIRS[norm](x.flatten(1), w.flatten(1), b).view_as(x)
    d = Ball(norm, 1.0).step_to_plane(x, w, gap)
    left = (gap + (w * d).flatten(1).sum(1)).abs()
    reached = left < 1e-9
    assert 10 < reached.sum() < 58
    assert torch.allclose(d[reached], expected[reached], atol=1e-9)
    corner = torch.where((w > 0) == (gap < 0).view(-1, 1, 1, 1), 1.0, 0.0)
    moves = w != 0
    assert torch.equal((x + d)[~reached][moves[~reached]].round(decimals=9), corner[~reached][moves[~reached]])
    assert -1e-12 <= (x + d).min() <= (x + d).max() <= 1 + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_projection_ends_in_the_ball_and_keeps_what_is_inside(norm):
    ball, x = Ball(norm, 0.1), images(20)
    z = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    inside = ball.project(x, z)
    assert ball.length(inside - x).max() <= 0.1 + 1e-6
    assert 0 <= inside.min() <= inside.max() <= 1
    assert torch.allclose(ball.project(x, inside), inside, atol=1e-6)
