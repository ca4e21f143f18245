"""Operations are compared bit for bit with torchvision on PIL images, random draws with torchvision's frequencies."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, chisquare

from ltat_fast._torchvision import torchvision
from ltat_fast.data.augment import (
    _CIFAR10_PAIRS,
    RAND_AUGMENT_MAGNITUDE,
    RAND_AUGMENT_OPS,
    Crops,
    apply_crops,
    auto_augment_policy,
    draw_crops,
    rand_augment_policy,
)
from ltat_fast.data.image_ops import KERNELS, kernel_arguments

reference = torchvision.transforms.autoaugment
NEAREST = torchvision.transforms.InterpolationMode.NEAREST
CIFAR10 = reference.AutoAugmentPolicy.CIFAR10
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def sample_images(height, width):
    """Return noise, smooth, two-level, almost constant and constant images, uint8 (12, 3, height, width)."""
    rng = np.random.RandomState(0)
    noise = rng.randint(0, 256, (4, 3, height, width))
    rows, columns = np.indices((height, width))
    phase = rng.rand(4, 3, 1, 1) * 6
    shades = 128 + 100 * np.sin(rows / 7 + phase) * np.cos(columns / 5 - phase)
    two = rng.randint(0, 2, (2, 3, height, width)) * 130 + 20
    almost_constant = np.full((1, 3, height, width), 90)
    almost_constant[0, :, 0, 0] = 91
    constant = np.full((1, 3, height, width), 77)
    return np.concatenate([noise, shades, two, almost_constant, constant]).astype(np.uint8)


def by_torchvision(image, name, magnitude):
    """Apply one operation of torchvision to a uint8 image (3, H, W)."""
    image = Image.fromarray(image.transpose(1, 2, 0))
    return np.asarray(reference._apply_op(image, name, magnitude, NEAREST, None)).transpose(2, 0, 1)


def some_magnitudes(transform, bins, height, width):
    for name, (magnitudes, signed) in transform._augmentation_space(bins, (height, width)).items():
        for magnitude in magnitudes[[0, 1, 2, 8, -1]].tolist() if magnitudes.ndim else [0.0]:
            for sign in (1, -1) if signed else (1,):
                yield name, sign * magnitude


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 27)])
@pytest.mark.parametrize(("transform", "bins"), [(reference.RandAugment(), 31), (reference.AutoAugment(CIFAR10), 10)])
def test_every_operation_equals_torchvision(transform, bins, height, width, device):
    images = sample_images(height, width)
    x = torch.from_numpy(images).to(device)
    seen = set()
    for name, magnitude in some_magnitudes(transform, bins, height, width):
        if name == "Identity":
            continue
        seen.add(name)
        kernel, arguments = kernel_arguments(name, magnitude, height, width)
        rows = torch.tensor(arguments, dtype=torch.float64, device=device).expand(len(x), 6)
        ours = KERNELS[kernel](x, rows).cpu().numpy()
        for image, out in zip(images, ours, strict=True):
            assert np.array_equal(out, by_torchvision(image, name, magnitude)), (name, magnitude)
    assert len(seen) == {31: 13, 10: 14}[bins]


def test_the_cifar10_pairs_are_the_published_ones():
    published = reference.AutoAugment(CIFAR10)._get_policies(CIFAR10)
    assert [tuple((name, p, level or 0) for name, p, level in pair) for pair in published] == _CIFAR10_PAIRS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [rand_augment_policy, auto_augment_policy])
def test_each_image_of_a_batch_gets_the_operations_it_drew(make, device):
    """Each image equals torchvision's result for its own two operations, although the batch is grouped by kernel."""
    policy = make(32, 32, device)
    operations = policy_operations(make)
    images = np.concatenate([sample_images(32, 32)] * 12)
    x = torch.from_numpy(images).to(device)
    draws = policy.draw(len(x), torch.Generator().manual_seed(3))
    out = policy.apply(x, draws).cpu().numpy()
    assert np.array_equal(x.cpu().numpy(), images)  # the input is not changed
    for image, drawn, result in zip(images, draws.tolist(), out, strict=True):
        for position in drawn:
            image = by_torchvision(image, *operations[position])
        assert np.array_equal(result, image)


def policy_operations(make):
    """Return the operations of a policy, in the order of its positions, with magnitudes from torchvision."""
    if make is rand_augment_policy:
        space = reference.RandAugment()._augmentation_space(31, (32, 32))
        return [
            (name, sign * (magnitudes[RAND_AUGMENT_MAGNITUDE].item() if magnitudes.ndim else 0.0))
            for name, (magnitudes, signed) in space.items()
            for sign in ((1, -1) if signed else (1, 1))
        ]
    transform = reference.AutoAugment(CIFAR10)
    space = transform._augmentation_space(10, (32, 32))
    operations = [("Identity", 0.0)]
    for pair in transform._get_policies(CIFAR10):
        for name, _, level in pair:
            magnitudes, signed = space[name]
            magnitude = magnitudes[level].item() if magnitudes.ndim else 0.0
            operations += [(name, magnitude), (name, -magnitude if signed else magnitude)]
    return operations


