"""AWP: adversarial weight perturbation. For every weight tensor w_l with more than one dimension (convolutions and the
classifier):

    d_l = ||w_l|| g_l / ||g_l||,   g = gradient of L(w) on the batch
    w <- SGD(w + gamma d) - gamma d

L is the loss of the base method (PGD-AT or TRADES) on adversarial examples of the unperturbed weights.

Source: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, eq. 8 and 10.

As in the authors' code:
- Momentum and weight decay act at the perturbed weights, and the logged loss is the loss there.
- gamma is 0.01 from the first epoch with PGD-AT, and 0.005 from epoch 10 with TRADES.
- g is measured in train mode and leaves the statistics of batch norm unchanged. Their code takes g from a copy of the
  network, a proxy; the learning rate of the proxy cancels in d.

Departures:
- The attack runs in eval mode. Their PGD-AT code runs it in train mode, which updates batch norm.
- Inputs are not normalised. Their PGD-AT code normalises them.
- There is no extra train-mode forward for logging. Their PGD-AT code has one, which updates batch norm.
- Before the first active epoch the perturbation runs with gamma 0, so that a step captured as a CUDA graph stays valid.
  The weights are then those of the base method, but each step costs as much as with AWP.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.base import Method
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.trades import Trades


@dataclass
class Awp(Method):
    """min_w max_d  L(w + d),   ||d_l|| <= gamma ||w_l||,   L of PGD-AT or TRADES."""

    name: ClassVar[str] = "awp"
    smooths_labels: ClassVar[bool] = True

    awp_base: Literal["pgd-at", "trades"] = "pgd-at"
    """base method, whose attack and loss are used"""
    awp_gamma: float | None = None
    """size gamma of the perturbation relative to the weights; None: 0.01 with pgd-at, 0.005 with trades"""
    awp_from: int | None = None
    """first epoch (counted from 1) with a perturbation; None: 1 with pgd-at, 10 with trades"""
    beta: float = 6.0
    """weight beta of the KL of TRADES"""
    balanced: bool = False
    """use balanced softmax in the base method: at-bsl instead of pgd-at, trades --balanced instead of trades"""

    def __post_init__(self) -> None:
        if self.awp_base == "trades":
            self.base = Trades(self.beta, self.balanced)
            default_gamma, default_from = 0.005, 10
        else:
            self.base = AtBsl() if self.balanced else PgdAt()
            default_gamma, default_from = 0.01, 1
        self._gamma = default_gamma if self.awp_gamma is None else self.awp_gamma
        self._from = default_from if self.awp_from is None else self.awp_from
        # The attack is that of the base method, so an instance overrides these two class variables.
        self.noise = self.base.noise  # pyright: ignore[reportAttributeAccessIssue]
        self.needs_fp32_attack = self.base.needs_fp32_attack  # pyright: ignore[reportAttributeAccessIssue]

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
        weights: list[Tensor] = [p for p in model.parameters() if p.ndim > 1]
        buffers = list(model.buffers())
        buffers_before = [buffer.clone() for buffer in buffers]
        # backward(), not autograd.grad: DistributedDataParallel averages gradients over processes in backward() only.
        optimizer.zero_grad(set_to_none=True)
        loss()[0].backward()
        with torch.no_grad():
            for buffer, before in zip(buffers, buffers_before, strict=True):
                buffer.copy_(before)
            original = [w.clone() for w in weights]
            norms = torch.stack(torch._foreach_norm(weights))
            grads = cast(list[Tensor], [w.grad for w in weights])  # set by backward()
            sizes = self.strength * norms / (torch.stack(torch._foreach_norm(grads)) + 1e-20)
            perturbed = [w.addcmul(g, size) for w, g, size in zip(weights, grads, sizes.unbind(), strict=True)]
            torch._foreach_copy_(weights, perturbed)
        result = super().update(model, optimizer, loss)
        with torch.no_grad():
            # Add the optimizer's change to a copy of w. Subtracting gamma d would not restore w to the last bit.
            torch._foreach_sub_(weights, perturbed)
            torch._foreach_add_(weights, original)
        return result
