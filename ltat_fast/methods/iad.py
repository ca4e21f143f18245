"""IAD-I: introspective adversarial distillation, built on ARD. Where the attack fools the teacher, the student trusts
the teacher less and its own clean prediction more. With a = teacher_weight, t = temperature, b = trust_power:

    L = a t^2 KL(T(x) / t || S(x') / t) + a mean_i (1 - w_i) KL(S(x_i) || S(x'_i)) + (1 - a) CE(S(x), y)
    w_i = softmax(T(x'_i))[y_i]^b,   x' = PGD on CE

Source: Zhu et al., "Reliable Adversarial Distillation with Unreliable Teachers", ICLR 2022.

As in the authors' code:
- The trust w scales only the student's own term, which is the second KL. The text of the paper scales the teacher's
  term too (``--weigh-teacher``).
- The student's own term has temperature 1, and gradients flow into both of its arguments.
- Training begins with w = 1, which is ARD. ``begin`` 0.3 is their epoch 60 of 200; later code of the first author of
  IGDM uses epoch 80 of 200 (0.4) on data other than CIFAR-10.

Departures from the authors' code, besides those of :mod:`ltat_fast.methods.distillation`:
- Their attack runs in train mode.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ltat_fast.methods.distillation import Distillation, kl, widen
from ltat_fast.methods.igdm import Point


@dataclass
class Iad(Distillation):
    """min_w  a t^2 KL(T(x) / t || S(x') / t) + a mean_i (1 - w_i) KL(S(x_i) || S(x'_i)) + (1 - a) CE(S(x), y),
    w_i = softmax(T(x'_i))[y_i]^b,   a = teacher_weight, t = temperature, b = trust_power."""

    name: ClassVar[str] = "iad"
    target_at: ClassVar[Point] = "clean"
    """Point at which the teacher gives the target of the first KL."""

    teacher_weight: float = 1.0
    """weight a of both KL terms; cross-entropy on the clean image has weight 1 - a"""
    temperature: float = 1.0
    """temperature t of the KL between teacher and student"""
    trust_power: float = 0.1
    """exponent b of the trust w = (teacher's probability of the true class)^b"""
    begin: float = 0.3
    """share of the epochs that train with trust w = 1, before the student's own term begins"""
    weigh_teacher: bool = False
    """multiply the teacher's term by the trust w, as in the text of the paper"""

    @property
    def smooths_labels(self) -> bool:
        """The label term is the cross-entropy on the clean image, which teacher_weight 1 leaves out."""
        return self.teacher_weight < 1

    def check(self):
        super().check()
        self._require_share("teacher_weight", "begin")
        self._require_positive("temperature")

    def distill(self, at, y, progress):
        trust = at.teacher("adv").softmax(1).gather(1, y[:, None])[:, 0] ** self.trust_power
        trust = torch.where(progress > self.begin, trust, 1.0)
        teacher_kl = self.temperature**2 * kl(at.teacher(self.target_at), at.student("adv"), self.temperature)
        if self.weigh_teacher:
            teacher_kl = trust * teacher_kl
        self_kl = (1 - trust) * kl(at.student("clean"), at.student("adv"))
        teacher_kl, self_kl = teacher_kl.mean(), self_kl.mean()
        loss = self.teacher_weight * (teacher_kl + self_kl)
        parts = {"kl": teacher_kl.detach(), "self_kl": self_kl.detach()}
        if self.teacher_weight < 1:
            ce = F.cross_entropy(widen(at.student("clean")), y, label_smoothing=self.context.label_smoothing)
            loss = loss + (1 - self.teacher_weight) * ce
            parts["ce"] = ce.detach()
        return loss, parts
