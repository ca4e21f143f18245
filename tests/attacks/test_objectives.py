"""Attack objectives against their formulas in NumPy."""

import numpy as np
import torch

from ltat_fast.attacks import cross_entropy, cw_margin


def batch():
    torch.manual_seed(0)
    logits = 3 * torch.randn(9, 5)
    return logits.requires_grad_(), torch.arange(9) % 5


def test_cross_entropy_is_summed_and_takes_raw_logits():
    logits, y = batch()
    z = logits.detach().double().numpy()
    expected = sum(np.log(np.exp(row).sum()) - row[c] for row, c in zip(z, y.tolist(), strict=True))
    np.testing.assert_allclose(cross_entropy(y)(None, logits).item(), expected, rtol=1e-6)


def test_cw_margin_and_its_gradient():
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
