"""``ltat_fast.attacks.evaluate``: any module, both norms, and outputs that cannot be attacked."""

import pytest
import torch
from torch import nn

from helpers.float64_attacks import ce64
from helpers.toy_networks import double, images, small_net
from ltat_fast.attacks import AttackConfig, cross_entropy, evaluate, pgd
from ltat_fast.attacks.by_name import start_noise
from ltat_fast.attacks.checks import check_gap
from ltat_fast.attacks.results import unpack
from ltat_fast.errors import UserError


class Then(nn.Module):
    """Applies ``function`` to the outputs of ``net``."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net(x))


def case(n=60):
    net, x = small_net(seed=4).eval(), images(n)
    return net, x, net(x).argmax(1)


def pgd_l2_float64(net, x, start, score, eps, step, steps):
    """As in Madry et al.'s library: along the normalised gradient, then back to the sphere, then to [0, 1]."""
    net, x, x_adv = double(net).eval(), x.double(), start.double()
    for _ in range(steps):
        point = x_adv.clone().requires_grad_()
        score(net(point)).backward()
        direction = torch.stack([g / g.square().sum().sqrt() for g in point.grad])
        moved = x_adv + step * direction - x
        x_adv = torch.stack(
            [o + d * min(1.0, eps / d.square().sum().sqrt().item()) for o, d in zip(x, moved, strict=True)]
        )
        x_adv = x_adv.clamp(0, 1)
    return x_adv


def test_pgd_in_the_l2_ball_is_that_of_float64():
    net, x, y = case()
    start = (x + start_noise(torch.arange(len(x)), x.shape[1:], 1.0, torch.device("cpu"), 0, norm="l2")).clamp(0, 1)
    ours = pgd(net, x, cross_entropy(y), AttackConfig(1.0, 0.25, 8, norm="l2"), start=start)
    theirs = pgd_l2_float64(net, x, start, ce64(y), 1.0, 0.25, 8)
    assert (ours - theirs).abs().amax() < 1e-4
    length = (ours - x).flatten(1).norm(dim=1)
    assert length.amax() <= 1 + 1e-5
    assert length.amax() > 0.9


def test_start_noise_fills_the_l2_ball():
    noise = start_noise(torch.arange(500), (3, 4, 4), 0.5, torch.device("cpu"), 1, norm="l2")
    length = noise.flatten(1).norm(dim=1)
    assert length.amax() <= 0.5 + 1e-6
    assert length.mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("name", ["pgd10", "cw10", "fgsm", "pgd10-t"])
def test_a_larger_l2_ball_breaks_more(name):
    net, x, y = case()
    results = [evaluate(net, x, y, name, eps=eps, norm="l2")[name].all for eps in (0.1, 1.0, 3.0)]
    assert results == sorted(results, reverse=True)
    assert results[0] > results[2]


def test_it_takes_uint8_and_float_images_and_leaves_the_model_as_it_is():
    net, x, y = case()
    net.train()
    pixels = (x * 255).round().to(torch.uint8)
    one = evaluate(net, pixels, y, "clean, pgd5", eps=0.1, groups={"rare": [2]})
    two = evaluate(net, pixels / 255, y, ["clean", "pgd5"], eps=0.1, groups={"rare": [2]}, batch_size=7)
    assert one == two
    assert list(one) == ["clean", "pgd5"]
    assert net.training
    assert one["pgd5"].all == pytest.approx(100 * unpack(one["pgd5"].correct, 60).mean())
    assert one["clean"].groups["rare"] == one["clean"].per_class[2]


def test_targeted_pgd_aims_at_every_wrong_class():
    """It breaks an image if any of the targets does; a class whose logit cannot be the largest is never reached."""
    net, x, y = case()
    results = evaluate(net, x, y, "pgd20,pgd20-t", eps=0.1)
    broken = {name: ~unpack(result.correct, 60) for name, result in results.items()}
    assert (broken["pgd20-t"] | ~broken["pgd20"]).mean() > 0.9
    assert broken["pgd20-t"].any()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_images_without_finite_logits_are_never_correct(broken):
    net, x, y = case()
    bad = Then(net, lambda z: z.masked_fill(torch.ones(1, z.shape[1], dtype=torch.bool), broken)).eval()
    results = evaluate(bad, x, torch.zeros_like(y), "clean,pgd2,cw2,autoattack,pgd2-t", eps=0.1)
    assert {name: result.all for name, result in results.items()} == dict.fromkeys(results, 0.0)
    assert results["clean"].not_finite == len(x)
    assert evaluate(net, x, y, "clean", eps=0.1)["clean"].not_finite is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z.double(), "returns logits in float64, not in float32"),
        (lambda z: z.half(), "returns logits in float16, not in float32"),
        (lambda z: z.bfloat16(), "returns logits in bfloat16, not in float32"),
        (lambda z: (z, z), "returns a tuple for two images"),
        (lambda z: z[..., None], r"returns shape \(2, 3, 1\) for two images"),
        (lambda z: torch.cat([z, z[:, :1]], 1), r"returns shape \(2, 4\) for two images, not logits of 3 classes each"),
    ],
)
def test_other_outputs_are_refused(function, message):
    net, x, y = case()
    with pytest.raises(UserError, match=message):
        evaluate(Then(net, function).eval(), x, y, "clean", eps=0.1, num_classes=3)


def test_images_labels_and_eps_that_cannot_be_used():
    net, x, y = case()
    for bad, message in [
        ((x * 255, y, 0.1), r"float images must lie in \[0, 1\]"),
        ((x, y.int(), 0.1), "labels must be int64"),
        ((x, y + 3, 0.1), "labels must be from 0 to 2"),
        ((x[0], y, 0.1), "images must be of shape"),
        ((x, y, 0.0), "eps must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(net, bad[0], bad[1], "clean", eps=bad[2])


def test_attacks_that_disagree_fail_the_gap():
    def of(percent):
        return torch.arange(100) < percent

    assert check_gap({"clean": of(90), "pgd20": of(50), "fgsm": of(70)}) is None
    assert check_gap({"pgd20": of(53), "cw20": of(51), "autoattack": of(48)}).passed
    for masked in ({"pgd20": of(90), "cw20": of(51)}, {"pgd20": of(40), "cw20": of(41), "autoattack": of(15)}):
        assert not check_gap(masked).passed
    assert check_gap({"pgd20": of(90), "pgd50x2": of(50), "autoattack": of(48)}).passed
