"""The paper's metrics: accuracy under each attack and the worst of them, for all, groups of and single classes."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ltat_fast.attacks.checks import run_checks
from ltat_fast.attacks.evaluation import correct_under
from ltat_fast.engine import distributed
from ltat_fast.engine.device import tf32
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.pixels import to_unit


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


def float32_without_shortcuts() -> contextlib.AbstractContextManager[None]:
    """No TF32 on a GPU, where torch by default lets convolutions round to 10 bits of mantissa."""
    return tf32(False)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Sequence[str],
    groups: dict[str, list[int]],
    num_classes: int,
    eps: float,
    *,
    batch_size: int,
    limits: dict[str, int | None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict]:
    """Accuracies of ``model`` in eval mode and float32 under each attack.

    images: uint8 ``(N, C, H, W)``, labels: int64 ``(N,)``, on the model's device. limits: the most images to use,
    "default", and the most of those by attack. Several processes share the batches; each gets the whole result. Beside
    the accuracies it has "correct", which images were, and "chosen", which were used if not all: see :func:`pack`.
    """
    frozen = FrozenTwin(model, fold_bn=True)
    limits = limits or {}
    world = distributed.current()
    results = {}
    classes = labels.cpu().numpy()
    every = spread(classes, limits.get("default"))
    for name in attacks:
        chosen = every[spread(classes[every], limits.get(name))]
        places = torch.from_numpy(chosen)
        x, y = images[places.to(images.device)], labels[places.to(images.device)]
        part = (world.rank, world.size)
        with float32_without_shortcuts():
            mine = correct_under(name, frozen, x, y, eps, batch_size=batch_size, places=places, part=part)
        correct = torch.cat(distributed.gather_in_turn(list(mine.split(batch_size))))
        results[name] = accuracies(correct, y, groups, num_classes) | {"correct": pack(correct.numpy())}
        if len(chosen) < len(images):
            results[name]["chosen"] = pack(np.isin(np.arange(len(images)), chosen))
        say(f"  {name}: {results[name]['all']:.2f} % of {len(y)} images")
    return results


def check(model: nn.Module, images: Tensor, labels: Tensor, eps: float, say: Callable[[str], None]) -> list[dict]:
    """The checks of :mod:`ltat_fast.attacks.checks` on 64 of the images, as they go into eval.json; failures are said.

    They look at what :func:`evaluate` attacks. Arguments as there.
    """
    index = torch.from_numpy(spread(labels.cpu().numpy(), 64)).to(images.device)
    with float32_without_shortcuts():
        checks = run_checks(FrozenTwin(model, fold_bn=True), to_unit(images[index]), labels[index], eps)
    failed = [check for check in checks if not check.passed]
    say(
        f"  checks: {len(checks) - len(failed)} of {len(checks)} passed"
        + (": the model may be overrated" * bool(failed))
    )
    for check in failed:
        say(f"  FLAG {check.name}: {check.detail}")
    return [dataclasses.asdict(check) for check in checks]
