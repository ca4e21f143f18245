"""TRADES: clean accuracy traded against stability (Zhang et al., "Theoretically Principled Trade-off between Robustness
and Accuracy", ICML 2019, eq. 5).

The attack ascends the same divergence from a Gaussian start, its clean prediction in eval mode. There the divergence
is all but flat: with bf16, 35 to 39 % of the first gradient's signs came out wrong on the digits (2 % of
cross-entropy's) and the attack reached up to 14 % less, so it runs in float32 (``--attack-precision same`` changes
that). As in the authors'
code, the gradient flows through both sides of the KL, the clean prediction included.

Departures: the start is clipped to [0, 1]; one clean forward serves both terms, clean before adversarial. Loss and
gradient are the same as with the authors' two; the running statistics of batch norm see the clean batch once a step,
not twice. The threat model and the schedule are those of the run, not the authors' (eps 0.031, step 0.007, weight decay
2e-4, 76 epochs).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ltat_fast.methods.base import Method
from ltat_fast.ops import balanced_softmax_kl


@dataclass
class Trades(Method):
    """min_w  CE(f(x), y) + beta KL(f(x) || f(x')),   x' = PGD on that KL."""

    name: ClassVar[str] = "trades"
    noise: ClassVar[str] = "gaussian"
    needs_fp32_attack: ClassVar[bool] = True

    beta: float = 6.0
    """weight of the divergence between clean and adversarial prediction"""
    balanced: bool = False
    """balanced softmax in place of the cross-entropy, as AT-BSL does for PGD-AT; the attack and the KL know no prior"""

    def target(self, frozen, x, y):
        return frozen(x).softmax(1)

    def objective(self, x_adv, logits, target):
        return F.kl_div(logits.log_softmax(1), target, reduction="sum")

    def loss(self, model, x, x_adv, y, progress):
        clean = model(x)
        loss = balanced_softmax_kl(clean, y, self.context.class_counts, tau=1.0 if self.balanced else 0.0)
        parts = {"bsl" if self.balanced else "ce": loss.detach()}
        if self.beta > 0:
            log_p, log_q = clean.log_softmax(1), model(x_adv).log_softmax(1)
            kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            loss = loss + self.beta * kl
            parts["kl"] = kl.detach()
        return loss, parts
