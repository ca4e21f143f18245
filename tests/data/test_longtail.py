"""Class counts are compared with the published ones, the selection with NumPy's global legacy generator."""

import itertools

import numpy as np
import pytest

from ltat_fast.data import (
    balanced_indices,
    class_counts,
    class_groups,
    holdout_split,
    index_hash,
    load_dataset,
    long_tailed_indices,
    make_long_tailed,
)
from ltat_fast.data.longtail import fitted_counts
from ltat_fast.data.sources import Dataset, ImageSet
from ltat_fast.errors import UserError

CIFAR10 = {
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    20: [5000, 3584, 2569, 1842, 1320, 946, 678, 486, 348, 250],
    50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
}
# (n_max, classes, ratio): images in total, in the last class, in the paper's tail group
TOTALS = {
    (5000, 10, 10): (20431, 500, 500),
    (5000, 10, 20): (17023, 250, 250),
    (5000, 10, 50): (13996, 100, 100),
    (5000, 10, 100): (12406, 50, 50),
    (500, 100, 5): (24856, 100, 1072),
    (500, 100, 10): (19573, 50, 552),
    (500, 100, 20): (15907, 25, 282),
    (500, 100, 50): (12608, 10, 116),
    (500, 200, 10): (39072, 50, 1109),
}


@pytest.mark.parametrize("ratio", CIFAR10)
def test_cifar10_class_counts(ratio):
    assert class_counts(5000, 10, ratio) == CIFAR10[ratio]


