"""Attack objectives against their formulas in NumPy."""

import numpy as np
import torch

from ltat_fast.attacks import cross_entropy, cw_margin, scaled_cross_entropy


def batch():
    torch.manual_seed(0)
    logits = 3 * torch.randn(9, 5)
    return logits.requires_grad_(), torch.arange(9) % 5


def test_cross_entropy_is_summed_and_takes_raw_logits():
    logits, y = batch()
    z = logits.detach().double().numpy()
    expected = sum(np.log(np.exp(row).sum()) - row[c] for row, c in zip(z, y.tolist(), strict=True))
    np.testing.assert_allclose(cross_entropy(y)(None, logits).item(), expected, rtol=1e-6)


def test_cw_margin_and_its_gradient_equal_the_formula():
    logits, y = batch()
    z, c = logits.detach().double().numpy(), y.numpy()
    wrong = np.where(np.arange(5) == c[:, None], -np.inf, z)
    value = cw_margin(y)(None, logits)
    np.testing.assert_allclose(value.item(), (wrong.max(1) - z[np.arange(9), c]).sum(), rtol=1e-6)
    value.backward()
    expected = np.zeros_like(z)
    expected[np.arange(9), wrong.argmax(1)] += 1
    expected[np.arange(9), c] -= 1
    np.testing.assert_array_equal(logits.grad.numpy(), expected)


def test_scaled_cross_entropy_and_its_gradient_equal_the_formula():
    logits, y = batch()
    z, c = logits.detach().double().numpy(), y.numpy()
    gap = np.diff(np.sort(z, 1)[:, -2:], axis=1)
    p = np.exp(z / gap) / np.exp(z / gap).sum(1, keepdims=True)
    value = scaled_cross_entropy(y)(None, logits)
    np.testing.assert_allclose(value.item(), -np.log(p[np.arange(9), c]).sum(), rtol=1e-5)
    value.backward()
    np.testing.assert_allclose(logits.grad.numpy(), (p - np.eye(5)[c]) / gap, rtol=1e-4, atol=1e-6)


def test_scaled_cross_entropy_has_a_gradient_at_confident_logits():
    """Plain cross-entropy has none with a margin of 150. Two equal logits are handled too."""
    for factor in (1.0, 1e4, 1e-4):
        logits = (factor * torch.tensor([[150.0, 0.0, -5.0], [2.0, 2.0, 1.0]])).requires_grad_()
        scaled_cross_entropy(torch.tensor([0, 0]))(None, logits).backward()
        assert logits.grad.isfinite().all()
        assert ((logits.grad[:, 0] < 0) & (logits.grad[:, 1] > 0)).all()
    plain = torch.tensor([[150.0, 0.0, -5.0]], requires_grad=True)
    cross_entropy(torch.tensor([0]))(None, plain).backward()
    assert (plain.grad == 0).all()
