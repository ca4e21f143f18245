"""AdaAD: attack where student and teacher disagree (Huang et al., "Boosting Accuracy and Robustness of Student Models
via Adaptive Adversarial Distillation", CVPR 2023).

The attack ascends KL(T(x') || S(x')) through both networks, from a Gaussian start, so each of its steps costs a forward
and a backward of the teacher as well; ``akd`` with teacher_weight 1 is the same loss on PGD examples. The authors' code
divides the KL by the number of classes on CIFAR-10 (``--loss-scale 0.1``). Departures as in
:mod:`ltat_fast.methods.distillation`.
"""

from dataclasses import dataclass
from typing import ClassVar

from ltat_fast.methods.distillation import Distillation, kl


@dataclass
class AdaAd(Distillation):
    """min_w  l KL(T(x') || S(x')) + (1 - l) KL(T(x) || S(x)),  l = adversarial_weight."""

    name: ClassVar[str] = "adaad"
    noise: ClassVar[str] = "gaussian"

    adversarial_weight: float = 1.0
    """weight of the term on the adversarial image; the rest goes to the clean image"""

    def objective(self, x_adv, logits, target):
        return kl(self.context.teacher(x_adv), logits).sum()

    def distill(self, at, y, progress):
        adversarial = kl(at.teacher("adv"), at.student("adv")).mean()
        loss, parts = self.adversarial_weight * adversarial, {"kl": adversarial.detach()}
        if self.adversarial_weight < 1:
            clean = kl(at.teacher("clean"), at.student("clean")).mean()
            loss = loss + (1 - self.adversarial_weight) * clean
            parts["kl_clean"] = clean.detach()
        return loss, parts
