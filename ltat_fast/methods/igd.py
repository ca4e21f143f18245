"""IGD: input gradient distillation. The student's input gradients point in the direction of those of a standard-trained
network T.

    L = CE(S(x'), y) + lambda/N sum_i (1 - cos(g_S,i, g_T,i)),   g_S = grad_x S(x)[y],   g_T = grad_x T(x)[y]

Source: Chen, Dong, Xie, "Releasing Inequality Phenomenon in L_inf-norm Adversarial Training via Input Gradient
Distillation", 2023, arXiv 2305.09305. The paper's lambda is 1 to 4.

Our reading, because the code of the authors' loss is not public:
- The input gradient is that of the true-class logit (``--gradient-of``).
- It is taken at the clean image (``--gradient-at``).

Departure: T is in eval mode (the authors' script never switches it to eval mode).

There are two forms of the gradient with respect to the weights w:
- "double-backward" differentiates g_S itself. torch.compile and synchronised batch norm cannot do that.
- "finite-difference" needs only first derivatives. The direction v_i = d(1 - cos_i) / d g_S,i is held constant:

    grad_w sum_i v_i . grad_x S(x_i)[y_i]  ~  grad_w sum_i (S(x_i + h_i v_i)[y_i] - S(x_i - h_i v_i)[y_i]) / (2 h_i)

  It ignores the effect that images of one batch have on each other through the batch statistics. Its step is as large
  as the eps of an attack. A small step gives rare but very large terms at the kinks of ReLU: on the digits, step 1/255
  made the gradient three to five times too long. With step 8/255 training reaches the same alignment as with double
  backward. The student sees two more batches close to the clean one, so the running statistics of batch norm move
  towards the statistics of clean images.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ltat_fast.methods.base import Method, Model, TeacherKind
from ltat_fast.methods.distillation import widen


@dataclass
class Igd(Method):
    """min_w  CE(S(x'), y) + lambda mean_i (1 - cos(grad_x S, grad_x T)),   T: frozen, standard-trained."""

    name: ClassVar[str] = "igd"
    teacher: ClassVar[TeacherKind] = "natural"
    smooths_labels: ClassVar[bool] = True
    """The cross-entropy of the adversarial image is smoothed. The input gradients that are aligned keep hard labels."""

    igd_weight: float = 1.0
    """weight lambda of the alignment term"""
    form: Literal["double-backward", "finite-difference"] = "double-backward"
    """how to differentiate the alignment term; a run with several processes needs finite-difference"""
    gradient_of: Literal["logit", "ce"] = "logit"
    """function whose input gradients are aligned: the true-class logit or the cross-entropy"""
    gradient_at: Literal["clean", "adv"] = "clean"
    """image at which the student's input gradient is taken; the teacher's is always taken at the clean image"""
    fd_step: float = 8 / 255
    """step h of finite-difference: the largest change of any pixel"""

    def check(self) -> None:
        super().check()
        self._require_positive("fd_step")

    @property
    def needs_double_backward(self) -> bool:
        return self.form == "double-backward"

    def loss(self, model, x, x_adv, y, progress):
        clean, adv = x.detach().requires_grad_(), x_adv.detach().requires_grad_(self.gradient_at == "adv")
        guide = input_gradient(self._scalars(self.context.teacher_logits(clean), y), clean)
        logits = model(adv)
        ce = F.cross_entropy(widen(logits), y, label_smoothing=self.context.label_smoothing)
        if self.gradient_at == "adv":
            point, point_logits = adv, logits
        else:
            point, point_logits = clean, model(clean)
        gradient = input_gradient(self._scalars(point_logits, y), point, self.needs_double_backward)
        distances = cosine_distances(gradient, guide)
        if self.form == "finite-difference":
            distances = distances + self._finite_differences(model, point.detach(), y, gradient, guide)
        distance = distances.mean()
        return ce + self.igd_weight * distance, {"ce": ce.detach(), "igd": distance.detach()}

    def _scalars(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the value per image whose input gradient is aligned: ``(B,)``."""
        if self.gradient_of == "ce":
            return F.cross_entropy(widen(logits), y, reduction="none")
        return widen(logits).gather(1, y[:, None])[:, 0]

    def _finite_differences(self, model: Model, point: Tensor, y: Tensor, gradient: Tensor, guide: Tensor) -> Tensor:
        """Return zeros ``(B,)`` whose gradient with respect to the weights approximates that of the cosine distances.

        In this form the cosine distances themselves have no graph to the weights.
        """
        gradient = gradient.detach().requires_grad_()
        direction = input_gradient(cosine_distances(gradient, guide), gradient)
        largest = direction.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(direction.dtype).tiny)
        move = self.fd_step * (direction / largest)
        difference = self._scalars(model(point + move), y) - self._scalars(model(point - move), y)
        slopes = difference * largest.flatten() / (2 * self.fd_step)
        return slopes - slopes.detach()


def cosine_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cos(a_i, b_i) per pair of images of two batches ``(B, C, H, W)``: ``(B,)``."""
    return 1 - F.cosine_similarity(a.flatten(1), b.flatten(1), eps=1e-12)


def input_gradient(values: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    """Return d sum(values) / d x, shaped like ``x``. The backward pass runs without autocast, as torch recommends."""
    with torch.autocast(x.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=create_graph, retain_graph=True)
    return gradient
