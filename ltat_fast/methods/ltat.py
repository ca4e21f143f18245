"""LTAT: long-tailed adversarial training with a balanced self-teacher (Cho, Lee, Kim, ICLR 2025).

Stage 1 trains the teacher with PGD-AT on a class-balanced re-sampling of the long tail. Stage 2 trains the student on
the whole long tail:

    L = BSL(f(x'), y)  +  kl_weight KL(f_T(x') || f(x'))  +  alpha_e KL(softmax dT || softmax dS)
    dS = f(x + d) - f(x - d),   dT = f_T(x + d) - f_T(x - d),   d = x' - x

The last term is indirect gradient matching (IGDM; Lee, Cho, Kim, ICLR 2025, eq. 8): by Taylor's argument the logit
differences stand for the input gradients, and no second derivative is needed. ``x - d`` is not clipped: the difference
must stay symmetric. The paper's algorithm box is not public; which terms it holds is inferred (docs/ltat.md), so the
weights are flags.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.methods.base import Method
from ltat_fast.ops import balanced_softmax_kl, igdm_loss


@dataclass
class Ltat(Method):
    """min_w  BSL + kl_weight KL + alpha_e IGDM, against a frozen balanced self-teacher."""

    name: ClassVar[str] = "ltat"
    teacher: ClassVar[str] = "balanced"

    alpha: float = 20.0
    """weight of the indirect gradient matching"""
    ramp: Literal["linear", "constant"] = "linear"
    """linear: alpha grows as epoch / epochs, as in the IGDM paper"""
    kl_weight: float = 0.0
    """weight of KL(teacher || student) on the adversarial example"""
    temperature: float = 1.0
    """temperature of that KL"""
    kl_target: Literal["adv", "clean"] = "adv"
    """where the teacher is asked for that KL: at x', or at x as ARD does"""
    tau: float = 1.0
    """strength of the class prior in the balanced softmax"""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """start of the attack: uniform in the ball, or 0.001 N(0, 1) as AT-BSL"""

    def check(self) -> None:
        super().check()
        if self.temperature == 0:
            raise UserError("--temperature must be above 0")

    def loss(self, model, x, x_adv, y, progress):
        distilling, matching = self.kl_weight > 0, self.alpha > 0
        points = {"adv": x_adv, "minus": 2 * x - x_adv} if matching else {}
        if distilling:
            points[self.kl_target] = x_adv if self.kl_target == "adv" else x
        taught = self._taught(points)

        plus = model(x_adv)
        loss = balanced_softmax_kl(
            plus,
            y,
            self.context.class_counts,
            taught[self.kl_target] if distilling else None,
            tau=self.tau,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
        )
        parts = {"bsl_kl" if distilling else "bsl": loss.detach()}
        if matching:
            # Two calls here: in train mode a joint batch would mix the batch statistics of the two points.
            igdm = igdm_loss(plus, model(points["minus"]), taught["adv"], taught["minus"])
            alpha = self.alpha * progress if self.ramp == "linear" else self.alpha
            loss = loss + alpha * igdm
            parts["igdm"] = igdm.detach()
        return loss, parts

    def _taught(self, points: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's logits, in one call: it is in eval mode, so its batch does not matter."""
        if not points:
            return {}
        with torch.no_grad():
            logits = self.context.teacher(torch.cat([*points.values()]))
        return dict(zip(points, logits.chunk(len(points)), strict=True))
