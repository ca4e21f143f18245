"""The paper's metrics: accuracy under each attack and the worst of them, for all, groups of and single classes."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ltat_fast.attacks.by_name import correct_under
from ltat_fast.attacks.checks import run_checks
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.pixels import to_unit
from ltat_fast.runs.metrics import accuracies, pack, spread
from ltat_fast.training import distributed
from ltat_fast.training.device import without_tf32


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
        with without_tf32():
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
    with without_tf32():
        checks = run_checks(FrozenTwin(model, fold_bn=True), to_unit(images[index]), labels[index], eps)
    failed = [check for check in checks if not check.passed]
    say(
        f"  checks: {len(checks) - len(failed)} of {len(checks)} passed"
        + (": the model may be overrated" * bool(failed))
    )
    for check in failed:
        say(f"  FLAG {check.name}: {check.detail}")
    return [dataclasses.asdict(check) for check in checks]
