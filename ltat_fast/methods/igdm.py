"""IGDM: indirect gradient matching as a term that other losses add. With the adversarial example x' = x + d of the
method's own attack, epoch e of E epochs, student S and teacher T:

    igdm_alpha (e / E) KL(softmax(T(x + d) - T(x - d)) || softmax(S(x + d) - S(x - d)))

Source: Lee, Cho, Kim, "Indirect Gradient Matching for Adversarial Robust Distillation" (IGDM), ICLR 2025, eq. 8 and
Algorithm 1. The paper's alpha grows with the number of classes: docs/teachers.md lists its values.

The KL is summed over classes and averaged over the batch.

As in the authors' code:
- x - d is not clipped.
- Every forward of the student has its own batch statistics.

Departure: our ramp is e / E, as in the paper. The authors' scripts use e / 200 for any E. To get their ramp, multiply
igdm_alpha by E / 200.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ltat_fast.methods.base import Method, Model, Parts, TeacherKind
from ltat_fast.ops import igdm_loss

Point = Literal["clean", "adv", "minus"]


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


@dataclass(kw_only=True)
class WithIgdm(Method):
    """Base class of the methods that can add IGDM to their loss. Without another teacher they then need a robust one.

    The option is keyword-only, so that a subclass keeps the order of its own options.
    """

    igdm_alpha: float = 0.0
    """weight alpha of indirect gradient matching (IGDM); grows linearly up to alpha in the last epoch; 0: no IGDM"""

    @property
    def teacher(self) -> TeacherKind:
        return "robust" if self.igdm_alpha > 0 else "none"

    def logits(self, model: Model, x: Tensor, x_adv: Tensor) -> Logits:
        """Return the logits of the student ``model`` and of the teacher at the points of a batch."""
        return Logits(model, self.context.teacher_logits, x, x_adv)

    def add_igdm(self, loss: Tensor, parts: Parts, at: Logits, progress: Tensor) -> tuple[Tensor, Parts]:
        """Return ``loss`` with IGDM added, and ``parts`` with its value, if IGDM is on."""
        if self.igdm_alpha > 0:
            igdm = igdm_loss(at.student("adv"), at.student("minus"), at.teacher("adv"), at.teacher("minus"))
            loss = loss + self.igdm_alpha * progress * igdm
            parts["igdm"] = igdm.detach()
        return loss, parts
