"""Accuracies by group and class against NumPy written out, and which images a limit picks."""

import numpy as np
import pytest
import torch
from toys import Linear

from ltat_fast.engine.evaluation import accuracies, evaluate, spread

GROUPS = {"head": [0, 1], "medium": [2], "tail": [3], "nobody": [4]}


def test_accuracies_by_group_and_class():
    rng = np.random.RandomState(0)
    y = rng.randint(0, 4, 57)
    correct = rng.rand(57) < 0.6
    result = accuracies(torch.from_numpy(correct), torch.from_numpy(y), GROUPS, 5)

    def percent(classes):
        hits = [c for c, label in zip(correct, y, strict=True) if label in classes]
        return 100 * sum(hits) / len(hits)

    assert result["all"] == pytest.approx(100 * correct.sum() / 57)
    for group in ("head", "medium", "tail"):
        assert result[group] == pytest.approx(percent(GROUPS[group])), group
    assert result["nobody"] is None
    assert result["per_class"] == [*(pytest.approx(percent([c])) for c in range(4)), None]
    assert result["images"] == 57
    assert set(result) == {"all", *GROUPS, "per_class", "images"}


def test_a_limit_is_spread_over_the_classes():
    y = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 100))
    chosen = spread(y, 50)
    assert np.bincount(y[chosen], minlength=10).tolist() == [5] * 10
    assert (np.diff(chosen) > 0).all()  # distinct, in the order of the set
    assert np.array_equal(chosen, spread(y, 50))


@pytest.mark.parametrize("limit", [None, 7, 8, 1000])
def test_without_a_limit_all_images_stay_in_order(limit):
    y = np.array([2, 0, 1, 0, 2, 1, 0])
    assert np.array_equal(spread(y, limit), np.arange(7))


@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_a_limit_is_met_exactly(limit):
    assert len(set(spread(np.array([2, 0, 1, 0, 2, 1, 0]), limit).tolist())) == limit


def test_evaluate_reports_every_attack_with_its_own_limit():
    torch.manual_seed(0)
    net = Linear(torch.randn(3, 27)).train()
    pixels = torch.randint(0, 256, (60, 3, 3, 3), dtype=torch.uint8)
    with torch.no_grad():
        y = net(pixels / 255).argmax(1)
    y[:15] = (y[:15] + 1) % 3  # a quarter is wrong from the start
    said = []
    results = evaluate(
        net,
        pixels,
        y,
        ["clean", "pgd5"],
        {"tail": [2]},
        3,
        0.05,
        batch_size=16,
        limits={"default": None, "pgd5": 30},
        say=said.append,
    )
    assert list(results) == ["clean", "pgd5"]
    assert results["clean"]["all"] == 75.0
    assert (results["clean"]["images"], results["pgd5"]["images"]) == (60, 30)
    tail_is_right = (net(pixels / 255).argmax(1) == y)[y == 2]
    assert results["clean"]["tail"] == pytest.approx(100 * tail_is_right.float().mean().item())
    assert 0 < results["pgd5"]["all"] < 75
    assert said == [f"  {name}: {r['all']:.2f} % of {r['images']} images" for name, r in results.items()]
    assert net.training
