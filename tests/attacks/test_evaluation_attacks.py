"""The attacks of an evaluation by name: what each name means, and that accuracies are those of the attack."""

import pytest
import torch
from toys import Linear, images, labels, small_net

from ltat_fast import seeding
from ltat_fast.attacks import AttackConfig, cross_entropy, cw_margin, pgd
from ltat_fast.attacks.evaluation import correct_under, parse_attacks
from ltat_fast.errors import UserError
from ltat_fast.models.frozen import FrozenTwin

EPS = 0.1


def uint8_images(n, size=6):
    return images(n, size=size).mul(255).to(torch.uint8)


def test_clean_is_the_prediction():
    net, pixels = small_net().eval(), uint8_images(30)
    y = labels(30)
    expected = net(pixels.double().div(255).float()).argmax(1) == y
    assert torch.equal(correct_under("clean", FrozenTwin(net), pixels, y, EPS, batch_size=7), expected)
    assert 0 < expected.sum() < 30


@pytest.mark.parametrize(
    ("name", "objective", "config"),
    [
        ("fgsm", cross_entropy, AttackConfig(EPS, EPS, 1, "none")),
        ("pgd20", cross_entropy, AttackConfig(EPS, EPS / 4, 20)),
        ("pgd3", cross_entropy, AttackConfig(EPS, EPS / 4, 3)),
        ("cw20", cw_margin, AttackConfig(EPS, EPS / 4, 20)),
    ],
)
def test_names_mean_attacks(name, objective, config):
    net, pixels = small_net(seed=4).eval(), uint8_images(24)
    y = net(pixels / 255).argmax(1)
    generator = seeding.stream("cpu", 0, name, 0)
    expected = net(pgd(net, pixels / 255, objective(y), config, generator)).argmax(1) == y
    assert torch.equal(correct_under(name, FrozenTwin(net), pixels, y, EPS), expected)
    assert not expected.all()


def test_robust_accuracy_of_a_linear_model_is_known():
    """Two classes: a point survives every attack iff its margin exceeds eps times the L1 norm of the difference."""
    torch.manual_seed(0)
    weight = torch.randn(2, 27)
    net = FrozenTwin(Linear(weight))
    pixels = torch.randint(90, 165, (200, 3, 3, 3), dtype=torch.uint8)
    logits = net(pixels / 255)
    y = logits.argmax(1)
    margin = logits.amax(1) - logits.amin(1)
    radius = margin / (weight[0] - weight[1]).abs().sum()
    eps = radius.sort().values[99:101].mean().item()  # between two points: half of them survive
    assert eps < 90 / 255  # no pixel meets the walls of [0, 1]
    survives = radius > eps
    assert survives.sum() == 100
    for name in ("fgsm", "pgd20", "cw20"):
        assert torch.equal(correct_under(name, net, pixels, y, eps), survives), name


def test_repeats_exactly_and_leaves_the_global_generator_alone():
    net, pixels, y = FrozenTwin(small_net()), uint8_images(20), labels(20)
    rng = torch.get_rng_state()
    first = correct_under("pgd5", net, pixels, y, EPS, batch_size=8)
    torch.manual_seed(99)
    assert torch.equal(first, correct_under("pgd5", net, pixels, y, EPS, batch_size=8))
    torch.set_rng_state(rng)


def test_parse_attacks():
    assert parse_attacks(" clean, pgd20,,cw7 ,fgsm,autoattack") == ["clean", "pgd20", "cw7", "fgsm", "autoattack"]


@pytest.mark.parametrize("names", ["pgd", "pgd0", "pgd-20", "cw", "PGD20", "clean;pgd20", "apgd", "pgd1.5", "", " , "])
def test_parse_attacks_refuses(names):
    with pytest.raises(UserError, match="choose from clean, fgsm, pgd<steps>, cw<steps>, autoattack"):
        parse_attacks(names)
