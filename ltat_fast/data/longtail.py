"""The long-tailed profile, the selection of images, the balanced sub-dataset, and the class groups of the results.

Class c of C keeps ``int(n_max * r ** (c / (C - 1)))`` images, with r = 1 / imbalance ratio (exponential profile of
LDAM, Cao et al. 2019). The published index lists select the images with seed 0. All randomness comes from private
legacy NumPy generators, because their streams do not change between NumPy versions. NumPy's global state is not used.
"""

import bisect
import hashlib
import math
from dataclasses import dataclass

import numpy as np

from ltat_fast.data.sources import Dataset
from ltat_fast.errors import UserError

SHOT_DATASETS = ("imagelist-lt", "imagenet-lt")
"""datasets whose results are published by many-, medium- and few-shot classes"""


@dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set, class by class."""

    rows: np.ndarray
    """int64 (N,), the rows of its images in the array of the training images"""
    labels: np.ndarray
    """int64 (N,), ascending"""
    indices: np.ndarray
    """int64 (N,), position of each image in the full training set, in which bad images that were left out count"""
    counts: list[int]
    """images per class"""
    index_hash: str
    """:func:`index_hash` of ``indices``; two runs with the same hash trained on the same images"""
    groups: dict[str, list[int]]
    """:func:`class_groups` of ``counts``, with those of :func:`shot_groups` for :data:`SHOT_DATASETS`"""
    class_names: tuple[str, ...]


def make_long_tailed(dataset: Dataset, imbalance_ratio: float | None, seed: int = 0) -> LongTailed:
    """Make the long-tailed training set of ``dataset``.

    Args:
        imbalance_ratio: size of the largest class over size of the smallest; None keeps every image
        seed: seed of the selection; the published index lists use 0

    Raises:
        UserError: see :func:`class_counts`.
    """
    train = dataset.train
    indices = long_tailed_indices(train.labels, imbalance_ratio, dataset.n_max, seed)
    labels = train.labels[indices]
    counts = np.bincount(labels, minlength=len(train.class_names)).tolist()
    positions = indices if train.positions is None else train.positions[indices]
    groups = class_groups(counts, dataset.name)
    return LongTailed(indices, labels, positions, counts, index_hash(positions), groups, train.class_names)


def class_counts(n_max: int, num_classes: int, imbalance_ratio: float) -> list[int]:
    """Return the images per class of the long-tailed profile, from class 0, the most frequent, to the rarest.

    Counts are truncated, not rounded, as in the published lists.

    Args:
        n_max: images of class 0

    Raises:
        UserError: a ratio below 1 or not finite, fewer than two classes, or a ratio that leaves the last class empty.
    """
    if not (math.isfinite(imbalance_ratio) and imbalance_ratio >= 1):
        raise UserError(f"the imbalance ratio must be a finite number of at least 1, got {imbalance_ratio}")
    if num_classes < 2:
        raise UserError(f"a long-tailed profile needs at least two classes, got {num_classes}")
    counts = _profile(n_max, num_classes, imbalance_ratio)
    if counts[-1] < 1:
        raise UserError(
            f"an imbalance ratio of {imbalance_ratio:g} leaves no image in the last class if the first has {n_max}; "
            "use a smaller ratio"
        )
    return counts


def _profile(n_max: int, num_classes: int, imbalance_ratio: float) -> list[int]:
    """Return the counts of :func:`class_counts`, without its checks."""
    ratio = 1 / imbalance_ratio
    return [int(n_max * ratio ** (c / (num_classes - 1))) for c in range(num_classes)]


def fitted_counts(sizes: list[int], imbalance_ratio: float) -> list[int]:
    """Return the images per class of the largest long-tailed profile that fits into classes of these ``sizes``.

    Larger classes get larger counts; among classes of equal size, the earlier class gets the larger count.

    Raises:
        UserError: see :func:`class_counts`.
    """
    order = sorted(range(len(sizes)), key=lambda c: -sizes[c])  # classes from the largest to the smallest

    def too_large(n_max: int) -> bool:
        counts = _profile(n_max, len(sizes), imbalance_ratio)
        return any(count > sizes[c] for c, count in zip(order, counts, strict=True))

    class_counts(max(sizes), len(sizes), imbalance_ratio)  # checks the arguments
    # Binary search for the first n_max that is too large; the one before it is the answer.
    n_max = bisect.bisect_left(range(max(sizes) + 1), True, key=too_large) - 1
    counts = dict(zip(order, class_counts(n_max, len(sizes), imbalance_ratio), strict=True))
    return [counts[c] for c in range(len(sizes))]


def long_tailed_indices(
    labels: np.ndarray, imbalance_ratio: float | None, n_max: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return the int64 indices of the images to keep, class by class.

    One legacy generator shuffles the ascending indices of each class in turn, and the first images of each class are
    kept. So the subset of a larger ratio is contained in that of a smaller one.

    Args:
        labels: int64 (N,); every class in ``range(labels.max() + 1)`` must be present
        imbalance_ratio: size of the largest class over size of the smallest; None keeps every image, in class order
        n_max: images of class 0; a class with fewer images than the profile requires keeps all of them. None uses
            :func:`fitted_counts`.

    Raises:
        UserError: see :func:`class_counts`.
    """
    by_class = _indices_by_class(labels)
    if imbalance_ratio is None:
        return np.concatenate(by_class)
    if n_max is None:
        counts = fitted_counts([len(indices) for indices in by_class], imbalance_ratio)
    else:
        counts = class_counts(n_max, len(by_class), imbalance_ratio)
    rng = np.random.RandomState(seed)
    for indices in by_class:
        rng.shuffle(indices)
    return np.concatenate([indices[:count] for indices, count in zip(by_class, counts, strict=True)])


