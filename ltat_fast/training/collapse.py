"""Detect catastrophic overfitting: a network that resists its one-step training attack, but not a real attack.

It happens within one epoch: the accuracy under PGD falls to zero while the accuracy under the training attack jumps.
Source: Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ltat_fast.attacks import AttackConfig, cross_entropy, pgd
from ltat_fast.training import distributed
from ltat_fast.training.micro_batches import join
from ltat_fast.training.step import TrainStep

ONE_STEP, PGD10 = "train_one_step", "train_pgd10"  # entries of a record: accuracy on one training batch, in percent
GAP = 20.0  # percentage points
SHARE = 0.5


class Collapsed(Exception):
    """The one-step training attack has become useless, and ``--on-collapse stop`` ends the run."""


def one_step_health(step: TrainStep, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Return the accuracy, in percent, on a batch under the training attack of ``step`` and under PGD-10.

    x: float32 images ``(B, C, H, W)`` in [0, 1]. y: int64 labels ``(B,)``. eps: radius of PGD-10. Both attacks ascend
    the cross-entropy on the frozen twin. Nothing is changed. All processes must call this function.
    """
    step.frozen.refresh()
    attacks = {ONE_STEP: step.attack, PGD10: AttackConfig(eps=eps, step_size=eps / 4, steps=10)}
    correct = []
    for config in attacks.values():
        generator = torch.Generator(x.device).manual_seed(0)
        of_parts = []
        for part, labels in zip(step.split(x), step.split(y), strict=True):
            x_adv = pgd(step.frozen, part, cross_entropy(labels), replace(config, noise="uniform"), generator)
            with torch.no_grad():
                of_parts.append(step.frozen(x_adv).argmax(1) == labels)
        correct.append(join(of_parts).float().mean())
    percent = distributed.mean_over_processes(100 * torch.stack(correct)).tolist()
    return dict(zip(attacks, percent, strict=True))


def collapse(health: dict[str, float]) -> str:
    """Return what is wrong with a result of :func:`one_step_health`, in one sentence, or an empty string."""
    one_step, pgd10 = health[ONE_STEP], health[PGD10]
    if one_step - pgd10 <= GAP or pgd10 >= SHARE * one_step:
        return ""
    return (
        f"the one-step attack has collapsed (catastrophic overfitting): on a training batch, {one_step:.0f} % are "
        f"correct under it, but {pgd10:.0f} % under PGD-10"
    )
