"""IAD-I: trust the teacher less where it is fooled, and oneself instead (Zhu et al., "Reliable Adversarial
Distillation with Unreliable Teachers", ICLR 2022), built on ARD.

The attack ascends cross-entropy. As the authors' code: the trust w scales the student's own term alone (the paper's
text scales the teacher's too: weigh_teacher), the own term has temperature 1, and gradients flow into both of its
sides. Training begins with w = 1, which is ARD; ``begin`` 0.3 is their epoch 60 of 200, and later code of the IGDM
authors has 0.4 on other data than CIFAR-10. Departures as in :mod:`ltat_fast.methods.distillation`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ltat_fast.methods.distillation import Distillation, Point, kl, widen


@dataclass
class Iad(Distillation):
    """min_w  a t^2 KL(T(x) / t || S(x') / t) + a mean_i (1 - w_i) KL(S(x_i) || S(x'_i)) + (1 - a) CE(S(x), y),
    w_i = softmax(T(x'_i))[y_i]^b,  a = teacher_weight, t = temperature, b = trust_power."""

    name: ClassVar[str] = "iad"
    target_at: ClassVar[Point] = "clean"
    """where the student learns the teacher's predictions"""

    teacher_weight: float = 1.0
    """weight of the teacher's predictions and of the student's own; the rest goes to cross-entropy, clean"""
    temperature: float = 1.0
    """temperature of the teacher's term"""
    trust_power: float = 0.1
    """exponent of the teacher's probability of the true class"""
    begin: float = 0.3
    """share of the training before the student looks at its own predictions"""
    weigh_teacher: bool = False
    """scale the teacher's term by the trust, as the paper's text has it"""

    def distill(self, at, y, progress):
        trust = at.teacher("adv").softmax(1).gather(1, y[:, None])[:, 0] ** self.trust_power
        trust = torch.where(progress > self.begin, trust, 1.0)
        distilled = self.temperature**2 * kl(at.teacher(self.target_at), at.student("adv"), self.temperature)
        if self.weigh_teacher:
            distilled = trust * distilled
        own = (1 - trust) * kl(at.student("clean"), at.student("adv"))
        distilled, own = distilled.mean(), own.mean()
        loss, parts = self.teacher_weight * (distilled + own), {"kl": distilled.detach(), "self_kl": own.detach()}
        if self.teacher_weight < 1:
            ce = F.cross_entropy(widen(at.student("clean")), y)
            loss = loss + (1 - self.teacher_weight) * ce
            parts["ce"] = ce.detach()
        return loss, parts
