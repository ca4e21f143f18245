"""Corruptions against numpy, and their statistics."""

import numpy as np
import pytest
import torch

from helpers.toy_networks import Linear, images, labels
from ltat_fast.analysis import corruptions
from ltat_fast.analysis.corruptions import (
    CONSTANTS,
    RANDOM_SHARES,
    add_noise,
    constants_for,
    correct_under_occlusion,
    gaussian_noise,
    impulse_noise,
    inductive_shares,
    occlusion_mask,
    occlusion_radius,
    random_mask,
    replace_by_noise,
    shot_noise,
    top_mask,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(n=12, channels=3, size=6, seed=4):
    return torch.randn(n, channels, size, size, generator=generator(seed))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2])
def test_the_highest_signed_entries_are_masked(share):
    given = scores()
    k = int(np.floor(share * 108))
    for image, mask in zip(given.numpy(), top_mask(given, share).numpy(), strict=True):
        chosen = set(np.argsort(-image.ravel())[:k])
        assert set(np.flatnonzero(mask.ravel())) == chosen


def test_counts_are_exact_despite_rounding():
    assert 0.29 * 100 < 29
    for share in (*RANDOM_SHARES, 0.29):
        assert top_mask(torch.rand(1, 1, 10, 10), share).sum() == round(100 * share)


def test_random_entries_are_all_equally_likely():
    n, share = 4000, 0.1
    mask = random_mask(torch.empty(n, 1, 6, 6), share, generator())
    assert (mask.flatten(1).sum(1) == 3).all()
    p = 3 / 36
    assert (mask.float().mean(0) - p).abs().max() < 4.5 * (p * (1 - p) / n) ** 0.5


def test_noise_is_added_or_replaces():
    x, noise = images(), scores(seed=8)
    mask = top_mask(scores(), 0.1)
    kept, hit = ~mask.numpy(), mask.numpy()
    for measured, expected in (
        (add_noise(x, mask, noise), np.clip(x.numpy() + noise.numpy(), 0, 1)),
        (replace_by_noise(x, mask, noise), np.clip(noise.numpy(), 0, 1)),
    ):
        np.testing.assert_array_equal(measured.numpy()[kept], x.numpy()[kept])
        np.testing.assert_array_equal(measured.numpy()[hit], expected[hit])
        assert (measured != x)[mask].any()


def covered_by_brute_force(attribution: np.ndarray, pixels: int, radius: int) -> np.ndarray:
    height, width = attribution.shape[1:]
    mean = attribution.mean(0)
    order = sorted((-mean[i, j], i, j) for i in range(height) for j in range(width))[:pixels]
    covered = np.zeros((height, width), dtype=bool)
    for _, i, j in order:
        for row in range(i - radius, i + radius):
            for column in range(j - radius, j + radius):
                if 0 <= row < height and 0 <= column < width:
                    covered[row, column] = True
    return covered


@pytest.mark.parametrize(("pixels", "radius"), [(1, 1), (3, 1), (2, 2), (5, 3)])
def test_occluded_squares(pixels, radius):
    attribution = torch.randn(12, 3, 6, 9, generator=generator(2))
    masks = occlusion_mask(attribution, pixels, radius)
    assert masks.shape == (12, 1, 6, 9)
    for mask, image in zip(masks[:, 0].numpy(), attribution.numpy(), strict=True):
        np.testing.assert_array_equal(mask, covered_by_brute_force(image, pixels, radius))


def test_the_search_for_an_occlusion():
    net, x, y, attribution = Linear(scores(3).flatten(1)), images(40), labels(40), scores(40)
    expected = []
    for image, label, scored in zip(x, y, attribution, strict=True):
        correct = net(image[None]).argmax().item() == label
        for pixels in (1, 2, 3):
            for radius in (1, 2):
                occluded = image.clone()
                occluded[:, torch.from_numpy(covered_by_brute_force(scored.numpy(), pixels, radius))] = 0.5
                correct &= net(occluded[None]).argmax().item() == label
        expected.append(bool(correct))
    measured = correct_under_occlusion(net, x, y, attribution, 0.5, pixels=3, radius=2)
    assert measured.tolist() == expected
    assert 0 < sum(expected) < (net(x).argmax(1) == y).sum(), "some survive and some do not"


