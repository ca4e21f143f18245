"""AdaAD: adaptive adversarial distillation. The attack maximises the disagreement of student and teacher. With
l = adversarial_weight:

    L = l KL(T(x') || S(x')) + (1 - l) KL(T(x) || S(x)),   x' = PGD on KL(T(x') || S(x'))

Source: Huang et al., "Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation", CVPR
2023.

As in the authors' code:
- The gradient of the attack flows through both networks, so every attack step costs a forward and a backward of the
  teacher too. ``--method akd --teacher-weight 1`` is the same loss on PGD examples.
- The attack starts from Gaussian noise.
- adversarial_weight is 1.

Departures from the authors' code, besides those of :mod:`ltat_fast.methods.distillation`:
- On CIFAR-10 their KL is divided by the number of classes (``--loss-scale 0.1``).
"""

from dataclasses import dataclass
from typing import ClassVar

from ltat_fast.methods.base import Noise
from ltat_fast.methods.distillation import Distillation, kl


@dataclass
class AdaAd(Distillation):
    """min_w  l KL(T(x') || S(x')) + (1 - l) KL(T(x) || S(x)),   l = adversarial_weight."""

    name: ClassVar[str] = "adaad"
    noise: ClassVar[Noise] = "gaussian"
    smooths_labels: ClassVar[bool] = False
    """The loss has no labels."""

    adversarial_weight: float = 1.0
    """weight l of the KL on the adversarial image; the KL on the clean image has weight 1 - l"""

    def check(self):
        super().check()
        self._require_share("adversarial_weight")

    def objective(self, x_adv, logits, target):
        return kl(self.context.teacher_logits(x_adv), logits).sum()

    def distill(self, at, y, progress):
        adversarial = kl(at.teacher("adv"), at.student("adv")).mean()
        loss = self.adversarial_weight * adversarial
        parts = {"kl": adversarial.detach()}
        if self.adversarial_weight < 1:
            clean = kl(at.teacher("clean"), at.student("clean")).mean()
            loss = loss + (1 - self.adversarial_weight) * clean
            parts["kl_clean"] = clean.detach()
        return loss, parts
