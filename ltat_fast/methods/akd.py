"""AKD: distillation with a mixture of labels and teacher predictions. With m = teacher_weight:

    L = (1 - m) CE(S(x'), y) + m KL(T(x') || S(x')),   x' = PGD on CE

Source: Maroto, Ortiz-Jimenez, Frossard, "On the Benefits of Knowledge Distillation for Adversarial Robustness", 2022,
arXiv 2203.07159.

This is our reading. We found no public code, and the IGDM paper, which compares with AKD, gives no formula:
- The attack ascends cross-entropy.
- The teacher sees the adversarial image, which is the difference between AKD and ARD (``--teacher-input``).
- m is 0.5.

With m = 1 this is AdaAD with PGD examples, the cheap variant in Table 6 of the IGDM paper.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ltat_fast.methods.distillation import Distillation, kl
from ltat_fast.ops import balanced_softmax_kl


@dataclass
class Akd(Distillation):
    """min_w  (1 - m) CE(S(x'), y) + m KL(T(x') || S(x')),   m = teacher_weight."""

    name: ClassVar[str] = "akd"

    teacher_weight: float = 0.5
    """share m of the teacher's prediction in the target; the label has the share 1 - m"""
    teacher_input: Literal["adv", "clean"] = "adv"
    """image on which the teacher predicts: adversarial or clean"""

    @property
    def smooths_labels(self) -> bool:
        """The label in the mixture is smoothed, the teacher's prediction is not; teacher_weight 1 leaves no label."""
        return self.teacher_weight < 1

    def check(self):
        super().check()
        self._require_share("teacher_weight")

    def distill(self, at, y, progress):
        target, logits, m = at.teacher(self.teacher_input), at.student("adv"), self.teacher_weight
        if m == 1:
            loss = kl(target, logits).mean()
        else:  # one fused call computes both terms; tau 0 is plain cross-entropy
            counts, smoothing = self.context.class_counts, self.context.label_smoothing
            weight = m / (1 - m)
            loss = (1 - m) * balanced_softmax_kl(
                logits, y, counts, target, tau=0.0, kl_weight=weight, label_smoothing=smoothing
            )
        return loss, {"ce_kl": loss.detach()}
