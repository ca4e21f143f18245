"""Accuracy in ten groups of classes, from the most to the least frequent.

Cho, Lee, Kim, "Long-tailed Adversarial Training with Self-Distillation" (ICLR 2025), appendix B, figure 8: the classes
of CIFAR-100 in ten groups by their number of training images. With ten classes each group is one class. The paper does
not say how it orders classes of equal frequency; here the class with the lower index comes first.
"""

from collections.abc import Sequence

import numpy as np


def frequency_groups(counts: Sequence[int], groups: int = 10) -> list[list[int]]:
    """Split the classes, the most frequent first, into at most ``groups`` groups whose sizes differ by at most one.

    counts: training images per class.
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    return [group.tolist() for group in np.array_split(order, min(groups, len(order)))]


def classwise(per_class: Sequence[float | None], images: Sequence[int], counts: Sequence[int]) -> list[float | None]:
    """Accuracy in each of :func:`frequency_groups`; None for a group without images.

    per_class: accuracy per class, None for a class without images. images: test images per class, used as weights.
    counts: training images per class.
    """
    means = []
    for group in frequency_groups(counts):
        known = [c for c in group if per_class[c] is not None and images[c]]
        total = sum(images[c] for c in known)
        means.append(sum(per_class[c] * images[c] for c in known) / total if total else None)
    return means
