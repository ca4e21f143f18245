"""A model that is broken in one way fails the check for it and no other; a sound model passes all checks."""

import copy

import pytest
import torch
from torch import nn

from helpers.toy_networks import Linear, images, small_net
from ltat_fast.attacks import checks
from ltat_fast.attacks.checks import run_checks

EPS = 0.1
CHECKS = ["range", "invariance", "logits", "bounded", "gradients", "steps", "unbounded", "planted"]


def failed(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[str]:
    found = run_checks(model, x, y, EPS)
    assert [check.name for check in found] == CHECKS
    return [check.name for check in found if not check.passed]


def sound(seed: int = 0) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """Return a network with batch norm, images, and labels of which it predicts most correctly."""
    net, x = small_net(seed=seed).eval(), images(66)
    with torch.no_grad():
        net[6].bias -= net(x).mean(0)  # otherwise one class would have nearly all images
        y = net(x).argmax(1)
    y[::13] = (y[::13] + 1) % 3
    return net, x, y


class Then(nn.Module):
    """Applies ``function`` to the outputs of ``net``."""

    def __init__(self, net: nn.Module, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net(x))


class Before(Then):
    """Applies ``function`` to the images, then ``net``."""

    def forward(self, x):
        return self.net(self.function(x))


class Liar(nn.Module):
    """A classifier with two classes whose gradient need not be the derivative of its logits.

    It separates the classes by t, the mean of (x - 0.5) * signs. claim: maps t and the largest distance of a pixel from
    0.5, both ``(B,)``, to the logit of class 1 and to the slope that autograd reports.
    """

    def __init__(self, signs: torch.Tensor, claim):
        super().__init__()
        self.register_buffer("signs", signs)
        self.claim = claim

    def forward(self, x):
        moved = (x - 0.5).flatten(1)
        t = (moved * self.signs).mean(1)
        value, slope = self.claim(t.detach(), moved.detach().abs().amax(1))
        z = value + slope * (t - t.detach())
        return torch.stack([-z, z], 1)


def liar(distance: float, claim) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a Liar, images of both classes with every pixel at about ``distance`` from 0.5, and their labels."""
    signs = torch.randint(0, 2, (768,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    y = torch.arange(64) % 2
    x = 0.5 + distance * torch.linspace(0.98, 1.02, 64)[:, None] * (2.0 * y[:, None] - 1) * signs
    return Liar(signs, claim).eval(), x.view(64, 3, 16, 16), y


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_model_passes_and_is_not_changed(seed):
    net, x, y = sound(seed)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert failed(net, x, y) == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.gpu
def test_a_sound_model_passes_on_a_gpu():
    net, x, y = sound()
    assert failed(net.cuda(), x.cuda(), y.cuda()) == []


def test_sound_gradients_pass_at_any_distance():
    for distance in (0.05, 0.2):
        assert failed(*liar(distance, lambda t, far: (t, torch.ones_like(t)))) == []


def test_batch_norm_in_train_mode_fails_invariance():
    net, x, y = sound()
    net.train()
    before = copy.deepcopy(net.state_dict())
    assert failed(net, x, y) == ["invariance"]
    assert checks.check_invariance(net, x).value > 0.01
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training


def test_train_mode_fails_invariance_even_if_it_changes_no_logit():
    net = Linear(torch.randn(3, 108)).train()
    found = checks.check_invariance(net, images(20))
    assert not found.passed
    assert found.value < 1e-6
    assert "1 modules are in train mode" in found.detail


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z + 0.05 * torch.randn_like(z),
        lambda z: z + torch.arange(len(z))[:, None] * 0.01,
        lambda z: z - z.mean(0),
    ],
    ids=["random", "order", "batch"],
)
def test_logits_that_depend_on_more_than_the_image_fail_invariance(function):
    net, x, _ = sound()
    assert not checks.check_invariance(Then(net, function).eval(), x).passed


@pytest.mark.parametrize("outputs", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_probabilities_instead_of_logits_fail_logits(outputs):
    net, x, y = sound()
    assert failed(Then(net, outputs).eval(), x, y) == ["logits"]


def test_images_outside_0_to_1_fail_range():
    net, x, y = sound()
    assert failed(Before(net, lambda x: x / 255).eval(), x * 255, y) == ["range"]
    found = checks.check_range((x - 0.5) / 0.25)
    assert (found.passed, found.value) == (False, 2.0)


def test_a_saturated_softmax_fails_gradients():
    net, x, y = sound()
    assert failed(Then(net, lambda z: 1e5 * z).eval(), x, y) == ["gradients"]
    assert checks.check_gradients(Then(net, lambda z: 1e5 * z).eval(), x, y).value > 50


def test_rounding_fails_gradients_and_planted():
    net, x, y = sound()
    rounding = Before(net, lambda x: (x * 3).round() / 3).eval()
    assert {"gradients", "planted"} <= set(failed(rounding, x, y))
    assert checks.check_gradients(rounding, x, y).value == 100
    infinite = Before(net, lambda x: x + 0 * (x - x).sqrt()).eval()
    assert not checks.check_gradients(infinite, x, y).passed


def test_an_attack_that_overshoots_fails_steps():
    """Adversarial examples lie a quarter of the way along the gradient, and there are none at its end."""

    def claim(t, far):
        hidden = (t.abs() > 0.165) & (t.abs() < 0.185)
        return torch.where(hidden, -t, t), torch.ones_like(t)

    model, x, y = liar(0.2, claim)
    assert failed(model, x, y) == ["steps"]
    assert checks.check_steps(model, x, y, EPS).value == 100


def test_wrong_gradients_far_from_the_images_fail_unbounded():
    model, x, y = liar(0.05, lambda t, far: (t, torch.where(far > 0.2, -1.0, 1.0)))
    assert failed(model, x, y) == ["unbounded"]
    assert checks.check_unbounded(model, x, y).value == 100


def test_wrong_gradients_in_the_ball_fail_planted():
    """A planted adversarial example exists, and the attack moves away from it."""
    model, x, y = liar(0.05, lambda t, far: (t, torch.where(far > 0.2, 1.0, -1.0)))
    assert failed(model, x, y) == ["planted"]
    assert checks.check_planted(model, x, EPS).value == 0


def test_planted_examples_exist_and_noise_seldom_finds_them():
    """On a linear model PGD always reaches 0.9 of the best of 16 corners."""
    net, x = Linear(torch.randn(2, 108, generator=torch.Generator().manual_seed(0))), 0.5 + 0 * images(40)
    found = checks.check_planted(net, x, EPS)
    assert (found.passed, found.value) == (True, 100.0)
    assert float(found.detail.rsplit("by noise: ")[1].removesuffix(" %")) <= 10
    flat = Linear(torch.zeros(2, 108))
    assert checks.check_planted(flat, x, EPS).value == 0


def test_checks_take_any_module_in_any_mode():
    """The checks that attack use eval mode, and the module keeps its mode."""
    net, x, y = sound()
    expected = run_checks(net, x, y, EPS)
    net.train()
    found = [
        checks.check_logits(net, x),
        checks.check_bounded(net, x),
        checks.check_gradients(net, x, y),
        checks.check_steps(net, x, y, EPS),
        checks.check_unbounded(net, x, y),
        checks.check_planted(net, x, EPS),
    ]
    assert found == expected[2:]
    assert net.training


@pytest.mark.parametrize("bounded", [torch.tanh, torch.sigmoid, lambda z: z.clamp(-8, 8)])
def test_outputs_that_pile_up_at_a_bound_fail_bounded(bounded):
    net, x, _ = sound()
    confident = Then(net, lambda z: bounded(5000 * z)).eval()
    assert not checks.check_bounded(confident, x).passed


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 10 * gradient.abs().amax() * torch.randn_like(gradient)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient if len(gradient) <= 66 else 0 * gradient


@pytest.mark.parametrize("function", [_Noise.apply, _Masked.apply], ids=["noise", "large batches"])
def test_gradients_that_change_fail_gradients(function):
    net, x, y = sound()
    assert not checks.check_gradients(Before(net, function).eval(), x, y, batch_size=200).passed
    assert checks.check_gradients(net, x, y, batch_size=200).passed


def test_logits_that_change_in_a_large_batch_fail_invariance():
    net, x, _ = sound()
    large = Then(net, lambda z: z if len(z) <= 66 else -z).eval()
    assert checks.check_invariance(large, x).passed
    assert not checks.check_invariance(large, x, batch_size=200).passed
