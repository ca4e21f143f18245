"""Run one evaluation attack, given by its name; return per image whether it is still classified correctly.

- ``clean``: no attack.
- ``fgsm``: one step of eps from the image.
- ``pgd<k>``, ``cw<k>``, ``scaled-pgd<k>``: k steps of eps / 4 that ascend the cross-entropy, the CW margin, or the
  cross-entropy of rescaled logits. The suffix ``x<r>`` takes the worst of r random starts: ``pgd20x5``.
- ``autoattack``, ``autoattack-plus``, ``autoattack-rand``: the versions of AutoAttack.

docs/evaluation.md describes the protocol.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltat_fast import seeding
from ltat_fast.attacks.autoattack import Version, autoattack
from ltat_fast.attacks.objectives import cross_entropy, cw_margin, scaled_cross_entropy
from ltat_fast.attacks.pgd import AttackConfig, pgd
from ltat_fast.errors import UserError
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.pixels import to_unit

if TYPE_CHECKING:  # the attacks do not need the datasets
    from ltat_fast.data import HostImages

AUTOATTACK: dict[str, Version] = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}
OBJECTIVES = {"pgd": cross_entropy, "cw": cw_margin, "scaled-pgd": scaled_cross_entropy}
CHOICES = f"clean, fgsm, pgd<k>, cw<k>, scaled-pgd<k> (k steps; suffix x<r>: r starts), {', '.join(AUTOATTACK)}"
_ITERATED = re.compile(rf"({'|'.join(OBJECTIVES)})([1-9]\d*)(?:x([1-9]\d*))?")
_BLOCK = 64


def parse_attacks(names: str) -> list[str]:
    """Return the attack names in a comma-separated list such as "clean,pgd20x5", each once.

    Raises UserError if a name is unknown or the list is empty.
    """
    attacks = dict.fromkeys(name.strip().removesuffix("x1") for name in names.split(",") if name.strip())
    for name in attacks:
        if name not in ("clean", "fgsm", *AUTOATTACK) and not _ITERATED.fullmatch(name):
            raise _unknown(name)
    if not attacks:
        raise UserError(f"no attack named: choose from {CHOICES}")
    return list(attacks)


def _unknown(name: str) -> UserError:
    return UserError(f"unknown attack {name!r}: choose from {CHOICES}")


def correct_under(
    name: str,
    model: FrozenTwin,
    images: "Tensor | HostImages",
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    batch_size: int = 256,
    indices: Tensor | None = None,
    part: tuple[int, int] = (0, 1),
    advance: Callable[..., None] = lambda images, **shown: None,
) -> Tensor:
    """Return whether each image is classified correctly under the attack ``name``: bool ``(N,)`` on the CPU.

    images: uint8 ``(N, C, H, W)`` and labels: int64 ``(N,)``, for the model's device. eps: radius of the L_inf ball.
    indices: int64 ``(N,)`` on the CPU, the index of each image in its dataset; ``arange(N)`` if None. The start noise
        of an image depends on the seed, the attack, the number of the start and this index, not on the batch.
        AutoAttack is the exception: it seeds every batch with the same seed.
    part: (r, n) selects the batches r, r + n, r + 2 n, ...; the result then covers only their images.
    advance: called after each batch with its number of images, and with what to show: the share of all images so far
        that are classified correctly, as robust="47.1 %", or as correct="97.8 %" for "clean".

    Raises UserError if the name is unknown.
    """
    indices = torch.arange(len(images)) if indices is None else indices
    batches = torch.arange(len(images)).split(batch_size)[part[0] :: part[1]]
    if not batches:
        return torch.empty(0, dtype=torch.bool)
    if name in AUTOATTACK:
        return _under_autoattack(name, model, images, labels, eps, seed, batch_size, batches)
    correct = []
    for batch in batches:
        x, y = to_unit(images[batch]), labels[batch]
        correct.append(_under_restarts(name, model, x, y, indices[batch], eps, seed).cpu())
        share = f"{100 * torch.cat(correct).float().mean():.1f} %"
        advance(len(batch), **{"correct" if name == "clean" else "robust": share})
    return torch.cat(correct)


def _under_autoattack(name, model, images, labels, eps, seed, batch_size, batches: tuple[Tensor, ...]) -> Tensor:
    """Attack all batches in one call, because pyautoattack forms new batches of the images that are left."""
    index = torch.cat(batches)
    x, y = to_unit(images[index]), labels[index]
    x_adv = autoattack(model, x, y, eps, seed=seed, batch_size=batch_size, version=AUTOATTACK[name])
    in_batches = zip(x_adv.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([_is_correct(model, *batch).cpu() for batch in in_batches])


def _under_restarts(
    name: str, model: FrozenTwin, x: Tensor, y: Tensor, indices: Tensor, eps: float, seed: int
) -> Tensor:
    """Return whether each image of a batch is correct from every start. Misclassified images are not attacked again."""
    if name == "clean":
        return _is_correct(model, x, y)
    if name == "fgsm":
        return _is_correct(model, pgd(model, x, cross_entropy(y), AttackConfig(eps, eps, steps=1, noise="none")), y)
    iterated = _ITERATED.fullmatch(name)
    if iterated is None:
        raise _unknown(name)
    kind, steps, restarts = iterated.groups()
    config, stream = AttackConfig(eps, eps / 4, int(steps)), (seed, f"{kind}{steps}")
    correct = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for restart in range(int(restarts or 1)):
        left = correct.nonzero().squeeze(1)
        if len(left) == 0:
            break
        noise = start_noise(indices[left.cpu()], x.shape[1:], eps, x.device, *stream, restart)
        start = (x[left] + noise).clamp_(0, 1)
        correct[left] = _is_correct(model, pgd(model, x[left], OBJECTIVES[kind](y[left]), config, start=start), y[left])
    return correct


def start_noise(indices: Tensor, shape: torch.Size, eps: float, device: torch.device, *stream: int | str) -> Tensor:
    """Return uniform noise in [-eps, eps], float32 ``(N, *shape)``.

    The noise of an image depends only on ``stream`` and on its index in ``indices``, int64 ``(N,)`` on the CPU. It is
    drawn for blocks of consecutive indices, because one generator per image would cost more than the noise.
    """
    noise = torch.empty(len(indices), *shape, device=device)
    blocks = indices // _BLOCK
    for block in blocks.unique().tolist():
        generator = seeding.stream(device, *stream, block)
        drawn = torch.empty(_BLOCK, *shape, device=device).uniform_(-eps, eps, generator=generator)
        inside = (blocks == block).nonzero().squeeze(1)
        noise[inside] = drawn[indices[inside] % _BLOCK]
    return noise


@torch.no_grad()
def _is_correct(model: FrozenTwin, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y
