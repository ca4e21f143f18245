"""Taylor remainders and distances of outputs for networks where both have a closed form."""

import pytest
import torch
from torch import nn

from helpers.toy_networks import Linear, double, images, small_net
from ltat_fast.analysis.linearity import jvp, jvp_by_double_backward, output_distance, remainder
from ltat_fast.models import ARCHS, build_model


def noise_like(x, eps=0.1, seed=9):
    return (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(x.dtype) * eps


class Quadratic(nn.Module):
    """logits = (w_k . x)^2: the remainder of its expansion is (w_k . e)^2."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return (x.flatten(1) @ self.weight.T).square()


def test_a_linear_model_has_no_remainder():
    x = images().double()
    net = Linear(torch.randn(3, 108, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    shares = remainder(net, x, noise_like(x))
    assert shares["logits"].max() < 1e-13
    assert shares["probabilities"].min() > 1e-6, "the softmax of a linear model is not linear"


def test_a_quadratic_model_has_a_known_remainder():
    x = images().double()
    noise = noise_like(x)
    weight = torch.randn(3, 108, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    missed = (noise.flatten(1) @ weight.T).square().norm(dim=1)
    whole = ((x + noise).flatten(1) @ weight.T).square().norm(dim=1)
    torch.testing.assert_close(remainder(Quadratic(weight), x, noise)["logits"], missed / whole)


def test_probabilities_against_the_whole_jacobian():
    net, x = small_net(), images(4).double()
    reference, noise = double(net).eval(), noise_like(x)
    measured = remainder(double(net), x, noise)["probabilities"]
    for i in range(len(x)):
        probabilities = lambda image: reference(image[None])[0].softmax(0)  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(probabilities, x[i]).flatten(1)
        after = probabilities(x[i] + noise[i])
        missed = after - probabilities(x[i]) - jacobian @ noise[i].flatten()
        assert measured[i].item() == pytest.approx((missed.norm() / after.norm()).item(), rel=1e-9)


def test_the_remainder_is_of_second_order():
    x = images().double()
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    whole, half = (remainder(net, x, noise_like(x, eps))["logits"] for eps in (2e-3, 1e-3))
    torch.testing.assert_close(whole / half, torch.full_like(whole, 4), atol=0.2, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_forward_mode_works_for_every_network(arch, monkeypatch):
    torch.manual_seed(0)
    net, x = build_model(arch, 3).eval(), images(2, size=8)
    tangent = noise_like(x)
    expected = jvp_by_double_backward(net, x, tangent)
    monkeypatch.setattr("ltat_fast.analysis.linearity.jvp_by_double_backward", None)
    torch.testing.assert_close(jvp(net, x, tangent), expected, atol=1e-5, rtol=1e-4)


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_an_operator_without_forward_mode_uses_two_backward_passes():
    x = images().double()
    value, derivative = jvp(WithoutForwardMode.apply, x, noise_like(x))
    torch.testing.assert_close(value, x.square())
    torch.testing.assert_close(derivative, 2 * x * noise_like(x))


def test_a_mistake_is_not_hidden_by_the_fallback():
    with pytest.raises(RuntimeError, match="shape"):
        jvp(lambda x: x @ torch.ones(3, 3), torch.ones(2, 5), torch.ones(2, 5))


def test_distance_of_outputs():
    student, teacher, x = small_net(seed=0).train(), small_net(seed=1), images()
    measured = output_distance(student, teacher, x)
    a, b = (double(net).eval()(x.double()).detach().numpy() for net in (student, teacher))
    torch.testing.assert_close(measured["logits"].double().numpy(), ((a - b) ** 2).sum(1) ** 0.5, atol=1e-5, rtol=1e-4)
    a, b = (torch.from_numpy(v).exp().numpy() for v in (a, b))
    a, b = (v / v.sum(1, keepdims=True) for v in (a, b))
    expected = ((a - b) ** 2).sum(1) ** 0.5
    torch.testing.assert_close(measured["probabilities"].double().numpy(), expected, atol=1e-5, rtol=1e-4)
    assert student.training
