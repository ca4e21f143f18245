"""Which test images an evaluation uses, and the worst case over the results of several attacks."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ltat_fast.attacks.results import Result, unpack


def spread(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of at most ``limit`` images, evenly spaced through the images sorted by class."""
    order = np.argsort(labels, kind="stable")
    if limit is None or limit >= len(order):
        return np.arange(len(order))
    return np.sort(order[np.linspace(0, len(order) - 1, limit).round().astype(np.int64)])


def on_most_images(results: dict[str, Result], count: int) -> dict[str, Result]:
    """The results that a worst case combines: those over the largest set of images that at least two of them share.

    results: by attack, on a test set of ``count`` images. Empty if no two of them share their images.
    """
    attacked = {name: result.attacked(count) for name, result in results.items()}
    groups = [(images, [name for name in attacked if (attacked[name] >= images).all()]) for images in attacked.values()]
    shared = [(images.sum(), len(names), names) for images, names in groups if len(names) > 1]
    _, _, names = max(shared, key=lambda group: group[:2], default=(0, 0, []))
    return {name: results[name] for name in names}


def worst_case(results: dict[str, Result], labels: Tensor, groups: dict[str, list[int]], num_classes: int) -> Result:
    """The result in which an image counts as correct only if it is correct under every attack of ``results``.

    labels: of the whole test set, int64 ``(N,)``. Only images that every attack was run on are counted. The result has
    no ``correct`` and no ``chosen``.
    """
    common, correct = np.ones(len(labels), bool), np.ones(len(labels), bool)
    for result in results.values():
        attacked = result.attacked(len(labels))
        common &= attacked
        correct[attacked] &= unpack(result.correct, result.images)
    labels = labels.cpu()[torch.from_numpy(common)]
    worst = Result.from_correct(torch.from_numpy(correct[common]), labels, groups, num_classes)
    return dataclasses.replace(worst, correct=None, attacks=tuple(results))
