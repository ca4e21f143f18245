"""AKD: labels mixed with the teacher's predictions, on PGD examples (Maroto, Ortiz-Jimenez, Frossard, "On the
Benefits of Knowledge Distillation for Adversarial Robustness", 2022).

Our reading: no code is public and the paper that compares with it gives no formula. The attack ascends cross-entropy,
and the teacher sees the adversarial image, which is what tells AKD from ARD. With teacher_weight 1 this is AdaAD
without its attack, the cheap variant of Table 6 of the IGDM paper.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ltat_fast.methods.distillation import Distillation, kl
from ltat_fast.ops import balanced_softmax_kl


@dataclass
class Akd(Distillation):
    """min_w  (1 - m) CE(S(x'), y) + m KL(T(x') || S(x')),  m = teacher_weight."""

    name: ClassVar[str] = "akd"

    teacher_weight: float = 0.5
    """share of the teacher's predictions in the target"""
    teacher_input: Literal["adv", "clean"] = "adv"
    """what the teacher sees"""

    def distill(self, at, y, progress):
        target, logits, m = at.teacher(self.teacher_input), at.student("adv"), self.teacher_weight
        if m == 1:
            loss = kl(target, logits).mean()
        else:  # both terms in one pass; tau 0 is plain cross-entropy
            counts = self.context.class_counts
            loss = (1 - m) * balanced_softmax_kl(logits, y, counts, target, tau=0.0, kl_weight=m / (1 - m))
        return loss, {"ce_kl": loss.detach()}