def test_an_image_that_is_correct_only_when_occluded_is_an_error():
    weight = torch.stack([torch.zeros(108), torch.ones(108)])
    dark = torch.full((1, 3, 6, 6), 0.499)  # class 0, and class 1 with any white square
    attribution, one = scores(1), torch.ones(1, dtype=torch.int64)
    assert not correct_under_occlusion(Linear(weight), dark, one, attribution, 1.0).item()
    white = torch.where(occlusion_mask(attribution, 1, 1), 1.0, dark)
    assert correct_under_occlusion(Linear(weight), white, one, attribution, 1.0).item()


def test_the_radius_follows_the_size():
    assert [occlusion_radius(size) for size in (224, 64, 32, 8)] == [20, 6, 3, 1]


@pytest.mark.parametrize("severity", range(5))
@pytest.mark.parametrize("name", CONSTANTS)
def test_common_noises_have_the_published_strength(name, severity):
    """On grey, where nothing is clipped: mean, variance and share are within four standard errors."""
    grey = torch.full((1, 1, 400, 1000), 0.5)
    n = grey.numel()
    std = CONSTANTS[name]["gaussian"][severity]
    noise = gaussian_noise(grey, std, generator()) - grey
    clipped = np.clip(np.random.RandomState(1).normal(0.5, std, n), 0, 1) - 0.5
    assert noise.std().item() == pytest.approx(clipped.std(), rel=0.01)
    if std <= 0.12:
        assert noise.var().item() == pytest.approx(std**2, rel=4 * (2 / n) ** 0.5 + 1e-3)

    photons = CONSTANTS[name]["shot"][severity]
    shot = shot_noise(grey, photons, generator())
    torch.testing.assert_close(shot * photons, (shot * photons).round(), atol=1e-3, rtol=0)
    expected = np.clip(np.random.RandomState(2).poisson(0.5 * photons, n) / photons, 0, 1)
    assert shot.mean().item() == pytest.approx(expected.mean(), rel=0.01)
    assert shot.var().item() == pytest.approx(expected.var(), rel=0.02)

    share = CONSTANTS[name]["impulse"][severity]
    impulse = impulse_noise(grey, share, generator())
    for value in (0.0, 1.0):
        p = share / 2
        assert abs((impulse == value).float().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert ((impulse == 0.5) | (impulse == 0) | (impulse == 1)).all()


def test_severities_grow():
    for constants in CONSTANTS.values():
        assert list(constants["gaussian"]) == sorted(constants["gaussian"])
        assert list(constants["impulse"]) == sorted(constants["impulse"])
        assert list(constants["shot"]) == sorted(constants["shot"], reverse=True)


def test_shot_noise_keeps_black_black():
    assert shot_noise(torch.zeros(100), 60, generator()).max() == 0


def test_results_are_images_and_depend_on_the_generator_alone():
    x = images()
    for name, corrupt in corruptions.COMMON.items():
        strength = CONSTANTS["ImageNet-C"][name][4]
        once, twice, other = (corrupt(x, strength, generator(seed)) for seed in (0, 0, 1))
        assert 0 <= once.min() <= once.max() <= 1
        torch.testing.assert_close(once, twice, atol=0, rtol=0)
        assert (once != other).any()


def test_published_settings():
    assert inductive_shares(3 * 32 * 32) == (0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014, 0.016, 0.018, 0.02)
    assert inductive_shares(64) == RANDOM_SHARES == (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)
    assert [constants_for(size) for size in (8, 32, 64, 224)] == [
        "CIFAR-10-C",
        "CIFAR-10-C",
        "Tiny-ImageNet-C",
        "ImageNet-C",
    ]
