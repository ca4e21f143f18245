"""RoBal: a cosine classifier, margins and a class prior in the loss, and shifted class boundaries after training.

    c_k = <h / ||h||, W_k / (||W_k|| + g)>,   h: pooled features
    L   = CE(u, y) + beta KL(softmax c(x) || softmax c(x')),   x' = PGD on CE(c(x'), y)
    u_k = s (c_k(x') - [k = y] M_k) + tau_b log pi_k,   M_k = m + (tau_m / s) log(n_k / n_min),   pi_k = n_k / N
    exported logits: z_k = s c_k - tau_p log pi_k if tau_p > 0, else z_k = c_k

Source: Wu, Liu, Huang, Wang, Lin, "Adversarial Robustness under Long-Tailed Distribution", CVPR 2021.

``--robal-config N`` favours clean accuracy, ``R`` favours robustness. :data:`CONFIGS` has the authors' numbers, for
WRN-34-10 on CIFAR-10 and CIFAR-100. Other datasets use the numbers of CIFAR-10; later public code for Tiny-ImageNet
does the same with R.

As in the authors' code:
- The training attack and the KL use the plain cosines c: no scale, margin, prior or shift.
- The gradient flows through both arguments of the KL.
- R on CIFAR-10 has no shift and is evaluated on the plain cosines. Logits of such a small scale weaken PGD, so compare
  these runs by AutoAttack.

``--no-posthoc`` exports without the shift and trains the same weights, up to rounding.

Departures:
- The start noise is symmetric. Their noise is only positive, apparently by mistake.
- There is one clean forward, then one adversarial forward. Their code has two of each, of which one clean forward has
  weight 0, so its batch norm counts each batch twice.
- The learning rate follows the schedule of the run. Their code multiplies it again in every epoch from 60 on,
  apparently by mistake. Threat model and batch size are those of the run too (``--settings authors`` sets the batch
  size of the authors).
- The KL uses log q. Their code uses log(q + 1e-12), but a softmax of cosines is far above 1e-12.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltat_fast.methods.base import Method
from ltat_fast.models.cosine import CosineClassifier
from ltat_fast.ops import balanced_softmax_kl


class Numbers(NamedTuple):
    """The numbers of one configuration; the fields of :class:`Robal` with the same names explain them."""

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
    """min_w  CE(u(x'), y) + beta KL(softmax c(x) || softmax c(x')),   c: logits of a cosine classifier."""

    name: ClassVar[str] = "robal"
    smooths_labels: ClassVar[bool] = True
    """The cross-entropy of u is smoothed. The margin M_y is still subtracted from the cosine of the hard label only."""

    robal_config: Literal["N", "R"] = "R"
    """configuration of the authors: N for natural accuracy, R for robust accuracy; the flags below override its
    single numbers"""
    robal_dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """dataset for which the authors chose the numbers of the configuration"""
    margin: float | None = None
    """margin m of every class; None: the number of the configuration"""
    tau_b: float | None = None
    """strength tau_b of the class prior in the loss; None: the number of the configuration"""
    tau_m: float | None = None
    """growth tau_m of the margin with the log of the class count; None: the number of the configuration"""
    beta: float | None = None
    """weight beta of the KL between clean and adversarial prediction; None: the number of the configuration"""
    norm_offset: float | None = None
    """offset g on the norm of the class weights in the classifier; None: the number of the configuration"""
    tau_p: float | None = None
    """strength tau_p of the boundary shift after training; None: the number of the configuration"""
    scale: float = 10.0
    """scale s of the cosines in the loss, and in exported logits that have a shift"""
    posthoc: bool = True
    """export the network with its boundary shift"""

    @property
    def numbers(self) -> Numbers:
        """The numbers of the configuration. A number given as a flag replaces that of the configuration."""
        given = {name: getattr(self, name) for name in Numbers._fields if getattr(self, name) is not None}
        return CONFIGS[self.robal_dataset, self.robal_config]._replace(**given)

    def check(self):
        super().check()
        self._require_positive("scale")

    def exported(self, class_counts: Tensor) -> tuple[float, Tensor]:
        """Return scale and shift ``(C,)`` of the exported logits, scale * cosines - shift. class_counts: ``(C,)``."""
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
        self._margin_of_label = torch.diag(margins)  # row y: M_y in column y, 0 elsewhere
        self._exported = self.exported(context.class_counts)

    def objective(self, x_adv, logits, target):
        scale, shift = self._exported
        cosines = (logits + shift) / scale  # undo the export: a network in eval mode returns exported logits
        return F.cross_entropy(cosines, target, reduction="sum")

    def loss(self, model, x, x_adv, y, progress):
        clean, adv = model(x), model(x_adv)
        u = self.scale * (adv - self._margin_of_label[y])
        counts, smoothing = self.context.class_counts, self.context.label_smoothing
        margin_loss = balanced_softmax_kl(u, y, counts, tau=self.numbers.tau_b, label_smoothing=smoothing)
        kl = F.kl_div(adv.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        parts = {"margin_loss": margin_loss.detach(), "kl": kl.detach()}
        return margin_loss + self.numbers.beta * kl, parts
