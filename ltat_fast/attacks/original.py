"""AutoAttack as its authors wrote it: the package ``pyautoattack``. It is the judge of our own, :mod:`.autoattack`.

Source: Croce, Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
ICML 2020.
"""

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from ltat_fast.attacks.balls import Norm
from ltat_fast.errors import UserError

Version = Literal["standard", "plus", "rand"]


def original_autoattack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = 250,
    version: Version = "standard",
) -> Tensor:
    """Return adversarial examples of AutoAttack in the L_inf or the L2 ball, float32 ``(N, C, H, W)``.

    The standard version is the worst case of APGD-CE, targeted APGD-DLR, targeted FAB and Square.

    model: in eval mode, from images in [0, 1] to logits ``(N, K)``. x: float32 ``(N, C, H, W)``. labels: int64
    ``(N,)``. version: "standard", "plus" or "rand". An image is returned unchanged if the model misclassifies it
    already, or if no attack succeeds. With fewer than 10 classes the targeted attacks use every wrong class. APGD-DLR
    needs 3 classes and its targeted form 4; with fewer classes they are skipped.

    Raises UserError if ``pyautoattack`` is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise UserError(f"AutoAttack needs the package pyautoattack ({error}): run pip install pyautoattack") from None

    logging.getLogger("auto-attack").setLevel(logging.WARNING)
    attack = AutoAttack(
        model, device=x.device, eps=eps, norm="L2" if norm == "l2" else "Linf", seed=seed, version=version
    )
    with torch.no_grad():
        num_classes = model(x[:1]).shape[1]
    targets = min(9, num_classes - 1)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    assert attack.attacks_to_run is not None  # its constructor sets it for each of these versions
    min_classes = {"apgd-dlr": 3, "apgd-t": 4}
    attack.attacks_to_run = [name for name in attack.attacks_to_run if num_classes >= min_classes.get(name, 2)]
    # The package seeds the global generators of torch. fork_rng restores them.
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        x_adv, _ = attack.run_standard_evaluation(x, labels, batch_size=batch_size)
    return x_adv.detach()
