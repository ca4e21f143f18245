"""AutoAttack (Croce and Hein 2020) through its authors' package ``pyautoattack``."""

import logging

import torch
from torch import Tensor, nn

from ltat_fast.errors import UserError


def autoattack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    batch_size: int = 250,
    version: str = "standard",
) -> Tensor:
    """Adversarial examples by AutoAttack, L_inf: APGD-CE, targeted APGD-DLR, targeted FAB and Square, worst case.

    model: in eval mode, from images in [0, 1] to logits. x: ``(B, C, H, W)`` float32. labels: int64 ``(B,)``.
    version: "standard", "plus" or "rand". Points the model already gets wrong, or that no attack breaks, come back
    as they were. With fewer than 10 classes the targeted attacks take every wrong class. The DLR loss needs 3 classes
    and its targeted form 4, so with fewer these attacks are left out.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise UserError(f"AutoAttack needs the package pyautoattack ({error}); pip install pyautoattack") from None

    logging.getLogger("auto-attack").setLevel(logging.WARNING)
    attack = AutoAttack(model, device=x.device, eps=eps, norm="Linf", seed=seed, version=version)
    with torch.no_grad():
        num_classes = model(x[:1]).shape[1]
    targets = min(9, num_classes - 1)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    needed = {"apgd-dlr": 3, "apgd-t": 4}
    attack.attacks_to_run = [name for name in attack.attacks_to_run if num_classes >= needed.get(name, 2)]
    # It seeds torch's global generators.
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        x_adv, _ = attack.run_standard_evaluation(x, labels, batch_size=batch_size)
    return x_adv.detach()
