"""GD and GC compared with one backward pass per image in float64, and with closed forms."""

import pytest
import torch
import torch.nn.functional as F

from helpers.toy_networks import Linear, double, images, labels, small_net
from ltat_fast.analysis.alignment import SCALARS, gradient_alignment


def directions(n=12, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def one_gradient(net, image, label, direction, scalar):
    point = image[None].double().requires_grad_()
    logits = double(net).eval()(point)[0]
    value = {
        "ce": logits.logsumexp(0) - logits[label],
        "logit": logits[label],
        "projection": direction.double() @ logits,
    }[scalar]
    value.backward()
    return point.grad.flatten()


def test_against_one_image_at_a_time():
    student, teacher = small_net(seed=0).train(), small_net(seed=1)
    x, y, u = images(), labels(), directions()
    measured = gradient_alignment(student, teacher, x, y, u)
    for scalar in SCALARS:
        for i in range(len(x)):
            a, b = (one_gradient(net, x[i], y[i], u[i], scalar) for net in (student, teacher))
            assert measured["gd"][scalar][i].item() == pytest.approx((a - b).norm().item(), rel=1e-4)
            cosine = (a @ b / a.norm() / b.norm()).item()
            assert measured["gc"][scalar][i].item() == pytest.approx(cosine, rel=1e-4, abs=1e-5)


def test_linear_models_in_closed_form():
    generator = torch.Generator().manual_seed(3)
    w, v = (torch.randn(3, 108, generator=generator) for _ in range(2))
    x, y, u = images(), labels(), directions()
    measured = gradient_alignment(Linear(w), Linear(v), x, y, u)
    errors = [(Linear(m)(x).softmax(1) - F.one_hot(y, 3)).detach() @ m for m in (w, v)]
    expected = {"ce": errors, "logit": [w[y], v[y]], "projection": [u @ w, u @ v]}
    for scalar, (a, b) in expected.items():
        kinds = {"gd": (a - b).norm(dim=1), "gc": F.cosine_similarity(a, b)}
        for kind, value in kinds.items():
            torch.testing.assert_close(measured[kind][scalar].float(), value, atol=1e-5, rtol=1e-4)


def test_a_network_is_aligned_with_itself_and_opposed_to_its_negative():
    net = Linear(torch.randn(3, 108, generator=torch.Generator().manual_seed(0)))
    x, y, u = images(), labels(), directions()
    same = gradient_alignment(net, net, x, y, u)
    opposite = gradient_alignment(net, Linear(-net.weight.detach()), x, y, u)
    for scalar in SCALARS:
        assert same["gd"][scalar].abs().max() == 0
        torch.testing.assert_close(same["gc"][scalar], torch.ones(12, dtype=torch.float64))
    for scalar in ("logit", "projection"):
        torch.testing.assert_close(opposite["gc"][scalar], -torch.ones(12, dtype=torch.float64))


def test_projections_estimate_the_distance_of_the_jacobians():
    generator = torch.Generator().manual_seed(5)
    w, v = (torch.randn(3, 108, generator=generator) for _ in range(2))
    n = 4000
    x, y = images(1).expand(n, -1, -1, -1), labels(1).expand(n)
    squared = gradient_alignment(Linear(w), Linear(v), x, y, directions(n))["gd"]["projection"].square()
    expected = (w - v).square().sum().item()
    assert abs(squared.mean().item() - expected) < 4 * squared.std().item() / n**0.5


def test_a_tiny_gradient_has_a_direction_and_a_zero_gradient_has_none():
    tiny = Linear(1e-15 * torch.ones(3, 108))
    none = Linear(torch.zeros(3, 108))
    x, y, u = images(), labels(), directions()
    other = Linear(torch.ones(3, 108))
    torch.testing.assert_close(gradient_alignment(tiny, other, x, y, u)["gc"]["logit"], torch.ones(12).double())
    assert gradient_alignment(none, other, x, y, u)["gc"]["logit"].abs().max() == 0
