"""The PGD loop against a float64 twin written from the formula, against closed forms, and for what it leaves alone."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from helpers.float64_attacks import ce64, cw64, pgd_float64, scaled64
from helpers.toy_networks import Linear, images, labels, small_net
from ltat_fast.attacks import AttackConfig, cross_entropy, cw_margin, n_fgsm, pgd, scaled_cross_entropy
from ltat_fast.attacks.pgd import attack_loop, make_ascend
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.ops import pgd_init

EPS = 0.1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("objective", "score"), [(cross_entropy, ce64), (cw_margin, cw64), (scaled_cross_entropy, scaled64)]
)
@pytest.mark.parametrize("noise", ["uniform", "gaussian", "none"])
def test_equals_the_formula_in_float64(objective, score, noise):
    net, x, y = small_net(), images(), labels()
    config = AttackConfig(EPS, 0.03, steps=7, noise=noise)
    start = x if noise == "none" else pgd_init(x, EPS, noise, generator=generator(3))
    expected = pgd_float64(net, x, start, score(y), config)
    ours = pgd(net, x, objective(y), config, generator(3))
    # one gradient with the wrong sign anywhere shows as 0.03 or more
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
    assert (ours - x).abs().mean() > EPS / 2


@pytest.mark.parametrize("noise", ["uniform", "gaussian", "none"])
@pytest.mark.parametrize("step_size", [0.01, 0.5])
def test_stays_in_the_ball_and_in_the_range(noise, step_size):
    x, y = images(), labels()
    x_adv = pgd(small_net(), x, cross_entropy(y), AttackConfig(EPS, step_size, 4, noise), generator())
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_a_scale_per_image_is_a_ball_and_a_step_per_image():
    net, x, y = small_net(), images(4), labels(4)
    config, scale = AttackConfig(EPS, 0.03, steps=3), torch.tensor([0.0, 0.5, 1.0, 2.0])
    ascend = make_ascend(FrozenTwin(net), lambda point, logits: cross_entropy(y)(point, logits), config)
    together = attack_loop(x, ascend, config, generator(3), scale=scale)
    start = pgd_init(x, EPS, generator=generator(3))
    for i, factor in enumerate(scale.tolist()):
        # The start noise has the plain eps, and the first step projects it.
        one = AttackConfig(EPS * factor, 0.03 * factor, 3)
        expected = pgd(net, x[i : i + 1], cross_entropy(y[i : i + 1]), one, start=start[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], expected, atol=1e-6, rtol=0)
    assert torch.equal(together[0], x[0])
    assert (together[3] - x[3]).abs().max() > EPS


def test_n_fgsm_is_noise_of_twice_the_radius_and_one_step_without_projection():
    net, x, y = small_net(), images(), labels()
    ours = pgd(net, x, cross_entropy(y), n_fgsm(EPS), generator(3))
    start = pgd_init(x, 2 * EPS, "uniform", generator=generator(3)).double().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(net).double().eval()(start), y), start)
    torch.testing.assert_close(ours.double(), (start + EPS * grad.sign()).clamp(0, 1), atol=1e-6, rtol=0)
    assert 1.9 * EPS < (start - x).abs().max() <= 2 * EPS + 1e-6
    assert 2 * EPS < (ours - x).abs().max() <= 3 * EPS + 1e-6


def test_a_budget_scales_noise_and_step_of_n_fgsm():
    net, x, y = small_net(), images(3), labels(3)
    scale, config = torch.tensor([0.0, 0.3, 2.0]), n_fgsm(EPS)
    ascend = make_ascend(FrozenTwin(net), lambda point, logits: cross_entropy(y)(point, logits), config)
    ours = attack_loop(x, ascend, config, generator(3), scale=scale)
    start = pgd_init(x, 2 * EPS * scale, "uniform", generator=generator(3)).double().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(net).double().eval()(start), y), start)
    expected = (start + EPS * scale.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(ours[0], x[0])


def test_leaves_everything_else_as_it_was():
    net, x, y = small_net().train(), images(), labels()
    net[0].weight.requires_grad_(False)
    net[6].weight.grad = torch.full_like(net[6].weight, 7.0)
    before, x_before, flags = copy.deepcopy(net.state_dict()), x.clone(), [p.requires_grad for p in net.parameters()]
    rng = torch.get_rng_state()
    pgd(net, x, cross_entropy(y), AttackConfig(EPS, 0.03, 3), generator())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, x_before)
    assert not x.requires_grad
    assert all(module.training for module in net.modules())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["6.weight"]
    assert (net[6].weight.grad == 7).all()


def test_a_model_in_train_mode_is_attacked_in_eval_mode():
    x, y, config = images(), labels(), AttackConfig(EPS, 0.03, 5)
    attacked = [pgd(net, x, cross_entropy(y), config, generator()) for net in (small_net().train(), small_net().eval())]
    assert torch.equal(*attacked)


def test_a_frozen_twin_and_its_model_give_the_same_examples():
    net, x, y = small_net(), images(), labels()
    plain = pgd(net, x, cross_entropy(y), AttackConfig(EPS, 0.03, 5), generator())
    folded = pgd(FrozenTwin(net, fold_bn=True), x, cross_entropy(y), AttackConfig(EPS, 0.03, 5), generator())
    torch.testing.assert_close(plain, folded, atol=1e-5, rtol=0)


def test_the_seed_decides():
    net, x, y, config = small_net(), images(), labels(), AttackConfig(EPS, 0.01, 2)
    first, again, other = (pgd(net, x, cross_entropy(y), config, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_steps_never_help_the_defender():
    """On a linear classifier cross-entropy is convex in the image, so no projected sign step can lower it."""
    torch.manual_seed(0)
    net, x, y = Linear(torch.randn(5, 27)), images(20, size=3), labels(20, 5)
    losses = [
        F.cross_entropy(net(pgd(net, x, cross_entropy(y), AttackConfig(EPS, 0.013, k, "none"))), y, reduction="none")
        for k in range(12)
    ]
    for weaker, stronger in itertools.pairwise(losses):
        assert (stronger >= weaker - 1e-5).all()
    assert (losses[-1] > losses[0] + 0.1).all()


def test_starts_where_it_is_told_and_leaves_that_alone():
    net, x, y, config = small_net(), images(), labels(), AttackConfig(EPS, 0.03, 4)
    start = pgd_init(x, EPS, generator=generator(5))
    before = start.clone()
    ours = pgd(net, x, cross_entropy(y), config, start=start)
    assert torch.equal(ours, pgd(net, x, cross_entropy(y), config, generator(5)))
    assert torch.equal(start, before)


def test_fgsm_has_a_closed_form_on_a_linear_model():
    torch.manual_seed(0)
    weight = torch.randn(2, 27)
    x, y = images(8, size=3), torch.arange(8) % 2
    x_adv = pgd(Linear(weight), x, cross_entropy(y), AttackConfig(EPS, EPS, 1, "none"))
    towards_the_other = (weight[1 - y] - weight[y]).sign().view_as(x)
    torch.testing.assert_close(x_adv, (x + EPS * towards_the_other).clamp(0, 1))


def test_a_planted_adversarial_example_is_found():
    """One pixel decides, and it takes 0.08 of it: an eps of 0.1 must break the model, one of 0.05 must not."""
    weight = torch.zeros(2, 27)
    weight[1, 13] = 100.0

    def net(x):
        return Linear(weight)(x - 0.08)

    x, y = torch.full((4, 3, 3, 3), 0.5), torch.zeros(4, dtype=torch.long)
    for eps, broken in ((0.1, True), (0.05, False)):
        module = torch.nn.Module()
        module.forward = net
        x_adv = pgd(module, x, cross_entropy(y), AttackConfig(eps, eps / 4, 20), generator())
        assert (net(x_adv).argmax(1) != y).eq(broken).all()


def test_an_eps_of_one_breaks_everything():
    torch.manual_seed(0)
    net, x = Linear(torch.randn(4, 27)), images(30, size=3)
    y = net(x).argmax(1)
    x_adv = pgd(net, x, cross_entropy(y), AttackConfig(1.0, 0.25, 20), generator())
    assert (net(x_adv).argmax(1) != y).all()
