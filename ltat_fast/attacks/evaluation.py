"""Evaluate any network under attacks, with one call: :func:`evaluate`. docs/evaluation.md shows it in use."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ltat_fast.attacks.balls import Norm
from ltat_fast.attacks.by_name import correct_under, finite_logits, parse_attacks, unit
from ltat_fast.attacks.results import Result
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.libraries import require_logits
from ltat_fast.models.precision import without_tf32


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: str | Sequence[str],
    *,
    eps: float,
    norm: Norm = "linf",
    num_classes: int | None = None,
    groups: Mapping[str, list[int]] | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Result]:
    """Return the result of each attack on ``model``: ``evaluate(...)["pgd20"].all`` is the accuracy in percent.

    model: any module from images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)`` in float32, which normalises the
    images itself. It is attacked in eval mode and in float32 without TF32; its mode, buffers and gradients do not
    change. images: ``(N, C, H, W)``, uint8, or float in [0, 1]; labels: int64 ``(N,)``; on the device of the model.
    attacks: names such as "clean", "pgd20" and "autoattack" (docs/evaluation.md), as a list or separated by commas.
    eps: radius of the ball of ``norm``, in units of pixels in [0, 1]. num_classes: K, to refuse another number of
    outputs. groups: classes by the name of their group; ``result.groups`` then has the accuracy of each.
    batch_size: images per batch. seed: of the random starts and of AutoAttack.

    ``result.correct`` says which images were classified correctly: ``unpack(result.correct, len(images))``, see
    :mod:`ltat_fast.attacks.results`. An image whose logits are not finite is never correct; ``result.not_finite`` of
    "clean" counts such images.

    Raises UserError if an attack is unknown, or if the outputs are not such logits; ValueError if images, labels or
    eps cannot be used.
    """
    names = parse_attacks(attacks if isinstance(attacks, str) else ",".join(attacks))
    require_images(images, labels)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be above 0, not {eps}")
    twin = FrozenTwin(model, fold_bn=True)
    with torch.no_grad():
        logits = twin(unit(images, torch.arange(min(2, len(images)), device=images.device)))
    num_classes = require_logits("the model", logits, min(2, len(images)), num_classes)
    if labels.amin() < 0 or labels.amax() >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, the classes of the model")
    results = {}
    for name in names:
        with without_tf32():
            correct = correct_under(name, twin, images, labels, eps, norm=norm, batch_size=batch_size, seed=seed)
            unusable = 0 if name != "clean" else int((~finite_logits(twin, images, batch_size)).sum())
        results[name] = Result.from_correct(correct, labels, dict(groups or {}), num_classes, not_finite=unusable)
    return results


def require_images(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless ``images`` and ``labels`` are what :func:`evaluate` takes."""
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"images must be of shape (N, C, H, W), not {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels must be int64 of shape ({len(images)},), not {found}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8, or float in [0, 1], not {images.dtype}")
    if images.is_floating_point() and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError(f"float images must lie in [0, 1]; these lie in [{images.amin():g}, {images.amax():g}]")
