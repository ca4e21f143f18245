"""What the distillation methods share: a frozen robust teacher T, the KL, and gradient matching on top ("+IGDM").

IGDM (Lee, Cho, Kim, "Indirect Gradient Matching for Adversarial Robust Distillation", ICLR 2025, eq. 8, Algorithm 1)
adds to the loss of any of them, with the method's own adversarial example x' = x + d,

    alpha e/E  KL(softmax(T(x + d) - T(x - d)) || softmax(S(x + d) - S(x - d)))

The paper's alpha grows with the number of classes: 5 to 50 on CIFAR-10, 15 to 100 on CIFAR-100, a tenth of that for
RSLAD, whose loss is a tenth of the others'. As in the authors' code, x - d is not clipped and every forward of the
student has batch statistics of its own. Their scripts ramp as e/200 whatever E is: that is alpha * E / 200 here.

Every KL is KL(teacher || student), summed over classes, averaged over the batch. The paper's departures from the
methods' original code hold here too: temperature 1, and attacks in eval mode, from a start that is clipped to [0, 1].
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.methods.base import Method, Model
from ltat_fast.ops import igdm_loss

Point = Literal["clean", "adv", "minus"]
SHARES = ("teacher_weight", "adversarial_weight", "begin")


def widen(logits: Tensor) -> Tensor:
    """In float32, or float64 if that is what they are in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / temperature) || softmax(logits / temperature)) of each row of ``(B, C)``: float32 ``(B,)``.

    Gradients flow into both arguments; float64 stays float64.
    """
    log_p = (widen(target) / temperature).log_softmax(1)
    log_q = (widen(logits) / temperature).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


class Logits:
    """Logits ``(B, C)`` of student and teacher at x ("clean"), x' ("adv") and x - d ("minus").

    Each is computed once, when first asked for, in a call of its own: in train mode a joint batch would mix the batch
    statistics of the points. Those of the teacher have no gradient.
    """

    def __init__(self, student: Model, teacher: Model, x: Tensor, x_adv: Tensor):
        self.x, self.x_adv = x, x_adv
        self._networks = {"student": student, "teacher": teacher}
        self._known: dict[tuple[str, str], Tensor] = {}

    def student(self, point: Point) -> Tensor:
        return self._at("student", point)

    def teacher(self, point: Point) -> Tensor:
        with torch.no_grad():
            return self._at("teacher", point)

    def _at(self, network: str, point: Point) -> Tensor:
        if (network, point) not in self._known:
            images = {"clean": self.x, "adv": self.x_adv, "minus": None}[point]
            images = 2 * self.x - self.x_adv if images is None else images
            self._known[network, point] = self._networks[network](images)
        return self._known[network, point]


@dataclass
class Distillation(Method):
    """Base of the distillation methods: a subclass says what it descends in :meth:`distill`."""

    teacher: ClassVar[str] = "robust"

    igdm_alpha: float = 0.0
    """weight of indirect gradient matching in the last epoch, growing as epoch / epochs; 0 leaves it out"""
    loss_scale: float = 1.0
    """of the whole loss but IGDM: one over the number of classes where the authors' code averages over those too"""
    extra_clean_forward: bool = False
    """show the student the clean images even where the loss does not need them, as the authors' code does: this
    moves batch norm's running statistics alone"""

    def check(self) -> None:
        super().check()
        for name in SHARES:
            if getattr(self, name, 0.0) > 1:
                raise UserError(f"--{name.replace('_', '-')} is a share between 0 and 1, not {getattr(self, name):g}")
        if getattr(self, "temperature", 1.0) == 0:
            raise UserError("--temperature must be above 0")

    def distill(self, at: Logits, y: Tensor, progress: Tensor) -> tuple[Tensor, dict]:
        """The loss without IGDM, and its parts; arguments and results as in :meth:`Method.loss`."""
        raise NotImplementedError

    def loss(self, model, x, x_adv, y, progress):
        at = Logits(model, self.context.teacher, x, x_adv)
        loss, parts = self.distill(at, y, progress)
        loss = self.loss_scale * loss
        if self.extra_clean_forward:
            with torch.no_grad():
                at.student("clean")
        if self.igdm_alpha > 0:
            igdm = igdm_loss(at.student("adv"), at.student("minus"), at.teacher("adv"), at.teacher("minus"))
            loss = loss + self.igdm_alpha * progress * igdm
            parts["igdm"] = igdm.detach()
        return loss, parts
