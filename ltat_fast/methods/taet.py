"""TAET: two-stage adversarial equalization training. First standard training, then a loss over the classes of a batch.

    progress <= attack_begin:  L = CE(f(x), y)
    later:  L = mean_weight mean_c L_c + variance_weight mean_c (L_c - mean L)^2 + share_weight sum_c (L_c / sum L)^2
            L_c: mean of CE(f(x'), y) over the images of class c in the batch, 0 without such an image;   x' = PGD on CE

Source: Wang, Guo, Liu, Wang, Wu, Liu, Yin, Liu, "TAET: Two-Stage Adversarial Equalization Training on Long-Tailed
Distributions", CVPR 2025.

As in the authors' code:
- The means and the sums are over all classes, also over those without an image in the batch.
- The attack starts from Gaussian noise.
- The first stage is 40 of 100 epochs, and each of the three weights is 0.1.

Departures:
- The start of the attack is clipped to [0, 1].
- Threat model and schedule are those of the run (in their code: eps 0.031, step 0.003).
- With several processes, L_c is the mean over the images of all processes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ltat_fast.methods.base import Method, Noise
from ltat_fast.methods.distillation import widen


@dataclass
class Taet(Method):
    """min_w  CE(f(x), y), then a mean_c L_c + b mean_c (L_c - mean L)^2 + g sum_c (L_c / sum L)^2 on x',
    a = mean_weight, b = variance_weight, g = share_weight."""

    name: ClassVar[str] = "taet"
    noise: ClassVar[Noise] = "gaussian"
    couples_images: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True

    attack_begin: float = 0.4
    """share of the epochs that train on clean images with cross-entropy, without attack, before the second stage"""
    mean_weight: float = 0.1
    """weight of the mean of the class losses"""
    variance_weight: float = 0.1
    """weight of the variance of the class losses"""
    share_weight: float = 0.1
    """weight of the sum of the squared shares of the classes in the sum of the class losses"""

    def check(self):
        super().check()
        self._require_share("attack_begin")

    def loss(self, model, x, x_adv, y, progress):
        # One captured step may serve both stages, so the choice is made on the device.
        first_stage = progress <= self.attack_begin
        logits, smoothing = widen(model(torch.where(first_stage, x, x_adv))), self.context.label_smoothing
        losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
        ce = losses.mean()
        loss = torch.where(first_stage, ce, self.hierarchical(class_losses(losses, y, len(self.context.class_counts))))
        return loss, {"ce": ce.detach()}

    def hierarchical(self, of_class: Tensor) -> Tensor:
        """Return the loss of the second stage, a scalar. of_class: L_c of every class, ``(C,)``."""
        mean = of_class.mean()
        variance = (of_class - mean).square().mean()
        shares = of_class / (of_class.sum() + 1e-10)  # no division by 0 if every class loss is 0; the authors' number
        return self.mean_weight * mean + self.variance_weight * variance + self.share_weight * shares.square().sum()


def class_losses(losses: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return the mean loss of each class in the batch, ``(num_classes,)``; 0 for a class without an image.

    losses: loss of each image, ``(B,)``. y: int64 labels ``(B,)``. With several processes the means are over the images
    of all of them. The gradient of a function of them is then that of this process times the number of processes,
    because the trainer averages gradients over processes.
    """
    is_of_class = F.one_hot(y, num_classes).to(losses.dtype)
    sums, counts = (losses[:, None] * is_of_class).sum(0), is_of_class.sum(0)
    if dist.is_initialized():
        total = torch.stack([sums.detach(), counts])
        dist.all_reduce(total)
        sums = total[0] + dist.get_world_size() * (sums - sums.detach())
        counts = total[1]
    return sums / counts.clamp_min(1)
