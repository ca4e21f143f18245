"""The long-tailed profile, the seed-0 selection behind every published index list, and the groups it is scored by.

Class c keeps ``int(n_max * r ** (c / (C - 1)))`` images, r = 1 / imbalance ratio (Cao et al. 2019, LDAM, exponential
profile). All randomness comes from private legacy NumPy generators: their streams are frozen across NumPy versions,
and NumPy's global state is neither read nor moved.
"""

import bisect
import hashlib
import math
from dataclasses import dataclass

import numpy as np

from ltat_fast.data.sources import Dataset
from ltat_fast.errors import UserError


@dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set, stored class by class."""

    images: np.ndarray
    """uint8 (N, C, H, W)"""
    labels: np.ndarray
    """int64 (N,), ascending"""
    indices: np.ndarray
    """int64 (N,): where each image stands in the set it was drawn from"""
    counts: list[int]
    """images of each class"""
    index_hash: str
    """:func:`index_hash` of ``indices``: two runs with the same hash trained on the same images"""
    groups: dict[str, list[int]]
    """:func:`class_groups` of ``counts``"""
    class_names: tuple[str, ...]


def make_long_tailed(dataset: Dataset, imbalance_ratio: float | None, seed: int = 0) -> LongTailed:
    """The long-tailed training set of ``dataset``; ``imbalance_ratio=None`` keeps every image it has.

    Raises:
        UserError: see :func:`class_counts`.
    """
    train = dataset.train
    indices = long_tailed_indices(train.labels, imbalance_ratio, dataset.n_max, seed)
    labels = train.labels[indices]
    counts = np.bincount(labels, minlength=len(train.class_names)).tolist()
    return LongTailed(
        train.images[indices], labels, indices, counts, index_hash(indices), class_groups(counts), train.class_names
    )


def class_counts(n_max: int, num_classes: int, imbalance_ratio: float) -> list[int]:
    """Images of each class, the most frequent first; truncated, not rounded, as the published lists are.

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
            f"an imbalance ratio of {imbalance_ratio:g} leaves no image in the last class when the first has {n_max}"
        )
    return counts


def _profile(n_max: int, num_classes: int, imbalance_ratio: float) -> list[int]:
    ratio = 1 / imbalance_ratio
    return [int(n_max * ratio ** (c / (num_classes - 1))) for c in range(num_classes)]


def fitted_counts(sizes: list[int], imbalance_ratio: float) -> list[int]:
    """Images of each class in the largest profile that classes of these ``sizes`` can fill, the larger class more.

    Sizes that are alike are taken in class order; so of sizes that follow a profile of a smaller ratio, all is used.

    Raises:
        UserError: see :func:`class_counts`.
    """
    order = sorted(range(len(sizes)), key=lambda c: -sizes[c])

    def too_large(n_max: int) -> bool:
        counts = _profile(n_max, len(sizes), imbalance_ratio)
        return any(count > sizes[c] for c, count in zip(order, counts, strict=True))

    class_counts(max(sizes), len(sizes), imbalance_ratio)  # refuses what cannot be
    n_max = bisect.bisect_left(range(max(sizes) + 1), True, key=too_large) - 1
    counts = dict(zip(order, class_counts(n_max, len(sizes), imbalance_ratio), strict=True))
    return [counts[c] for c in range(len(sizes))]


def long_tailed_indices(
    labels: np.ndarray, imbalance_ratio: float | None, n_max: int | None = None, seed: int = 0
) -> np.ndarray:
    """Indices of the images kept, int64, class by class.

    Each class in turn is shuffled from its ascending indices by one legacy generator and cut to its count, so the
    subsets of a larger ratio lie within those of a smaller one.

    Args:
        labels: int64 (N,), every class in ``range(labels.max() + 1)`` present
        imbalance_ratio: largest over smallest class; None keeps everything, in class order
        n_max: images of class 0; a class with fewer than the profile asks keeps them all. None: :func:`fitted_counts`

    Raises:
        UserError: see :func:`class_counts`.
    """
    members = _members(labels)
    if imbalance_ratio is None:
        return np.concatenate(members)
    if n_max is None:
        counts = fitted_counts([len(indices) for indices in members], imbalance_ratio)
    else:
        counts = class_counts(n_max, len(members), imbalance_ratio)
    rng = np.random.RandomState(seed)
    for indices in members:
        rng.shuffle(indices)
    return np.concatenate([indices[:count] for indices, count in zip(members, counts, strict=True)])


def balanced_indices(labels: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Indices of a balanced set with exactly ``per_class`` images of every class, int64, class by class.

    A class with enough images gives that many of them without replacement; a smaller one gives whole copies of itself
    and draws the remainder without replacement, so no image appears more than one time above another of its class.

    Raises:
        UserError: ``per_class`` below 1.
    """
    if per_class < 1:
        raise UserError(f"the balanced set needs at least one image a class, got {per_class}")
    rng = np.random.RandomState(seed)
    drawn = []
    for indices in _members(labels):
        copies, remainder = divmod(per_class, len(indices))
        drawn += [np.tile(indices, copies), rng.permutation(indices)[:remainder]]
    return np.concatenate(drawn)


def holdout_split(
    labels: np.ndarray, indices: np.ndarray, fraction: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split ``indices`` class by class into (train, held out); order within each part is kept.

    Every class keeps at least one image for training, so a class of one image is never held out.

    Args:
        labels: int64 labels of the set that ``indices`` points into
        indices: int64, without repeats (split before up-sampling, or copies of one image land on both sides)
        fraction: share of each class to hold out, rounded to the nearest count, in [0, 1)

    Raises:
        UserError: a fraction outside [0, 1).
        ValueError: repeated indices.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction must lie in [0, 1), got {fraction}")
    if len(np.unique(indices)) != len(indices):
        raise ValueError("indices repeat: split before up-sampling")
    rng = np.random.RandomState(seed)
    held = np.zeros(len(indices), dtype=bool)
    kept_labels = labels[indices]
    for c in np.unique(kept_labels):
        positions = rng.permutation(np.flatnonzero(kept_labels == c))
        held[positions[: min(round(fraction * len(positions)), len(positions) - 1)]] = True
    return indices[~held], indices[held]


def class_groups(counts: list[int]) -> dict[str, list[int]]:
    """Classes in ``head``, ``medium`` and ``tail``, ascending within each group.

    Tail: the tenth of the classes (at least one) with the fewest training images, the later class first among equals;
    1 of 10, 10 of 100, 20 of 200, as in the paper. Head: the third with the most. 200 classes also get ``tail10``,
    because the paper's Tiny-ImageNet tail figures have the resolution of ten classes, not of the twenty it names.
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
    return {name: sorted(classes) for name, classes in groups.items()}


def index_hash(indices: np.ndarray) -> str:
    """First 16 hex digits of the SHA-256 of the indices as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()[:16]


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """Ascending int64 indices of each class.

    Raises:
        UserError: a class without an image.
    """
    counts = np.bincount(labels)
    if len(counts) == 0 or counts.min() == 0:
        raise UserError(f"class {int(np.argmin(counts)) if len(counts) else 0} has no training image")
    return np.split(np.argsort(labels, kind="stable").astype(np.int64), np.cumsum(counts)[:-1])
