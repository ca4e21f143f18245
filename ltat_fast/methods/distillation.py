"""Base class of the distillation methods: a frozen robust teacher T, the KL, and IGDM as an optional term.

With the adversarial example x' = x + d of the method's own attack, epoch e of E epochs, and student S:

    L = loss_scale L_method + igdm_alpha (e / E) KL(softmax(T(x + d) - T(x - d)) || softmax(S(x + d) - S(x - d)))

Source of the second term: Lee, Cho, Kim, "Indirect Gradient Matching for Adversarial Robust Distillation" (IGDM), ICLR
2025, eq. 8 and Algorithm 1. The paper's alpha grows with the number of classes: 5 to 50 on CIFAR-10, 15 to 100 on
CIFAR-100, and a tenth of that for RSLAD, whose loss is a tenth of the other losses.

Every KL is KL(teacher || student), summed over classes and averaged over the batch.

As in the authors' code of IGDM:
- x - d is not clipped.
- Every forward of the student has its own batch statistics.
- The default temperature is 1, and the attack runs in eval mode. The original code of some methods differs; their
  modules say so.

Departures:
- Our ramp is e / E, as in the paper. The authors' scripts use e / 200 for any E. To get their ramp,
  multiply igdm_alpha by E / 200.
- The start of every attack is clipped to [0, 1]. The original code of ARD, RSLAD and AdaAD clips only after the first
  step.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ltat_fast.methods.base import Method, Model, Parts, TeacherKind
from ltat_fast.ops import igdm_loss

Point = Literal["clean", "adv", "minus"]


def widen(logits: Tensor) -> Tensor:
    """Return ``logits`` in float32. Float64 stays float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(softmax(target / temperature) || softmax(logits / temperature)) per row, float32 ``(B,)``.

    target, logits: ``(B, C)``. Gradients flow into both. Float64 stays float64.
    """
    log_p = (widen(target) / temperature).log_softmax(1)
    log_q = (widen(logits) / temperature).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


class Logits:
    """Logits ``(B, C)`` of student and teacher at x ("clean"), x' ("adv") and x - d ("minus").

    Each is computed only once, when it is first needed. Every point gets its own forward pass, because in train mode a
    joint batch would mix the batch statistics of the points. The teacher's logits have no gradient.
    """

    def __init__(self, student: Model, teacher: Model, x: Tensor, x_adv: Tensor):
        self.x, self.x_adv = x, x_adv
        self._student, self._teacher = student, teacher
        self._student_logits: dict[Point, Tensor] = {}
        self._teacher_logits: dict[Point, Tensor] = {}

    def student(self, point: Point) -> Tensor:
        if point not in self._student_logits:
            self._student_logits[point] = self._student(self._images(point))
        return self._student_logits[point]

    @torch.no_grad()
    def teacher(self, point: Point) -> Tensor:
        if point not in self._teacher_logits:
            self._teacher_logits[point] = self._teacher(self._images(point))
        return self._teacher_logits[point]

    def _images(self, point: Point) -> Tensor:
        if point == "clean":
            return self.x
        if point == "adv":
            return self.x_adv
        return 2 * self.x - self.x_adv


@dataclass
class Distillation(Method):
    """Base class of the distillation methods. A subclass defines its loss in :meth:`distill`."""

    teacher: ClassVar[TeacherKind] = "robust"

    igdm_alpha: float = 0.0
    """weight alpha of indirect gradient matching (IGDM); grows linearly up to alpha in the last epoch; 0: no IGDM"""
    loss_scale: float = 1.0
    """factor on the loss without IGDM; 1 / number of classes matches authors' code that averages a KL over classes"""
    extra_clean_forward: bool = False
    """run the student on the clean images even if the loss does not need it, as the authors' code does; this changes
    only the running statistics of batch norm"""

    def distill(self, at: Logits, y: Tensor, progress: Tensor) -> tuple[Tensor, Parts]:
        """Return the loss without IGDM and its parts. ``y``, ``progress`` and results as in :meth:`Method.loss`."""
        raise NotImplementedError

    def loss(self, model, x, x_adv, y, progress):
        at = Logits(model, self.context.teacher_logits, x, x_adv)
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
