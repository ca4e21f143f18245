"""AT-BSL: adversarial training with balanced softmax.

    L = -log softmax(f(x') + tau log n)[y],   x' = PGD on CE,   n: training images per class

Source: Yue, Mou, Wang, Zhao, "Revisiting Adversarial Training under Long-Tailed Distributions", CVPR 2024. Balanced
softmax: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. 3.

As in the authors' code:
- The attack ascends plain cross-entropy from a Gaussian start.
- Only the loss knows the class prior. The attack and the evaluation do not.
- tau is 1 (their code has no tau).

Departure: the start of the attack is clipped to [0, 1] (in their code only after the first step).
"""

from dataclasses import dataclass
from typing import ClassVar

from ltat_fast.methods.base import Method, Noise
from ltat_fast.ops import balanced_softmax_kl


@dataclass
class AtBsl(Method):
    """min_w  -log softmax(f(x') + tau log n)[y]."""

    name: ClassVar[str] = "at-bsl"
    noise: ClassVar[Noise] = "gaussian"
    smooths_labels: ClassVar[bool] = True

    tau: float = 1.0
    """strength tau of the class prior in the balanced softmax"""

    def loss(self, model, x, x_adv, y, progress):
        counts, smoothing = self.context.class_counts, self.context.label_smoothing
        loss = balanced_softmax_kl(model(x_adv), y, counts, tau=self.tau, label_smoothing=smoothing)
        return loss, {"bsl": loss.detach()}
