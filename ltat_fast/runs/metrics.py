"""Accuracies from which images were classified correctly: all, groups of classes, each class, worst case."""

import numpy as np
import torch
from torch import Tensor


def accuracies(correct: Tensor, labels: Tensor, groups: dict[str, list[int]], num_classes: int) -> dict:
    """Percentages from ``correct`` (bool ``(N,)``): ``all``, each group of classes, and ``per_class``.

    A group or class without images gives None.
    """
    correct, labels = correct.cpu().numpy(), labels.cpu().numpy()

    def percent(chosen) -> float | None:
        return float(100 * correct[chosen].mean()) if chosen.any() else None

    result = {"all": percent(np.ones_like(correct))}
    result |= {name: percent(np.isin(labels, classes)) for name, classes in groups.items()}
    return result | {"per_class": [percent(labels == c) for c in range(num_classes)], "images": len(correct)}


def spread(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of at most ``limit`` images, evenly spaced through the images sorted by class."""
    order = np.argsort(labels, kind="stable")
    if limit is None or limit >= len(order):
        return np.arange(len(order))
    return np.sort(order[np.linspace(0, len(order) - 1, limit).round().astype(np.int64)])


def pack(bits: np.ndarray) -> str:
    """Bools ``(N,)`` as a hexadecimal number, 4 to a digit, the first in the highest bit."""
    return np.packbits(bits).tobytes().hex()


def unpack(text: str, count: int) -> np.ndarray:
    """The ``count`` bools that :func:`pack` made ``text`` of. Raises ValueError if it is of another length."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{len(packed)} bytes do not hold {count} bits")
    return np.unpackbits(packed, count=count).astype(bool)


def on_most_images(results: dict[str, dict], count: int) -> dict[str, dict]:
    """The results over all of the largest set of images that at least two have in common: what may be a worst case.

    results: as for :func:`worst_case`, of a set of ``count`` images. Empty if no two have the same images.
    """
    seen = {name: _seen(result, count) for name, result in results.items()}
    groups = [(images, [name for name in seen if (seen[name] >= images).all()]) for images in seen.values()]
    shared = [(images.sum(), len(names), names) for images, names in groups if len(names) > 1]
    _, _, names = max(shared, key=lambda group: group[:2], default=(0, 0, []))
    return {name: results[name] for name in names}


def _seen(result: dict, count: int) -> np.ndarray:
    """Which of ``count`` images a result is over, bool."""
    return unpack(result["chosen"], count) if "chosen" in result else np.ones(count, bool)


def worst_case(
    results: dict[str, dict], labels: Tensor, groups: dict[str, list[int]], num_classes: int
) -> dict[str, list[str] | float | None]:
    """Accuracies where an image counts as correct only if it is under every attack of ``results``.

    results: as :func:`evaluate` returns them, all over images out of the same set. labels: of that set, int64 ``(N,)``.
    Images that a limit kept from one of the attacks are left out.
    """
    seen, correct = np.ones(len(labels), bool), np.ones(len(labels), bool)
    for result in results.values():
        chosen = _seen(result, len(labels))
        seen &= chosen
        correct[chosen] &= unpack(result["correct"], result["images"])
    correct, labels = torch.from_numpy(correct[seen]), labels.cpu()[torch.from_numpy(seen)]
    return {"attacks": list(results), **accuracies(correct, labels, groups, num_classes)}
