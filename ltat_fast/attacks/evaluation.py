"""The attacks of an evaluation, by name, each answering one question per image: is it still classified correctly?

Names: ``clean``, ``fgsm``, ``pgd<k>``, ``cw<k>`` (k steps of eps/4) and ``autoattack``.
"""

import re

import torch
from torch import Tensor

from ltat_fast import seeding
from ltat_fast.attacks.autoattack import autoattack
from ltat_fast.attacks.objectives import cross_entropy, cw_margin
from ltat_fast.attacks.pgd import AttackConfig, pgd
from ltat_fast.errors import UserError
from ltat_fast.models.frozen import FrozenTwin


def parse_attacks(names: str) -> list[str]:
    """ "clean,pgd20" to a list of attack names; an unknown one raises UserError."""
    attacks = [name.strip() for name in names.split(",") if name.strip()]
    for name in attacks:
        if name not in ("clean", "fgsm", "autoattack") and not re.fullmatch(r"(pgd|cw)[1-9]\d*", name):
            raise UserError(f"unknown attack {name!r}: choose from clean, fgsm, pgd<steps>, cw<steps>, autoattack")
    if not attacks:
        raise UserError("no attack named: choose from clean, fgsm, pgd<steps>, cw<steps>, autoattack")
    return attacks


def _perturb(name: str, model: FrozenTwin, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """The images of one batch as FGSM, PGD-k or CW-k leaves them."""
    if name == "clean":
        return x
    if name == "fgsm":
        return pgd(model, x, cross_entropy(y), AttackConfig(eps, eps, steps=1, noise="none"))
    kind, steps = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
    objective = cw_margin if kind == "cw" else cross_entropy
    return pgd(model, x, objective(y), AttackConfig(eps, eps / 4, int(steps)), generator)


def correct_under(
    name: str,
    model: FrozenTwin,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    batch_size: int = 256,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Whether each image is classified correctly under the attack ``name``: bool ``(N,)`` on the CPU.

    images: uint8 ``(N, C, H, W)`` and labels: int64 ``(N,)``, on the model's device. PGD-k and CW-k take steps of
    eps / 4 from a uniform start, which for eps 8/255 is the 2/255 of the published evaluations; the start noise is a
    function of the seed, the attack and the place of the batch. part: (r, n) takes batches r, r + n, r + 2 n, ... only.
    """
    starts = range(0, len(images), batch_size)[part[0] :: part[1]]
    if name == "autoattack":
        # All batches at once: pyautoattack re-batches what is left after each of its attacks.
        places = torch.arange(len(images), device=images.device)
        images, mine = images.float() / 255, places[places // batch_size % part[1] == part[0]]
        if len(mine):
            images[mine] = autoattack(model, images[mine], labels[mine], eps, seed=seed, batch_size=batch_size)
    correct = [torch.empty(0, dtype=torch.bool)]
    for start in starts:
        x, y = images[start : start + batch_size], labels[start : start + batch_size]
        if name != "autoattack":
            x = _perturb(name, model, x.float() / 255, y, eps, seeding.stream(x.device, seed, name, start))
        with torch.no_grad():
            correct.append((model(x).argmax(1) == y).cpu())
    return torch.cat(correct)
