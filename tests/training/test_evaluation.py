"""Evaluation of a network: every attack with its own limit, in float32, and the worst case against plain loops."""

import pytest
import torch

from helpers.toy_networks import Linear
from ltat_fast.runs.metrics import spread, worst_case
from ltat_fast.training.evaluation import check, evaluate

GROUPS = {"head": [0, 1], "medium": [2], "tail": [3], "nobody": [4]}


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
    assert results["clean"].all == 75.0
    assert (results["clean"].images, results["pgd5"].images) == (60, 30)
    tail_is_right = (net(pixels / 255).argmax(1) == y)[y == 2]
    assert results["clean"].percent("tail") == pytest.approx(100 * tail_is_right.float().mean().item())
    assert 0 < results["pgd5"].all < 75
    assert said == [f"  {name}: {r.all:.2f} % of {r.images} images" for name, r in results.items()]
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
def test_tf32_is_off_during_the_evaluation_and_restored_after_it(allowed):
    net, seen = Linear(torch.randn(3, 27)), []
    net.register_forward_hook(lambda *_: seen.append(tf32()))
    pixels, y = torch.randint(0, 256, (8, 3, 3, 3), dtype=torch.uint8), torch.arange(8) % 3
    allow_tf32(*allowed)
    evaluate(net, pixels, y, ["clean", "pgd1"], {}, 3, 0.05, batch_size=8)
    assert len(seen) == 4  # the test of the output, clean, and PGD's step and its end
    check(net, pixels, y, 0.05, lambda text: None)
    assert len(seen) > 3
    assert not any(map(any, seen))
    assert tf32() == allowed


def test_the_worst_case_counts_an_image_once_it_falls_to_any_attack():
    """Compared with plain loops. Each attack is limited to different images."""
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
    assert [results[name].chosen is not None for name in attacks] == [False, False, True, True]
    right = {name: {} for name in attacks}
    for name, result in results.items():
        bits = bin(int("1" + result.correct, 16))[3:]
        limit = {"cw3": 60, "fgsm": 44}.get(name)
        right[name] = {int(i): bit == "1" for i, bit in zip(spread(y.numpy(), limit), bits, strict=False)}
        assert 100 * sum(right[name].values()) / len(right[name]) == pytest.approx(result.all)
    seen = [i for i in range(90) if all(i in right[name] for name in attacks)]
    survivors = [i for i in seen if all(right[name][i] for name in attacks)]
    worst = worst_case(results, y, groups, 3)
    assert 0 < len(seen) < 44
    assert 0 < len(survivors) < min(sum(right[name][i] for i in seen) for name in ("clean", "pgd1"))
    assert worst.attacks == tuple(attacks)
    assert worst.images == len(seen)
    assert worst.all == pytest.approx(100 * len(survivors) / len(seen))
    for c in range(3):
        mine = [i for i in seen if y[i] == c]
        expected = 100 * sum(i in survivors for i in mine) / len(mine)
        assert worst.per_class[c] == pytest.approx(expected)
    assert worst.percent("tail") == worst.per_class[2]


def test_the_limit_of_one_attack_picks_from_the_images_of_all():
    """Otherwise the worst case would combine very few images."""
    torch.manual_seed(0)
    net, pixels = Linear(torch.randn(3, 27)), torch.randint(0, 256, (200, 3, 3, 3), dtype=torch.uint8)
    y = torch.arange(200) % 3
    limits = {"default": 70, "fgsm": 31}
    results = evaluate(net, pixels, y, ["clean", "fgsm"], GROUPS, 3, 0.02, batch_size=64, limits=limits)
    assert [results[name].images for name in ("clean", "fgsm")] == [70, 31]
    assert worst_case(results, y, GROUPS, 3).images == 31


def test_a_failed_check_is_printed_and_returned():
    torch.manual_seed(0)
    pixels = torch.randint(90, 166, (100, 3, 3, 3), dtype=torch.uint8)
    weight, said = torch.randn(3, 27), []
    y = Linear(weight)(pixels / 255).argmax(1)
    found = check(Linear(weight), pixels, y, 0.05, said.append)
    assert all(each.passed for each in found)
    assert said == ["  checks: 8 of 8 passed"]
    said.clear()
    found = check(Linear(1e6 * weight), pixels, y, 0.05, said.append)
    assert [each.name for each in found if not each.passed] == ["gradients"]
    assert said[0] == "  checks: 7 of 8 passed: the accuracy under attack may be too high"
    assert said[1].startswith("  FLAG gradients: ")
    assert len(said) == 2
    (failed,) = (each for each in found if not each.passed)
    assert said[1] == f"  FLAG gradients: {failed.detail}"
