"""RSLAD: robust soft label adversarial distillation. The teacher's clean predictions replace the labels in the loss and
in the attack. With l = adversarial_weight and s = loss_scale:

    L = s [ l KL(T(x) || S(x')) + (1 - l) KL(T(x) || S(x)) ],   x' = PGD on KL(T(x) || S(x'))

Source: Zi, Zhao, Ma, Jiang, "Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better",
ICCV 2021.

As in the authors' code:
- The attack starts from Gaussian noise.
- loss_scale is 0.1. Their code averages the KL over classes too, and multiplies it by 10 on CIFAR-100. On both CIFAR-10
  and CIFAR-100 the result is a tenth of the KL. The published IGDM weights of RSLAD appear to assume this scale.

Departures: those of :mod:`ltat_fast.methods.distillation`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.utils.weak import WeakTensorKeyDictionary

from ltat_fast.methods.base import Noise
from ltat_fast.methods.distillation import Distillation, kl


@dataclass
class Rslad(Distillation):
    """min_w  s [ l KL(T(x) || S(x')) + (1 - l) KL(T(x) || S(x)) ],   l = adversarial_weight, s = loss_scale."""

    name: ClassVar[str] = "rslad"
    noise: ClassVar[Noise] = "gaussian"
    smooths_labels: ClassVar[bool] = False
    """The teacher's predictions replace the labels."""

    adversarial_weight: float = 5 / 6
    """weight l of the KL on the adversarial image; the KL on the clean image has weight 1 - l"""
    loss_scale: float = 0.1
    """factor s on the loss without IGDM"""

    def __post_init__(self) -> None:
        self._attacked = WeakTensorKeyDictionary()  # images under attack to the teacher's logits on them

    def check(self):
        super().check()
        self._require_share("adversarial_weight")

    def target(self, frozen, x, y):
        logits = self.context.teacher_logits(x)
        self._attacked[x] = logits
        return logits

    def objective(self, x_adv, logits, target):
        return kl(target, logits).sum()

    def distill(self, at, y, progress):
        # A teacher can be ten times larger than the student, so reuse its logits from the attack on the same images.
        target = self._attacked[at.x] if at.x in self._attacked else at.teacher("clean")
        adversarial = kl(target, at.student("adv")).mean()
        clean = kl(target, at.student("clean")).mean()
        loss = self.adversarial_weight * adversarial + (1 - self.adversarial_weight) * clean
        return loss, {"kl": adversarial.detach(), "kl_clean": clean.detach()}
