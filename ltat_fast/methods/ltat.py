"""LTAT: long-tailed adversarial training with a balanced self-teacher.

Stage 1 trains the teacher f_T with PGD-AT on a class-balanced re-sampling of the long-tailed data. Stage 2 trains the
student f on all of the long-tailed data:

    L  = BSL(f(x'), y) + kl_weight KL(f_T(x') || f(x')) + alpha_e KL(softmax dT || softmax dS),   x' = PGD on CE
    alpha_e = alpha * epoch / epochs, or alpha with --ramp constant
    with --kl-prior the KL is KL(f_T(x') || f(x') + tau log n),   n: training images per class
    dS = f(x + d) - f(x - d),   dT = f_T(x + d) - f_T(x - d),   d = x' - x

Sources: Cho, Lee, Kim, "Long-tailed Adversarial Training with Self-Distillation", ICLR 2025. Last term: Lee, Cho, Kim,
"Indirect Gradient Matching for Adversarial Robust Distillation" (IGDM), ICLR 2025, eq. 8.

The last term is indirect gradient matching: to first order the logit differences are products of input gradients with
2 d, so it matches input gradients without a second derivative.

- The text of the paper that we could read lacks its Algorithm 1. We inferred the terms of the loss (docs/ltat.md), so
  their weights are flags.
- x - d is not clipped, because the difference must stay symmetric.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.methods.base import Method, Noise, TeacherKind
from ltat_fast.models.joint_batch import forward_each
from ltat_fast.ops import balanced_softmax_kl, igdm_loss


@dataclass
class Ltat(Method):
    """min_w  BSL(f(x'), y) + kl_weight KL(teacher || student) + alpha IGDM,   teacher: frozen, from balanced data."""

    name: ClassVar[str] = "ltat"
    teacher: ClassVar[TeacherKind] = "balanced"
    smooths_labels: ClassVar[bool] = True

    alpha: float = 20.0
    """weight alpha of indirect gradient matching (IGDM)"""
    ramp: Literal["linear", "constant"] = "linear"
    """growth of alpha; linear: alpha * epoch / epochs, as in the IGDM paper; constant: alpha in every epoch"""
    kl_weight: float = 0.0
    """weight of KL(teacher || student), with the student at the adversarial example x'"""
    temperature: float = 1.0
    """temperature of KL(teacher || student)"""
    kl_prior: bool = False
    """add the class prior of the balanced softmax to the student's logits in KL(teacher || student) too"""
    kl_target: Literal["adv", "clean"] = "adv"
    """image on which the teacher predicts for KL(teacher || student): adversarial x', or clean x as in ARD"""
    tau: float = 1.0
    """strength tau of the class prior in the balanced softmax"""
    noise: Noise = "uniform"
    """start noise of the attack: uniform in the eps-ball, or 0.001 N(0, 1) as in AT-BSL"""

    def check(self) -> None:
        super().check()
        self._require_positive("temperature")
        if self.kl_prior and self.kl_weight == 0:
            raise UserError("--kl-prior has no effect without --kl-weight")

    def setup(self, context):
        super().setup(context)
        self._log_prior = self.tau * context.class_counts.double().clamp(min=1).log()

    def loss(self, model, x, x_adv, y, progress):
        use_kl, use_igdm = self.kl_weight > 0, self.alpha > 0
        points = {"adv": x_adv, "minus": 2 * x - x_adv} if use_igdm else {}
        if use_kl:
            points[self.kl_target] = x_adv if self.kl_target == "adv" else x
        teacher = self._teacher_logits(points)

        plus, *minus = forward_each(model, *([x_adv, points["minus"]] if use_igdm else [x_adv]))
        prior_in_logits = use_kl and self.kl_prior
        loss = balanced_softmax_kl(
            plus + self._log_prior.to(plus) if prior_in_logits else plus,
            y,
            self.context.class_counts,
            teacher[self.kl_target] if use_kl else None,
            tau=0.0 if prior_in_logits else self.tau,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            label_smoothing=self.context.label_smoothing,
        )
        parts = {"bsl_kl" if use_kl else "bsl": loss.detach()}
        if use_igdm:
            igdm = igdm_loss(plus, minus[0], teacher["adv"], teacher["minus"])
            alpha = self.alpha * progress if self.ramp == "linear" else self.alpha
            loss = loss + alpha * igdm
            parts["igdm"] = igdm.detach()
        return loss, parts

    def _teacher_logits(self, points: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the teacher's logits ``(B, C)`` at each of ``points``, from one joint batch (exact in eval mode)."""
        if not points:
            return {}
        with torch.no_grad():
            logits = self.context.teacher_logits(torch.cat(list(points.values())))
        return dict(zip(points, logits.chunk(len(points)), strict=True))
