"""The paper's metrics: accuracy under each attack, over all classes, per group of classes and per class."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ltat_fast.attacks.evaluation import correct_under
from ltat_fast.engine import distributed
from ltat_fast.models.frozen import FrozenTwin


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


@contextlib.contextmanager
def float32_without_shortcuts() -> Iterator[None]:
    """No TF32 on a GPU, where torch by default lets convolutions round to 10 bits of mantissa."""
    switches = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


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

    images: uint8 ``(N, C, H, W)``, labels: int64 ``(N,)``, on the model's device. limits: the most images to use, by
    attack, "default" for the others. Several processes share the batches; each gets the whole result.
    """
    frozen = FrozenTwin(model, fold_bn=True)
    limits = limits or {}
    world = distributed.current()
    results = {}
    for name in attacks:
        chosen = spread(labels.cpu().numpy(), limits.get(name, limits.get("default")))
        index = torch.from_numpy(chosen).to(images.device)
        y = labels[index]
        part = (world.rank, world.size)
        with float32_without_shortcuts():
            mine = correct_under(name, frozen, images[index], y, eps, batch_size=batch_size, part=part)
        correct = torch.cat(distributed.gather_in_turn(list(mine.split(batch_size))))
        results[name] = accuracies(correct, y, groups, num_classes)
        say(f"  {name}: {results[name]['all']:.2f} % of {len(y)} images")
    return results