def torchvision_draws(transform, n, monkeypatch):
    """Return what torchvision's forward pass draws for n images: a list of [(name, magnitude), ...]."""
    drawn = []
    monkeypatch.setattr(
        reference, "_apply_op", lambda image, name, magnitude, **_: drawn[-1].append((name, magnitude)) or image
    )
    image = Image.new("RGB", (32, 32))
    torch.manual_seed(0)
    for _ in range(n):
        drawn.append([])
        transform(image)
    return drawn


def rounded(name, magnitude):
    return name, round(magnitude, 4)


def test_rand_augment_draws_like_torchvision(monkeypatch):
    theirs = torchvision_draws(reference.RandAugment(RAND_AUGMENT_OPS, RAND_AUGMENT_MAGNITUDE), 4000, monkeypatch)
    operations = policy_operations(rand_augment_policy)
    draws = rand_augment_policy(32, 32, "cpu").draw(20_000, torch.Generator().manual_seed(1)).tolist()
    ours = [[operations[position] for position in drawn] for drawn in draws]
    assert {len(drawn) for drawn in theirs} == {len(drawn) for drawn in ours} == {2}

    singles = [Counter(rounded(*op) for drawn in side for op in drawn) for side in (theirs, ours)]
    assert singles[0].keys() == singles[1].keys()
    assert len(singles[1]) == 14 + 9  # nine of the fourteen have two signs
    table = [[side[key] for key in sorted(singles[0])] for side in singles]
    assert chi2_contingency(table).pvalue > 0.01
    by_name = Counter(name for name, _ in singles[1].elements())
    assert chisquare(list(by_name.values())).pvalue > 0.01  # the fourteen are equally likely
    signed = [(m, n) for (name, m), n in singles[1].items() if m and (name, -m) in singles[1]]
    signs = [sum(n for m, n in signed if m * sign > 0) for sign in (1, -1)]
    assert chisquare(signs).pvalue > 0.01
    pairs = Counter((first[0], second[0]) for first, second in ours)  # the two rounds are independent
    assert len(pairs) == 14 * 14
    assert chisquare(list(pairs.values())).pvalue > 0.01


def test_auto_augment_draws_like_torchvision(monkeypatch):
    theirs = torchvision_draws(reference.AutoAugment(CIFAR10), 8000, monkeypatch)
    operations = policy_operations(auto_augment_policy)
    draws = auto_augment_policy(32, 32, "cpu").draw(20_000, torch.Generator().manual_seed(1)).tolist()
    ours = [[operations[position] for position in drawn if position] for drawn in draws]
    whole = [Counter(tuple(rounded(*op) for op in drawn) for drawn in side) for side in (theirs, ours)]
    keys = [key for key in whole[0] | whole[1] if whole[0][key] + whole[1][key] >= 40]
    covered = sum(whole[1][key] for key in keys) / 20_000
    assert covered > 0.95  # the test skips only the rarest sequences of operations
    assert chi2_contingency([[side[key] for key in keys] for side in whole]).pvalue > 0.01


@pytest.mark.parametrize("make", [rand_augment_policy, auto_augment_policy])
def test_augmentation_is_a_function_of_its_generator(make):
    x = torch.from_numpy(sample_images(32, 32))
    policy = make(32, 32, "cpu")
    one, again, other = (
        policy.apply(x, policy.draw(len(x), torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.dtype == torch.uint8


def test_a_policy_without_rounds_changes_nothing():
    x = torch.from_numpy(sample_images(32, 32))
    assert torch.equal(rand_augment_policy(32, 32, "cpu").apply(x, torch.empty(len(x), 0, dtype=torch.int64)), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("channels", "size", "pad"), [(1, 8, 1), (3, 32, 4), (3, 5, 0)])
def test_crops_of_a_batch_equal_crops_of_single_images(channels, size, pad, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (64, channels, size, size + 2), generator=generator, dtype=torch.uint8)
    crops = draw_crops(64, pad, True, generator)
    out = apply_crops(x.to(device), pad, Crops(*(draw.to(device) for draw in crops))).cpu()
    for image, top, left, flipped, result in zip(x.numpy(), *(draw.tolist() for draw in crops), out, strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        cut = padded[:, top : top + size, left : left + size + 2]
        assert np.array_equal(result, cut[:, :, ::-1] if flipped else cut)


def test_crop_draws_are_uniform_and_independent():
    top, left, flipped = draw_crops(40_000, 8, True, torch.Generator().manual_seed(5))
    cells = (top * 9 + left) * 2 + flipped
    assert chisquare(cells.bincount(minlength=162).numpy()).pvalue > 0.01
    assert not draw_crops(1000, 4, False, torch.Generator().manual_seed(5)).flipped.any()
    same = draw_crops(1000, 4, False, torch.Generator().manual_seed(5))
    assert torch.equal(same.top, draw_crops(1000, 4, True, torch.Generator().manual_seed(5)).top)


def test_crops_without_padding_only_flip():
    x = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(apply_crops(x, 0, draw_crops(8, 0, False, torch.Generator())), x)
    flipped = apply_crops(x, 0, draw_crops(8, 0, True, torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x, strict=True))
    assert not torch.equal(flipped, x)
