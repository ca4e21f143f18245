"""RoBal (Wu et al., "Adversarial Robustness under Long-Tailed Distribution", CVPR 2021): a cosine classifier, margins
and a prior in the loss, and a shift of the class boundaries after training.

    c_k = <h / ||h||, W_k / (||W_k|| + g)>                                          h: pooled features
    L   = CE(u, y) + beta KL(softmax c(x) || softmax c(x'))
    u_k = s (c_k(x') - [k = y] M_k) + tau_b log pi_k,   M_k = m + (tau_m / s) log(n_k / n_min),   s = 10
    exported logits  z_k = s c_k - tau_p log pi_k,  or c_k where there is no shift

``--robal-config N`` favours clean accuracy, ``R`` robustness: :data:`CONFIGS`, the authors' numbers for WRN-34-10 on
the two CIFAR. Other datasets take those of CIFAR-10, as later code for Tiny-ImageNet does with R. As in the authors'
code, the attack of training and the KL see the bare cosines: no scale, margin, prior or shift; the gradient flows
through both sides of the KL; CIFAR-10's R has no shift and is tested on the bare cosines, whose small scale blunts PGD,
so let AutoAttack judge. ``--no-posthoc`` leaves out the others' shift and trains the same weights, up to rounding.

Departures: symmetric start noise (theirs is positive, a slip); one clean forward and then one adversarial forward
(theirs are four, one of weight 0, so batch norm saw the clean batch twice); a step schedule that does not decay every
epoch from 60 on, as theirs does by a slip; threat model, batch size and schedule of the run. Their log(q + 1e-12) in
the KL is log q: a softmax of cosines stays far above.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.methods.base import Method
from ltat_fast.models.cosine import CosineClassifier
from ltat_fast.ops import balanced_softmax_kl


class Numbers(NamedTuple):
    margin: float
    tau_b: float
    tau_m: float
    beta: float
    norm_offset: float
    tau_p: float


CONFIGS: dict[tuple[str, str], Numbers] = {
    ("cifar10", "N"): Numbers(margin=0.1, tau_b=1.2, tau_m=0.0, beta=6.0, norm_offset=0.03125, tau_p=0.1),
    ("cifar10", "R"): Numbers(margin=0.1, tau_b=1.5, tau_m=0.3, beta=6.0, norm_offset=0.03125, tau_p=0.0),
    ("cifar100", "N"): Numbers(margin=0.2, tau_b=0.0, tau_m=0.0, beta=3.0, norm_offset=0.03125, tau_p=1.5),
    ("cifar100", "R"): Numbers(margin=0.3, tau_b=0.0, tau_m=0.0, beta=6.0, norm_offset=0.0625, tau_p=1.7),
}


@dataclass
class Robal(Method):
    """min_w  margin loss on x' + beta KL(c(x) || c(x')),  with a cosine classifier."""

    name: ClassVar[str] = "robal"

    robal_config: Literal["N", "R"] = "R"
    """the authors' configuration for natural or for robust accuracy; the next flags change single numbers of it"""
    robal_dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """whose numbers of it"""
    margin: float | None = None
    """margin m of every class"""
    tau_b: float | None = None
    """strength of the class prior in the loss"""
    tau_m: float | None = None
    """growth of the margin with the log of the class count"""
    beta: float | None = None
    """weight of the divergence between clean and adversarial prediction"""
    norm_offset: float | None = None
    """g, added to the norm of the weights of a class"""
    tau_p: float | None = None
    """strength of the shift of the boundaries after training"""
    scale: float = 10.0
    """s, of the cosines in the loss and beside a shift"""
    posthoc: bool = True
    """export the network with its shift"""

    @property
    def numbers(self) -> Numbers:
        given = {name: getattr(self, name) for name in Numbers._fields if getattr(self, name) is not None}
        return CONFIGS[self.robal_dataset, self.robal_config]._replace(**given)

    def check(self):
        super().check()
        if self.scale == 0:
            raise UserError("--scale must be above 0")

    def exported(self, class_counts: Tensor) -> tuple[float, Tensor]:
        """Scale and shift ``(C,)`` that make exported logits of cosines."""
        tau_p = self.numbers.tau_p if self.posthoc else 0.0
        counts = class_counts.clamp(min=1)
        return self.scale if tau_p else 1.0, tau_p * (counts / counts.sum()).log()

    def wrap_model(self, model, class_counts):
        model.fc = CosineClassifier(model.feature_dim, self.numbers.norm_offset, *self.exported(class_counts))
        return model

    def setup(self, context):
        super().setup(context)
        counts = context.class_counts.clamp(min=1)
        margins = self.numbers.margin + self.numbers.tau_m / self.scale * (counts / counts.min()).log()
        self._margin_of_label = torch.diag(margins)
        self._exported = self.exported(context.class_counts)

    def objective(self, x_adv, logits, target):
        scale, shift = self._exported  # the frozen network exports; back to its cosines
        return F.cross_entropy((logits + shift) / scale, target, reduction="sum")

    def loss(self, model, x, x_adv, y, progress):
        clean, adv = model(x), model(x_adv)
        u = self.scale * (adv - self._margin_of_label[y])
        margin_loss = balanced_softmax_kl(u, y, self.context.class_counts, tau=self.numbers.tau_b)
        kl = F.kl_div(adv.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        parts = {"margin_loss": margin_loss.detach(), "kl": kl.detach()}
        return margin_loss + self.numbers.beta * kl, parts
