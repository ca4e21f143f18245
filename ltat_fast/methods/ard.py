"""ARD: the clean predictions of a robust teacher, on PGD examples (Goldblum, Fowl, Feizi, Goldstein, "Adversarially
Robust Distillation", AAAI 2020).

The attack ascends cross-entropy. Defaults are those of the IGDM paper's comparison, teacher_weight 1 and temperature 1.
The authors' own code uses temperature 30, divides the KL by the number of classes (``--loss-scale``), and attacks in
train mode from a start that is not clipped.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ltat_fast.methods.distillation import Distillation, kl, widen


@dataclass
class Ard(Distillation):
    """min_w  a t^2 KL(T(x) / t || S(x') / t) + (1 - a) CE(S(x), y),  a = teacher_weight, t = temperature."""

    name: ClassVar[str] = "ard"

    teacher_weight: float = 1.0
    """weight of the teacher's predictions; the rest goes to cross-entropy on the clean image"""
    temperature: float = 1.0
    """temperature of the KL"""

    def distill(self, at, y, progress):
        distilled = kl(at.teacher("clean"), at.student("adv"), self.temperature).mean()
        loss, parts = self.teacher_weight * self.temperature**2 * distilled, {"kl": distilled.detach()}
        if self.teacher_weight < 1:
            ce = F.cross_entropy(widen(at.student("clean")), y)
            loss = loss + (1 - self.teacher_weight) * ce
            parts["ce"] = ce.detach()
        return loss, parts
