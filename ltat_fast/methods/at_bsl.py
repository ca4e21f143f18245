"""AT-BSL: balanced softmax on PGD examples (Yue et al., "Revisiting Adversarial Training under Long-Tailed
Distributions", CVPR 2024; balanced softmax by Ren et al., NeurIPS 2020).

As the authors' code: the attack ascends plain cross-entropy from a Gaussian start; the prior enters the loss alone,
never the attack and never the test. Their code has no tau, which is tau = 1. Departure: the start is clipped to [0, 1],
theirs after the first step alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from ltat_fast.methods.base import Method
from ltat_fast.ops import balanced_softmax_kl


@dataclass
class AtBsl(Method):
    """min_w  -log softmax(f(x') + tau log n)[y]."""

    name: ClassVar[str] = "at-bsl"
    noise: ClassVar[str] = "gaussian"

    tau: float = 1.0
    """strength of the class prior in the balanced softmax"""

    def loss(self, model, x, x_adv, y, progress):
        loss = balanced_softmax_kl(model(x_adv), y, self.context.class_counts, tau=self.tau)
        return loss, {"bsl": loss.detach()}
