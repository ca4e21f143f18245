"""AWP: adversarial weight perturbation (Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization",
NeurIPS 2020, eq. 8 and 10). For every weight tensor w_l of more than one dimension, convolutions and the classifier:

    d_l = ||w_l|| g_l / ||g_l||,  g = gradient of L(w) on the batch;   w <- SGD(w + gamma d) - gamma d

L is the loss of the base, on the adversarial examples of the unperturbed weights. As in the authors' code, momentum
and weight decay act at the perturbed weights; the loss logged is the one there. gamma is 0.01 from the first epoch on
PGD-AT, 0.005 from epoch 10 on TRADES. The authors' proxy network and its learning rate drop out of d; what is left of
them is that g is measured in train mode and leaves no trace in the statistics of batch norm.

Departures: the attack runs in eval mode, inputs are not normalised, and there is no forward in train mode for logging;
in the authors' PGD-AT variant all three differ, and the first and last feed batch norm. Before its first active epoch
the perturbation is there with gamma 0, so that a captured step stays valid: same weights, same price.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.base import Method
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.trades import Trades


@dataclass
class Awp(Method):
    """min_w max_d  L(w + d),  ||d_l|| <= gamma ||w_l||,  with L of PGD-AT or TRADES."""

    name: ClassVar[str] = "awp"

    awp_base: Literal["pgd-at", "trades"] = "pgd-at"
    """the method whose attack and loss are used"""
    awp_gamma: float | None = None
    """size of the perturbation relative to the weights; 0.01 on pgd-at, 0.005 on trades if not given"""
    awp_from: int | None = None
    """first epoch, counted from 1, with a perturbation; 1 on pgd-at, 10 on trades if not given"""
    beta: float = 6.0
    """weight of the divergence of TRADES"""
    balanced: bool = False
    """balanced softmax in the base: AT-BSL for pgd-at, trades --balanced for trades"""

    def __post_init__(self) -> None:
        if self.awp_base == "trades":
            self.base, self._gamma, self._from = Trades(self.beta, self.balanced), 0.005, 10
        else:
            self.base, self._gamma, self._from = AtBsl() if self.balanced else PgdAt(), 0.01, 1
        self._gamma = self._gamma if self.awp_gamma is None else self.awp_gamma
        self._from = self._from if self.awp_from is None else self.awp_from
        self.noise, self.needs_fp32_attack = self.base.noise, self.base.needs_fp32_attack

    def setup(self, context):
        super().setup(context)
        self.base.setup(context)
        self.strength = torch.zeros((), device=context.class_counts.device)
        self.on_epoch_start(0)

    def state(self):
        return {"strength": self.strength}

    def on_epoch_start(self, epoch):
        self.strength.fill_(self._gamma if epoch + 1 >= self._from else 0.0)

    def target(self, frozen, x, y):
        return self.base.target(frozen, x, y)

    def objective(self, x_adv, logits, target):
        return self.base.objective(x_adv, logits, target)

    def loss(self, model, x, x_adv, y, progress):
        return self.base.loss(model, x, x_adv, y, progress)

    def update(self, model, optimizer, loss):
        weights = [p for p in model.parameters() if p.ndim > 1]
        buffers = [(b, b.clone()) for b in model.buffers()]
        # backward, not autograd.grad: in several processes it is what averages the gradient over them.
        optimizer.zero_grad(set_to_none=True)
        loss()[0].backward()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
            original = [w.clone() for w in weights]
            norms = torch.stack(torch._foreach_norm(weights))
            grads = [w.grad for w in weights]
            sizes = self.strength * norms / (torch.stack(torch._foreach_norm(grads)) + 1e-20)
            perturbed = [w.addcmul(g, size) for w, g, size in zip(weights, grads, sizes.unbind(), strict=True)]
            torch._foreach_copy_(weights, perturbed)
        result = super().update(model, optimizer, loss)
        with torch.no_grad():
            # What the optimizer did, added to a copy: subtracting gamma d would not give w back to the last bit.
            torch._foreach_sub_(weights, perturbed)
            torch._foreach_add_(weights, original)
        return result
