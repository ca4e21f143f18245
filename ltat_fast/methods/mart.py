"""MART: misclassification-aware adversarial training. With p = softmax f(x) and q = softmax f(x'):

    L = mean [ -log q_y - log(1.0001 - max_{k != y} q_k + 1e-12) ]
      + beta mean [ (1.0000001 - p_y) sum_k p_k (log p_k - log(q_k + 1e-12)) ]

Source: Wang, Zou, Yi, Bailey, Ma, Gu, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
ICLR 2020, eq. 11.

As in the authors' code:
- The constants are theirs, and the gradient flows through every p.
- The attack ascends cross-entropy from a Gaussian start.
- beta is 5 (their value for ResNet-18); the preset of WRN-34-10 sets 6.

Departures:
- The start of the attack is clipped to [0, 1].
- 1 - q_k is computed as the sum of the other probabilities. The number is the same, without cancellation near q_k = 1.
- Threat model and schedule are those of the run. Their code has learning rate 0.01 and weight decay 3.5e-3 for
  ResNet-18, 0.1 and 7e-4 for WRN.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ltat_fast.methods.base import Method, Noise
from ltat_fast.ops import balanced_softmax_kl


@dataclass
class Mart(Method):
    """min_w  boosted CE on x' + beta (1 - f(x)[y]) KL(f(x) || f(x'))."""

    name: ClassVar[str] = "mart"
    noise: ClassVar[Noise] = "gaussian"
    smooths_labels: ClassVar[bool] = True
    """The part -log q_y of the boosted cross-entropy, which is a cross-entropy, is smoothed. The margin term and the
    weight 1 - p_y have no form for soft labels, so they keep the hard label."""

    beta: float = 5.0
    """weight beta of the KL between clean and adversarial prediction"""
    balanced: bool = False
    """add log class counts to the logits of the boosted cross-entropy (our extension, as AT-BSL extends PGD-AT)"""

    def loss(self, model, x, x_adv, y, progress):
        clean, adv = model(x), model(x_adv)
        log_p, log_q = clean.log_softmax(1), adv.log_softmax(1)
        is_label = F.one_hot(y, adv.shape[1]).bool()

        log_b = (adv + self.context.class_counts.log()).log_softmax(1) if self.balanced else log_q
        strongest = log_b.masked_fill(is_label, -math.inf).argmax(1)
        is_strongest = F.one_hot(strongest, adv.shape[1]).bool()
        label_log_b = log_b.gather(1, y[:, None])[:, 0]
        if (smoothing := self.context.label_smoothing) > 0:
            counts, tau = self.context.class_counts, 1.0 if self.balanced else 0.0
            label_log_b = -balanced_softmax_kl(adv, y, counts, tau=tau, label_smoothing=smoothing, reduction="none")
        boosted = -(label_log_b + (1e-4 + 1e-12 + _sum_of_others(log_b, is_strongest)).log()).mean()

        kl = F.kl_div((log_q.exp() + 1e-12).log(), log_p, reduction="none", log_target=True).sum(1)
        weighted_kl = ((1e-7 + _sum_of_others(log_p, is_label)) * kl).mean()
        parts = {"bce": boosted.detach(), "weighted_kl": weighted_kl.detach()}
        return boosted + self.beta * weighted_kl, parts


def _sum_of_others(log_p: Tensor, chosen: Tensor) -> Tensor:
    """Return 1 - p[chosen], ``(B,)``. log_p: ``(B, C)``. chosen: bool ``(B, C)``, True once per row."""
    return log_p.exp().masked_fill(chosen, 0.0).sum(1)