@pytest.mark.parametrize("profile", TOTALS)
def test_totals_and_tail(profile):
    counts = class_counts(*profile)
    tail = class_groups(counts)["tail"]
    assert (sum(counts), counts[-1], sum(counts[c] for c in tail)) == TOTALS[profile]
    assert tail == list(range(profile[1] - profile[1] // 10, profile[1]))


def test_some_counts_of_cifar100_and_tiny_imagenet():
    assert class_counts(500, 100, 50)[:5] == [500, 480, 462, 444, 426]
    assert class_counts(500, 100, 20)[-5:] == [28, 27, 26, 25, 25]
    tiny = class_counts(500, 200, 10)
    assert tiny[:4] == [500, 494, 488, 482]
    assert tiny[-8:] == [54, 53, 52, 52, 51, 51, 50, 50]
    assert sum(tiny[c] for c in class_groups(tiny)["tail10"]) == 522


def test_ratio_one_is_balanced_and_invalid_ratios_are_refused():
    assert class_counts(500, 100, 1) == [500] * 100
    for ratio in (0.99, 0, -1, float("nan"), float("inf"), 6000):
        with pytest.raises(UserError, match="imbalance ratio"):
            class_counts(5000, 10, ratio)
    with pytest.raises(UserError, match="two classes"):
        class_counts(5000, 1, 10)


def balanced_labels(classes=10, per_class=300, seed=1):
    return np.random.RandomState(seed).permutation(np.repeat(np.arange(classes), per_class)).astype(np.int64)


def test_selection_equals_that_of_the_global_generator_without_using_it():
    labels = balanced_labels()
    np.random.seed(0)
    expected = []
    for c, count in enumerate(class_counts(300, 10, 50)):
        members = np.where(labels == c)[0]
        np.random.shuffle(members)
        expected.append(members[:count])
    np.random.seed(123)
    before = np.random.get_state()[1].copy()
    indices = long_tailed_indices(labels, 50, 300)
    assert np.array_equal(np.random.get_state()[1], before)
    assert indices.dtype == np.int64
    assert np.array_equal(indices, np.concatenate(expected))


def test_the_published_selection_of_cifar10_at_ratio_50():
    """The labels are in class order, 5,000 per class, so the hash is a constant."""
    labels = np.repeat(np.arange(10), 5000)
    indices = long_tailed_indices(labels, 50)
    first_class = np.arange(5000)
    np.random.RandomState(0).shuffle(first_class)
    assert np.array_equal(indices[:5000], first_class)
    assert index_hash(indices) == "99be59da760d1456"


def test_subsets_are_nested_across_ratios():
    labels = balanced_labels(100, 50)
    subsets = [set(long_tailed_indices(labels, ratio).tolist()) for ratio in (50, 20, 10, 5, 1)]
    for smaller, larger in itertools.pairwise(subsets):
        assert smaller < larger
    assert len(subsets[-1]) == len(labels)


def test_a_class_with_too_few_images_keeps_all_of_them():
    labels = np.repeat([0, 1, 2], [4, 50, 20])
    indices = long_tailed_indices(labels, 10, n_max=100)  # the profile is 100, 31, 10
    assert np.bincount(labels[indices]).tolist() == [4, 31, 10]
    assert np.bincount(labels[long_tailed_indices(labels, 1, n_max=100)]).tolist() == [4, 50, 20]


@pytest.mark.parametrize(
    ("sizes", "ratio", "expected"),
    [
        ([10, 60, 40, 30], 1, [10, 10, 10, 10]),
        ([10, 60, 40, 30], 10, [6, 60, 27, 12]),
        ([10, 60, 40, 30], 2, [10, 21, 16, 13]),  # 10 is 21 / 2, truncated
        *((CIFAR10[10], ratio, CIFAR10[ratio]) for ratio in CIFAR10),  # a subset of a set already cut to 10
        # The training images of SVHN.
        ([4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659], 1, [4659] * 10),
    ],
)
def test_without_a_published_size_the_profile_is_fitted(sizes, ratio, expected):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert np.bincount(labels[long_tailed_indices(labels, ratio)]).tolist() == expected


@pytest.mark.parametrize("ratio", [1, 2, 3.7, 10, 50])
def test_the_fitted_profile_is_the_largest_possible(ratio):
    rng = np.random.RandomState(0)
    for _ in range(30):
        sizes = rng.randint(60, 400, size=rng.randint(2, 12)).tolist()
        counts = fitted_counts(sizes, ratio)
        assert all(count <= size for count, size in zip(counts, sizes, strict=True))
        descending = sorted(counts, reverse=True)
        assert descending == class_counts(descending[0], len(sizes), ratio)
        by_size = [counts[c] for c in sorted(range(len(sizes)), key=lambda c: -sizes[c])]
        assert by_size == descending
        larger = class_counts(descending[0] + 1, len(sizes), ratio)
        assert any(count > size for count, size in zip(larger, sorted(sizes, reverse=True), strict=True))


def test_without_a_ratio_every_image_is_kept_in_class_order():
    labels = np.array([1, 0, 1, 2, 0])
    assert long_tailed_indices(labels, None).tolist() == [1, 4, 0, 2, 3]


def test_the_error_names_a_class_without_images():
    with pytest.raises(UserError, match="class 1 has no training image"):
        long_tailed_indices(np.array([0, 2, 2]), 2)


@pytest.mark.parametrize(
    ("profile", "per_class", "total", "upsampled"),
    [
        ((5000, 10, 10), 2500, 25000, 7),
        ((5000, 10, 50), 2500, 25000, 8),
        ((5000, 10, 100), 2500, 25000, 8),
        ((500, 100, 5), 250, 25000, 57),
        ((500, 100, 10), 250, 25000, 70),
        ((500, 100, 50), 250, 25000, 82),
        ((500, 200, 10), 250, 50000, 140),
    ],
)
def test_balanced_set(profile, per_class, total, upsampled):
    counts = class_counts(*profile)
    assert per_class == counts[-1] * profile[2] / 2  # gamma = IR / 2
    labels = np.repeat(np.arange(len(counts)), counts)
    indices = balanced_indices(labels, per_class)
    assert len(indices) == total
    assert (np.bincount(labels[indices]) == per_class).all()
    visits = np.bincount(indices, minlength=len(labels))
    assert sum(count < per_class for count in counts) == upsampled
    for c, count in enumerate(counts):
        of_class = visits[labels == c]
        assert of_class.min() >= per_class // count
        assert of_class.max() - of_class.min() <= 1
    assert np.array_equal(indices, balanced_indices(labels, per_class))
    assert not np.array_equal(indices, balanced_indices(labels, per_class, seed=1))


def test_groups():
    assert class_groups([9, 8, 7, 6, 5, 4, 3, 2, 1, 1]) == {
        "head": [0, 1, 2],
        "medium": [3, 4, 5, 6, 7, 8],
        "tail": [9],
    }
    assert class_groups([1, 5, 9]) == {"head": [2], "medium": [1], "tail": [0]}  # by frequency, not by position
    assert class_groups([5, 5]) == {"head": [], "medium": [0], "tail": [1]}
    groups = class_groups(class_counts(500, 200, 10))
    assert groups["tail"] == list(range(180, 200))
    assert groups["tail10"] == list(range(190, 200))
    assert groups["head"] == list(range(66))
    assert groups["medium"] == list(range(66, 180))


def test_holdout_split():
    labels = np.repeat(np.arange(4), [100, 10, 2, 1])
    indices = np.random.RandomState(3).permutation(113)[:113]
    train, held = holdout_split(labels, indices, 0.3, seed=5)
    assert sorted([*train, *held]) == list(range(113))
    assert np.bincount(labels[held], minlength=4).tolist() == [30, 3, 1, 0]
    assert [i for i in indices if i in set(train.tolist())] == train.tolist()
    assert np.bincount(labels[holdout_split(labels, indices, 0.99, seed=0)[0]]).min() == 1
    assert len(holdout_split(labels, indices, 0, seed=5)[1]) == 0
    with pytest.raises(UserError, match="fraction"):
        holdout_split(labels, indices, 1.0, seed=5)
    with pytest.raises(ValueError, match="repeat"):
        holdout_split(labels, np.array([0, 0, 1]), 0.5, seed=5)


def test_make_long_tailed_keeps_image_and_label_together():
    labels = balanced_labels(10, 40)
    images = labels.astype(np.uint8)[:, None, None, None] * np.ones((1, 3, 4, 4), np.uint8)
    names = tuple("abcdefghij")
    part = ImageSet(images, labels, names)
    tailed = make_long_tailed(Dataset("x", part, part, n_max=40, pad=4, flip=True), 10)
    assert tailed.counts == class_counts(40, 10, 10)
    assert np.array_equal(images[tailed.rows, 0, 0, 0], tailed.labels)
    assert np.array_equal(tailed.labels, np.sort(tailed.labels))
    assert np.array_equal(labels[tailed.indices], tailed.labels)
    assert tailed.index_hash == index_hash(long_tailed_indices(labels, 10, 40))
    assert tailed.groups == class_groups(tailed.counts)


def test_digits():
    digits = load_dataset("digits-lt")
    assert np.bincount(digits.test.labels).tolist() == [60] * 10
    assert len(digits.train.labels) == 1197
    assert digits.n_max == np.bincount(digits.train.labels).min() == 114
    assert digits.train.images.shape == (1197, 1, 8, 8)
    together = np.concatenate([digits.train.images, digits.test.images])
    # The split reorders the 1,797 images and changes none. Grey level 16 of 16 is 255.
    from sklearn.datasets import load_digits

    original = np.rint(load_digits().data / 16 * 255).astype(np.uint8)
    assert sorted(map(bytes, together.reshape(1797, -1))) == sorted(map(bytes, original))
    assert np.array_equal(load_dataset("digits-lt").test.images, digits.test.images)


def test_unknown_dataset_and_resize_are_refused():
    with pytest.raises(UserError, match=r"unknown dataset 'mnist'.*digits-lt"):
        load_dataset("mnist")
    with pytest.raises(UserError, match="8x8"):
        load_dataset("digits-lt", image_size=32)
