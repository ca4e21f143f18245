"""Attribution and its Gini values, compared with loops in float64."""

import numpy as np
import pytest
import torch

from helpers.toy_networks import Linear, double, images, labels, small_net
from ltat_fast.analysis.inequality import default_block, gini, global_gini, regional_gini, saliency


def pairwise_gini(values: np.ndarray) -> float:
    """Half the mean absolute difference of all pairs, divided by the mean."""
    return np.abs(values[:, None] - values[None, :]).mean() / (2 * values.mean())


def test_saliency_of_a_linear_model_is_its_weight():
    weight = torch.randn(3, 3 * 36, generator=torch.Generator().manual_seed(0))
    y = labels()
    torch.testing.assert_close(saliency(Linear(weight), images(), y), weight[y].view(-1, 3, 6, 6))


def test_saliency_of_an_image_does_not_depend_on_the_batch():
    net, x, y = small_net().train(), images(), labels()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    measured = saliency(net, x, y)
    reference = double(net).eval()
    for i in range(len(x)):
        point = x[i : i + 1].double().requires_grad_()
        reference(point)[0, y[i]].backward()
        torch.testing.assert_close(measured[i].double(), point.grad[0], atol=1e-6, rtol=1e-4)
    assert measured.dtype == torch.float32
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    for name, t in net.state_dict().items():
        torch.testing.assert_close(t, before[name], atol=0, rtol=0)


def test_gini_is_half_the_relative_mean_difference():
    values = np.abs(np.random.RandomState(0).standard_cauchy((20, 37)))
    expected = [pairwise_gini(row) for row in values]
    np.testing.assert_allclose(gini(torch.from_numpy(values)).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(gini(torch.from_numpy(values).float()).numpy(), expected, rtol=1e-5)


def test_bounds():
    equal, one, none = torch.full((7,), 0.3), torch.tensor([0, 0, 5.0, 0, 0, 0, 0]), torch.zeros(7)
    torch.testing.assert_close(gini(torch.stack([equal, one, none])), torch.tensor([0, 6 / 7, 0]), atol=1e-7, rtol=0)


def test_negative_values_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        gini(torch.tensor([[1.0, -1.0]]))


def test_global_gini_uses_absolute_values_of_every_channel():
    attribution = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [pairwise_gini(np.abs(a.numpy()).ravel()) for a in attribution]
    np.testing.assert_allclose(global_gini(attribution).numpy(), expected, rtol=1e-12)


def blocks(a: np.ndarray, block: int) -> np.ndarray:
    """Sum over each block of a map ``(H, W)``; blocks at the edge are smaller."""
    rows, columns = (range(0, size, block) for size in a.shape)
    return np.array([[a[i : i + block, j : j + block].sum() for j in columns] for i in rows])


@pytest.mark.parametrize(
    ("size", "block"), [((8, 8), 2), ((8, 8), None), ((32, 32), None), ((35, 40), 16), ((9, 6), 4)]
)
def test_regional_gini(size, block):
    attribution = np.random.RandomState(1).standard_normal((4, 3, *size))
    magnitude = np.abs(attribution)
    side = block or {8: 2, 32: 16}[size[0]]
    padding = [(0, 0), (0, -size[0] % side), (0, -size[1] % side)]
    reflected = [np.pad(m, padding, mode="reflect") for m in magnitude]
    pooled = [pairwise_gini(np.stack([blocks(c, side) for c in m]).ravel()) for m in reflected]
    side = block or {8: 2, 32: 4}[size[0]]
    summed = [pairwise_gini(blocks(m.sum(0), side).ravel()) for m in magnitude]
    given = torch.from_numpy(attribution)
    np.testing.assert_allclose(regional_gini(given, block).numpy(), pooled, rtol=1e-12)
    np.testing.assert_allclose(regional_gini(given, block, "block-sum").numpy(), summed, rtol=1e-12)


def test_an_image_smaller_than_the_reflection_is_refused():
    with pytest.raises(ValueError, match="8x8 cannot be reflected to blocks of 16x16"):
        regional_gini(torch.ones(1, 1, 8, 8), 16)


def test_published_blocks():
    assert [default_block(size) for size in (224, 64, 32)] == [16, 16, 16]
    assert [default_block(size, "block-sum") for size in (224, 32)] == [16, 4]
    assert [default_block(size, form) for size in (8, 6) for form in ("pooled", "block-sum")] == [2] * 4
