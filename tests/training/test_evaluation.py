"""Accuracies by group and class against NumPy written out, and which images a limit picks."""

import numpy as np
import pytest
import torch

from helpers.toy_networks import Linear
from ltat_fast.runs.metrics import accuracies, pack, spread, unpack, worst_case
from ltat_fast.training.evaluation import check, evaluate

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


def tf32() -> list[bool]:
    return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]


def allow_tf32(cudnn: bool, matmul: bool) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


@pytest.fixture
def tf32_restored():
    before = tf32()
    yield
    allow_tf32(*before)


@pytest.mark.usefixtures("tf32_restored")
@pytest.mark.parametrize("allowed", [[True, True], [True, False], [False, False]])
def test_no_tf32_inside_and_as_before_outside(allowed):
    net, seen = Linear(torch.randn(3, 27)), []
    net.register_forward_hook(lambda *_: seen.append(tf32()))
    pixels, y = torch.randint(0, 256, (8, 3, 3, 3), dtype=torch.uint8), torch.arange(8) % 3
    allow_tf32(*allowed)
    evaluate(net, pixels, y, ["clean", "pgd1"], {}, 3, 0.05, batch_size=8)
    assert len(seen) == 3  # clean, and PGD's step and its end
    check(net, pixels, y, 0.05, lambda text: None)
    assert len(seen) > 3
    assert not any(map(any, seen))
    assert tf32() == allowed


@pytest.mark.parametrize("count", [0, 1, 8, 15, 1000])
def test_which_images_were_correct_fits_in_hexadecimal(count):
    bits = np.random.RandomState(0).rand(count) < 0.4
    text = pack(bits)
    assert len(text) == 2 * ((count + 7) // 8)
    assert np.array_equal(unpack(text, count), bits)
    assert pack(np.array([True, False, True, True, False, False, False, True, True])) == "b180"
    with pytest.raises(ValueError, match="do not hold"):
        unpack(text + "ff", count)


def test_the_worst_case_counts_an_image_once_it_falls_to_any_attack():
    """Against plain loops, with limits that kept other images from each attack."""
    torch.manual_seed(0)
    net = Linear(torch.randn(3, 27))
    pixels = torch.randint(90, 166, (90, 3, 3, 3), dtype=torch.uint8)
    with torch.no_grad():
        y = net(pixels / 255).argmax(1)
    y[:9] = (y[:9] + 1) % 3
    attacks = ["clean", "pgd1", "cw3", "fgsm"]
    groups = {"tail": [2]}
    results = evaluate(
        net, pixels, y, attacks, groups, 3, 0.02, batch_size=40, limits={"default": None, "cw3": 60, "fgsm": 44}
    )
    assert ["chosen" in results[name] for name in attacks] == [False, False, True, True]
    right = {name: {} for name in attacks}
    for name, result in results.items():
        bits = bin(int("1" + result["correct"], 16))[3:]
        limit = {"cw3": 60, "fgsm": 44}.get(name)
        right[name] = {int(i): bit == "1" for i, bit in zip(spread(y.numpy(), limit), bits, strict=False)}
        assert 100 * sum(right[name].values()) / len(right[name]) == pytest.approx(result["all"])
    seen = [i for i in range(90) if all(i in right[name] for name in attacks)]
    survivors = [i for i in seen if all(right[name][i] for name in attacks)]
    worst = worst_case(results, y, groups, 3)
    assert 0 < len(seen) < 44
    assert 0 < len(survivors) < min(sum(right[name][i] for i in seen) for name in ("clean", "pgd1"))
    assert worst["attacks"] == attacks
    assert worst["images"] == len(seen)
    assert worst["all"] == pytest.approx(100 * len(survivors) / len(seen))
    for c in range(3):
        mine = [i for i in seen if y[i] == c]
        expected = 100 * sum(i in survivors for i in mine) / len(mine)
        assert worst["per_class"][c] == pytest.approx(expected)
    assert worst["tail"] == worst["per_class"][2]


def test_a_limit_of_one_attack_is_within_that_of_all():
    """Or the worst case would have hardly an image."""
    torch.manual_seed(0)
    net, pixels = Linear(torch.randn(3, 27)), torch.randint(0, 256, (200, 3, 3, 3), dtype=torch.uint8)
    y = torch.arange(200) % 3
    limits = {"default": 70, "fgsm": 31}
    results = evaluate(net, pixels, y, ["clean", "fgsm"], GROUPS, 3, 0.02, batch_size=64, limits=limits)
    assert [results[name]["images"] for name in ("clean", "fgsm")] == [70, 31]
    assert worst_case(results, y, GROUPS, 3)["images"] == 31


def test_the_worst_of_one_attack_is_that_attack():
    y = torch.arange(20) % 3
    correct = np.random.RandomState(0).rand(20) < 0.5
    one = accuracies(torch.from_numpy(correct), y, GROUPS, 5)
    worst = worst_case({"pgd20": one | {"correct": pack(correct)}}, y, GROUPS, 5)
    assert worst == {"attacks": ["pgd20"]} | one


def test_a_flag_is_said_and_kept():
    torch.manual_seed(0)
    pixels = torch.randint(90, 166, (100, 3, 3, 3), dtype=torch.uint8)
    weight, said = torch.randn(3, 27), []
    y = Linear(weight)(pixels / 255).argmax(1)
    found = check(Linear(weight), pixels, y, 0.05, said.append)
    assert all(entry["passed"] for entry in found)
    assert said == ["  checks: 7 of 7 passed"]
    said.clear()
    found = check(Linear(1e6 * weight), pixels, y, 0.05, said.append)
    assert [entry["name"] for entry in found if not entry["passed"]] == ["gradients"]
    assert said[0] == "  checks: 6 of 7 passed: the model may be overrated"
    assert said[1].startswith("  FLAG gradients: ")
    assert len(said) == 2
    assert found[3].keys() == {"name", "passed", "value", "detail"}
