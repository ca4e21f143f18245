"""The attacks of an evaluation by name, against float64 references and closed forms."""

import pytest
import torch

from helpers.float64_attacks import ce64, cw64, pgd_float64, scaled64
from helpers.toy_networks import Linear, double, images, labels, small_net
from ltat_fast.attacks import AttackConfig
from ltat_fast.attacks.by_name import correct_under, parse_attacks, start_noise
from ltat_fast.errors import UserError
from ltat_fast.models.frozen import FrozenTwin

EPS = 0.1


class Scale(torch.nn.Module):
    """Multiplies logits by a constant, which does not change the predictions."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


def uint8_images(n, size=6):
    return images(n, size=size).mul(255).to(torch.uint8)


def test_clean_compares_the_prediction_with_the_label():
    net, pixels = small_net().eval(), uint8_images(30)
    y = labels(30)
    expected = net(pixels.double().div(255).float()).argmax(1) == y
    assert torch.equal(correct_under("clean", FrozenTwin(net), pixels, y, EPS, batch_size=7), expected)
    assert 0 < expected.sum() < 30


@pytest.mark.parametrize(
    ("name", "score", "steps", "restarts"),
    [
        ("pgd20", ce64, 20, 1),
        ("pgd3", ce64, 3, 1),
        ("cw20", cw64, 20, 1),
        ("scaled-pgd10", scaled64, 10, 1),
        ("pgd2x4", ce64, 2, 4),
        ("cw2x3", cw64, 2, 3),
    ],
)
def test_each_name_runs_its_attack(name, score, steps, restarts):
    """Compared with PGD in float64. An image must survive every start."""
    net, pixels = small_net(seed=4).eval(), uint8_images(90)
    y = net(pixels / 255).argmax(1)
    survived = []
    for restart in range(restarts):
        noise = start_noise(torch.arange(90), (3, 6, 6), EPS, "cpu", 0, name.removesuffix(f"x{restarts}"), restart)
        start = (pixels.double() / 255 + noise).clamp(0, 1)
        x_adv = pgd_float64(net, pixels.double() / 255, start, score(y), AttackConfig(EPS, EPS / 4, steps))
        survived.append(double(net)(x_adv).argmax(1) == y)
    expected = torch.stack(survived).all(0)
    assert torch.equal(correct_under(name, FrozenTwin(net), pixels, y, EPS), expected)
    assert 0 < expected.sum() < 90
    if restarts > 1:
        assert expected.sum() < survived[0].sum()


def test_fgsm_is_one_step_of_eps_from_the_image():
    net, pixels = small_net(seed=4).eval(), uint8_images(40)
    x, y = pixels.double() / 255, net(pixels / 255).argmax(1)
    x_adv = pgd_float64(net, x, x, ce64(y), AttackConfig(EPS, EPS, 1))
    expected = double(net)(x_adv).argmax(1) == y
    assert torch.equal(correct_under("fgsm", FrozenTwin(net), pixels, y, EPS), expected)
    assert 0 < expected.sum() < 40


def test_more_starts_never_restore_an_image():
    net, pixels = small_net(seed=4), uint8_images(90)
    y = net.eval()(pixels / 255).argmax(1)
    one, three = (correct_under(name, FrozenTwin(net), pixels, y, EPS / 2) for name in ("pgd2", "pgd2x3"))
    assert not (three & ~one).any()


def test_scaled_pgd_works_at_a_logit_scale_where_pgd_fails():
    """The predictions are the same, but logits are 1e5 times larger: plain cross-entropy has no gradient left."""
    net, pixels = small_net(seed=4).eval(), uint8_images(90)
    y = net(pixels / 255).argmax(1)
    plain, scaled = FrozenTwin(net), FrozenTwin(torch.nn.Sequential(net, Scale(1e5)))
    truth = correct_under("pgd20", plain, pixels, y, EPS)
    assert truth.sum() < 80
    assert correct_under("pgd20", scaled, pixels, y, EPS).all()
    assert correct_under("scaled-pgd20", scaled, pixels, y, EPS).sum() <= truth.sum() + 1


def test_start_noise_is_uniform_and_depends_on_the_index():
    indices = torch.tensor([130, 3, 64, 7, 63, 5000])
    noise = start_noise(indices, (3, 4, 5), 0.1, "cpu", 0, "pgd20", 0)
    every = start_noise(torch.arange(256), (3, 4, 5), 0.1, "cpu", 0, "pgd20", 0)
    assert torch.equal(noise[:5], every[indices[:5]])
    assert every.abs().max() <= 0.1
    assert abs(every.mean()) < 0.002
    assert every.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert len(every.flatten().unique()) > 0.99 * every.numel()  # different images have different noise
    for other in ((1, "pgd20", 0), (0, "pgd10", 0), (0, "pgd20", 1)):
        assert not torch.equal(noise, start_noise(indices, (3, 4, 5), 0.1, "cpu", *other))


@pytest.mark.parametrize("name", ["pgd3", "cw3x2"])
def test_the_result_of_an_image_does_not_depend_on_its_batch(name):
    net, pixels = FrozenTwin(small_net(seed=4)), uint8_images(90)
    y = net(pixels / 255).argmax(1)
    whole = correct_under(name, net, pixels, y, EPS)
    assert 0 < whole.sum() < 90
    for batch_size in (90, 64, 17):
        assert torch.equal(correct_under(name, net, pixels, y, EPS, batch_size=batch_size), whole)
    some = torch.tensor([2, 30, 31, 77, 89])
    assert torch.equal(correct_under(name, net, pixels[some], y[some], EPS, indices=some), whole[some])
    parts = [correct_under(name, net, pixels, y, EPS, batch_size=30, part=(r, 2)) for r in (0, 1)]
    assert torch.equal(torch.cat([parts[0][:30], parts[1], parts[0][30:]]), whole)


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
    eps = radius.sort().values[99:101].mean().item()  # between two radii: half of the images survive
    assert eps < 90 / 255  # no pixel is clipped to [0, 1]
    survives = radius > eps
    assert survives.sum() == 100
    for name in ("fgsm", "pgd20", "cw20", "scaled-pgd20", "pgd20x2"):
        assert torch.equal(correct_under(name, net, pixels, y, eps), survives), name


def test_an_attack_repeats_exactly_and_does_not_use_the_global_generator():
    net, pixels, y = FrozenTwin(small_net()), uint8_images(20), labels(20)
    rng = torch.get_rng_state()
    first = correct_under("pgd5", net, pixels, y, EPS, batch_size=8)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(99)
    assert torch.equal(first, correct_under("pgd5", net, pixels, y, EPS, batch_size=8))
    torch.set_rng_state(rng)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["clean", "fgsm", "pgd5", "cw5x2", "scaled-pgd5"])
def test_attacks_run_on_a_gpu(name):
    net, pixels = FrozenTwin(small_net(seed=4).cuda()), uint8_images(90).cuda()
    y = net(pixels / 255).argmax(1)
    whole = correct_under(name, net, pixels, y, EPS)
    assert whole.sum() == 90 if name == "clean" else 0 < whole.sum() < 90
    assert (correct_under(name, net, pixels, y, EPS, batch_size=32) ^ whole).sum() <= 1  # other kernels, other rounding


def test_correct_under_refuses_an_unknown_name():
    net, pixels = FrozenTwin(small_net()), uint8_images(4)
    with pytest.raises(UserError, match=r"unknown attack 'pgd': choose from clean, fgsm"):
        correct_under("pgd", net, pixels, labels(4), EPS)


def test_parse_attacks_returns_each_name_once():
    names = " clean, pgd20,,cw7 ,fgsm,autoattack,pgd20x5,scaled-pgd10,pgd20x1,cw3x12,autoattack-plus,autoattack-rand"
    names += ",apgd-ce,square"
    expected = ["clean", "pgd20", "cw7", "fgsm", "autoattack", "pgd20x5", "scaled-pgd10", "cw3x12"]
    assert parse_attacks(names) == [*expected, "autoattack-plus", "autoattack-rand", "apgd-ce", "square"]


@pytest.mark.parametrize(
    "names",
    [
        *("pgd", "pgd0", "pgd-20", "cw", "PGD20", "clean;pgd20", "apgd", "pgd1.5", "", " , ", "pgd20x", "pgd20x0"),
        *("fgsmx2", "pgd20x5x5", "scaled-cw20", "scaled-pgd", "autoattackx2", "autoattack-std", "pgd20 x5", "worst"),
    ],
)
def test_parse_attacks_refuses_unknown_names(names):
    with pytest.raises(
        UserError, match=r"choose from clean, fgsm, pgd<k>, cw<k>, scaled-pgd<k> \(.*, autoattack-rand$"
    ):
        parse_attacks(names)