def balanced_indices(labels: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Return the int64 indices of a balanced set with exactly ``per_class`` images per class, class by class.

    A class with enough images is sampled without replacement. A smaller class is repeated as a whole, and the remainder
    is sampled without replacement, so the repetitions of two images of a class differ by at most one.

    Raises:
        UserError: ``per_class`` is below 1.
    """
    if per_class < 1:
        raise UserError(f"the balanced set needs at least one image per class, got {per_class}")
    rng = np.random.RandomState(seed)
    drawn = []
    for indices in _indices_by_class(labels):
        copies, remainder = divmod(per_class, len(indices))
        drawn += [np.tile(indices, copies), rng.permutation(indices)[:remainder]]
    return np.concatenate(drawn)


def holdout_split(
    labels: np.ndarray, indices: np.ndarray, fraction: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split ``indices`` into a training part and a held-out part, class by class; both keep the order of ``indices``.

    Every class keeps at least one training image, so a class with a single image is never held out.

    Args:
        labels: int64 labels of the dataset that ``indices`` refers to
        indices: int64, without repetitions; split before up-sampling, so that no image is in both parts
        fraction: share of each class to hold out, in [0, 1), rounded to the nearest count

    Raises:
        UserError: the fraction is outside [0, 1).
        ValueError: an index is repeated.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction must be in [0, 1), got {fraction}")
    if len(np.unique(indices)) != len(indices):
        raise ValueError("indices must not repeat: split before up-sampling")
    rng = np.random.RandomState(seed)
    held_out = np.zeros(len(indices), dtype=bool)
    kept_labels = labels[indices]
    for c in np.unique(kept_labels):
        positions = rng.permutation(np.flatnonzero(kept_labels == c))
        held_out[positions[: min(round(fraction * len(positions)), len(positions) - 1)]] = True
    return indices[~held_out], indices[held_out]


def class_groups(counts: list[int], dataset: str = "") -> dict[str, list[int]]:
    """Group the classes into ``head``, ``medium`` and ``tail`` by training images; each group is in ascending order.

    The tail is the tenth of the classes with the fewest training images, but at least one class (1 of 10, 10 of 100, 20
    of 200, as in the paper); among equal counts, later classes go to the tail first. The head is the third of the
    classes with the most images. For 200 classes there is also ``tail10``, the ten rarest classes: the paper names
    twenty tail classes of Tiny-ImageNet, but its tail accuracies have the resolution of ten classes. If ``dataset`` is
    one of :data:`SHOT_DATASETS`, there are also the groups of :func:`shot_groups`.
    """
    by_frequency = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    num_head, num_tail = len(counts) // 3, max(len(counts) // 10, 1)
    groups = {
        "head": by_frequency[:num_head],
        "medium": by_frequency[num_head:-num_tail],
        "tail": by_frequency[-num_tail:],
    }
    if len(counts) == 200:
        groups["tail10"] = by_frequency[-10:]
    if dataset in SHOT_DATASETS:
        groups |= shot_groups(counts)
    return {name: sorted(classes) for name, classes in groups.items()}


def shot_groups(counts: list[int]) -> dict[str, list[int]]:
    """Group the classes by training images as Liu et al. 2019: many (> 100), medium (20 to 100), few (< 20).

    The names end in ``_shot``, as in that paper, because "medium" is also a group of :func:`class_groups`.
    """
    bounds = {"many_shot": (101, math.inf), "medium_shot": (20, 100), "few_shot": (0, 19)}
    return {name: [c for c, count in enumerate(counts) if low <= count <= high] for name, (low, high) in bounds.items()}


def index_hash(indices: np.ndarray) -> str:
    """Return the first 16 hex digits of the SHA-256 of the indices as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()[:16]


def _indices_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Return the ascending int64 indices of each class.

    Raises:
        UserError: a class has no image.
    """
    counts = np.bincount(labels)
    if len(counts) == 0 or counts.min() == 0:
        raise UserError(f"class {int(np.argmin(counts)) if len(counts) else 0} has no training image")
    return np.split(np.argsort(labels, kind="stable").astype(np.int64), np.cumsum(counts)[:-1])
