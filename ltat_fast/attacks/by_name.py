"""Run one evaluation attack, given by its name; return per image whether it is still classified correctly.

- ``clean``: no attack.
- ``fgsm``: one step of eps from the image.
- ``pgd<k>``, ``cw<k>``, ``scaled-pgd<k>``: k steps of eps / 4 that ascend the cross-entropy, the CW margin, or the
  cross-entropy of rescaled logits. The suffix ``x<r>`` takes the worst of r random starts: ``pgd20x5``.
- ``pgd<k>-t``: k steps towards each of the 9 wrong classes with the largest logits; the suffix ``x<r>`` as above.
- ``autoattack``: the standard version of AutoAttack. Its parts ``apgd-ce``, ``apgd-t``, ``fab-t``, ``square`` alone.
- ``autoattack-original``, ``autoattack-plus``, ``autoattack-rand``: the package of AutoAttack's authors.

docs/evaluation.md describes the protocol.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ltat_fast.attacks.autoattack import PARTS, TARGETS, Images, Progress, Store, autoattack
from ltat_fast.attacks.balls import Ball, Norm
from ltat_fast.attacks.noise import image_noise, normal, uniform
from ltat_fast.attacks.objectives import (
    Objective,
    cross_entropy,
    cw_margin,
    scaled_cross_entropy,
    targeted_cross_entropy,
)
from ltat_fast.attacks.original import Version, original_autoattack
from ltat_fast.attacks.pgd import AttackConfig, pgd
from ltat_fast.errors import UserError
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.pixels import to_unit

AUTOATTACK: dict[str, Version] = {
    "autoattack": "standard",
    "autoattack-original": "standard",
    "autoattack-plus": "plus",
    "autoattack-rand": "rand",
}
"""the versions of AutoAttack; all but the first are run by the package of its authors"""
OWN_PARTS: dict[str, Sequence[str]] = {"autoattack": PARTS, **{part: (part,) for part in PARTS}}
OBJECTIVES: dict[str, Callable[[Tensor], Objective]] = {
    "pgd": cross_entropy,
    "cw": cw_margin,
    "scaled-pgd": scaled_cross_entropy,
}
CHOICES = (
    "clean, fgsm, pgd<k>, cw<k>, scaled-pgd<k> (k steps; suffix x<r>: r starts; pgd<k>-t: targeted), "
    f"{', '.join(dict.fromkeys([*PARTS, *AUTOATTACK]))}"
)
_ITERATED = re.compile(rf"(?:(pgd)([1-9]\d*)-(t)|({'|'.join(OBJECTIVES)})([1-9]\d*))(?:x([1-9]\d*))?")


class _Selected:
    """Some of the images, loaded when they are asked for. index: int64 ``(N,)`` on the CPU."""

    def __init__(self, images: Images, index: Tensor):
        self._images, self._index = images, index
        self.device, self.shape = images.device, (len(index), *images.shape[1:])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, places: Tensor) -> Tensor:
        return self._images[self._index[places.cpu()].to(self.device)]


def unit(images: Images, index: Tensor) -> Tensor:
    """Return the images ``index``, int64 ``(n,)``, as float32 in [0, 1]."""
    chosen = images[index]
    return to_unit(chosen) if chosen.dtype == torch.uint8 else chosen.float()


def parse_attacks(names: str) -> list[str]:
    """Return the attack names in a comma-separated list such as "clean,pgd20x5", each once.

    Raises UserError if a name is unknown or the list is empty.
    """
    attacks = dict.fromkeys(name.strip().removesuffix("x1") for name in names.split(",") if name.strip())
    for name in attacks:
        if name not in ("clean", "fgsm", *AUTOATTACK, *PARTS) and not _ITERATED.fullmatch(name):
            raise _unknown(name)
    if not attacks:
        raise UserError(f"no attack named: choose from {CHOICES}")
    return list(attacks)


def _unknown(name: str) -> UserError:
    return UserError(f"unknown attack {name!r}: choose from {CHOICES}")


def correct_under(
    name: str,
    model: FrozenTwin,
    images: Images,
    labels: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = 256,
    indices: Tensor | None = None,
    part: tuple[int, int] = (0, 1),
    advance: Callable[..., None] = lambda images, **shown: None,
    store: Store | None = None,
) -> Tensor:
    """Return whether each image is classified correctly under the attack ``name``: bool ``(N,)`` on the CPU.

    images: ``(N, C, H, W)``, uint8 or float32 in [0, 1], and labels: int64 ``(N,)``, for the model's device.
    eps: radius of the ball, in units of pixels in [0, 1]. norm: "linf" or "l2".
    indices: int64 ``(N,)`` on the CPU, the index of each image in its dataset; ``arange(N)`` if None. The start noise
        of an image depends on the seed, the attack, the number of the start and this index, not on the batch.
        AutoAttack's package is the exception: it seeds every batch with the same seed.
    part: (r, n) selects the batches r, r + n, r + 2 n, ...; the result then covers only their images.
    advance: called as the attack proceeds with the number of images since the last call (for AutoAttack, a share of
        them, an estimate), and with what to show: the share of images that are classified correctly so far, as
        robust="47.1 %", or as correct="97.8 %" for "clean".
    store: keeps an unfinished ``autoattack`` or part of it, see :func:`~ltat_fast.attacks.autoattack.autoattack`.

    Raises UserError if the name is unknown.
    """
    indices = torch.arange(len(images)) if indices is None else indices
    batches = torch.arange(len(images)).split(batch_size)[part[0] :: part[1]]
    if not batches:
        return torch.empty(0, dtype=torch.bool)
    if name in OWN_PARTS:
        index = torch.cat(batches)
        own = _Selected(images, index)
        y, place = labels[index.to(labels.device)], indices[index]
        options = {"norm": norm, "seed": seed, "batch_size": batch_size, "indices": place, "store": store}
        return autoattack(model, own, y, eps, parts=OWN_PARTS[name], on_progress=_advancing(advance), **options).robust
    if name in AUTOATTACK:
        return _under_original(name, model, images, labels, Ball(norm, eps), seed, batch_size, batches)
    correct = []
    for batch in batches:
        x, y = unit(images, batch), labels[batch]
        correct.append(_under_restarts(name, model, x, y, indices[batch], Ball(norm, eps), seed).cpu())
        share = f"{100 * torch.cat(correct).float().mean():.1f} %"
        advance(len(batch), **{"correct" if name == "clean" else "robust": share})
    return torch.cat(correct)


def _advancing(advance: Callable[..., None]) -> Callable[[Progress], None]:
    """Return the function that tells ``advance`` of :func:`correct_under` about the progress of AutoAttack."""
    done = 0.0

    def tell(progress: Progress) -> None:
        nonlocal done
        now = max(done, progress.share * progress.images)  # an estimate, which can fall
        advance(now - done, robust=f"{100 * progress.robust / progress.images:.1f} %", attack=progress.part)
        done = now

    return tell


def _under_original(name, model, images, labels, ball, seed, batch_size, batches: tuple[Tensor, ...]) -> Tensor:
    """Attack all batches in one call, because pyautoattack forms new batches of the images that are left."""
    index = torch.cat(batches)
    x, y = unit(images, index), labels[index]
    options = {"seed": seed, "batch_size": batch_size, "version": AUTOATTACK[name]}
    x_adv = original_autoattack(model, x, y, ball.eps, norm=ball.norm, **options)
    in_batches = zip(x_adv.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([is_correct(model, *batch).cpu() for batch in in_batches])


def _under_restarts(
    name: str, model: FrozenTwin, x: Tensor, y: Tensor, indices: Tensor, ball: Ball, seed: int
) -> Tensor:
    """Return whether each image of a batch is correct from every start. Misclassified images are not attacked again."""
    if name == "clean":
        return is_correct(model, x, y)
    eps = ball.eps
    if name == "fgsm":
        config = AttackConfig(eps, eps, steps=1, noise="none", norm=ball.norm)
        return is_correct(model, pgd(model, x, cross_entropy(y), config), y)
    iterated = _ITERATED.fullmatch(name)
    if iterated is None:
        raise _unknown(name)
    (kind, steps), targeted = iterated.group(1, 2) if iterated[3] else iterated.group(4, 5), bool(iterated[3])
    config, stream = AttackConfig(eps, eps / 4, int(steps), norm=ball.norm), (seed, f"{kind}{steps}{'-t' * targeted}")
    targets = _wrong_classes(model, x, y) if targeted else y[:, None]
    objective = targeted_cross_entropy if targeted else OBJECTIVES[kind]
    correct = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for number in range(int(iterated[6] or 1) * targets.shape[1]):
        left = correct.nonzero().squeeze(1)
        if len(left) == 0:
            break
        noise = start_noise(indices[left.cpu()], x.shape[1:], eps, x.device, *stream, number, norm=ball.norm)
        start, target = (x[left] + noise).clamp_(0, 1), targets[left, number % targets.shape[1]]
        correct[left] = is_correct(model, pgd(model, x[left], objective(target), config, start=start), y[left])
    return correct


@torch.no_grad()
def _wrong_classes(model: FrozenTwin, x: Tensor, y: Tensor) -> Tensor:
    """Return the 9 wrong classes with the largest logits, or all if there are fewer: int64 ``(B, targets)``."""
    logits = model(x).scatter(1, y[:, None], -torch.inf)
    return logits.argsort(1, descending=True)[:, : min(TARGETS, logits.shape[1] - 1)]


def start_noise(
    indices: Tensor,
    shape: torch.Size,
    eps: float,
    device: torch.device,
    *stream: int | str,
    norm: Norm = "linf",
) -> Tensor:
    """Return random noise in the ball of radius ``eps``, float32 ``(N, *shape)``.

    norm: "linf", uniform in the ball; "l2", a uniform direction and a uniform length up to ``eps``.
    The noise of an image depends only on ``stream`` and on its index in ``indices``, int64 ``(N,)`` on the CPU.
    """
    if norm == "linf":
        return image_noise(indices, shape, device, uniform(-eps, eps), *stream)
    length = image_noise(indices, (1,) * len(shape), device, uniform(0, eps), *stream, "length")
    return length * Ball("l2", eps).unit(image_noise(indices, shape, device, normal, *stream))


@torch.no_grad()
def is_correct(model: FrozenTwin, x: Tensor, y: Tensor) -> Tensor:
    """Return whether each image is classified correctly, bool ``(B,)``. Logits that are not finite never are."""
    logits = model(x)
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


@torch.no_grad()
def finite_logits(model: FrozenTwin, images: Images, batch_size: int = 256, part: tuple[int, int] = (0, 1)) -> Tensor:
    """Return whether all logits of each image are finite: bool ``(N,)`` on the CPU. part: as in correct_under."""
    batches = torch.arange(len(images)).split(batch_size)[part[0] :: part[1]]
    finite = [model(unit(images, batch)).isfinite().all(1).cpu() for batch in batches]
    return torch.cat(finite) if finite else torch.empty(0, dtype=torch.bool)
