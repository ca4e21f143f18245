"""IGD: input gradients that point as those of a standard-trained network do (Chen, Dong, Xie, "Releasing Inequality
Phenomenon in L_inf-norm Adversarial Training via Input Gradient Distillation", 2023).

    L = CE(S(x'), y) + lambda/N sum_i (1 - cos(g_S,i, g_T,i)),   g_S = grad_x S(x)[y],   g_T = grad_x T(x)[y]

The attack ascends cross-entropy. The paper's lambda is 1 to 4. Its loss code is not public: that the gradient is that
of the true-class logit, and is taken at the clean image, is our reading (gradient_of, gradient_at). Their script never
puts the guide into eval mode; here it is in eval mode.

Two forms of the gradient with respect to the weights w. "double-backward" differentiates g_S itself, which
torch.compile and synchronised batch norm cannot. "finite-difference" needs first derivatives alone: with the direction
v_i = d(1 - cos_i)/d g_S,i held fixed,

    grad_w sum_i v_i . grad_x S(x_i)[y_i]  ~  grad_w sum_i (S(x_i + h_i v_i)[y_i] - S(x_i - h_i v_i)[y_i]) / (2 h_i)

up to how the images of a batch act on each other through its statistics. The step is as long as an attack: over the
kinks of ReLU a short one gives rare, large terms (on digits the gradient was three to five times too long at 1/255, and
the alignment reached is that of the double backward at 8/255). The student is shown two more batches near the clean
one, so batch norm's running statistics lean towards clean.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.methods.base import Method, Model
from ltat_fast.methods.distillation import widen


@dataclass
class Igd(Method):
    """min_w  CE(S(x'), y) + lambda mean_i (1 - cos(grad_x S, grad_x T)), against a frozen standard-trained T."""

    name: ClassVar[str] = "igd"
    teacher: ClassVar[str] = "natural"

    igd_weight: float = 1.0
    """lambda, the weight of the alignment"""
    form: Literal["double-backward", "finite-difference"] = "double-backward"
    """how the alignment is differentiated; several processes need finite-difference"""
    gradient_of: Literal["logit", "ce"] = "logit"
    """what the input gradients are of: the true class's logit or the cross-entropy"""
    gradient_at: Literal["clean", "adv"] = "clean"
    """where the student's input gradient is taken; the teacher's is at the clean image"""
    fd_step: float = 8 / 255
    """finite-difference: how far the pixel that moves most is moved"""

    def check(self) -> None:
        super().check()
        if self.fd_step == 0:
            raise UserError("--fd-step must be above 0")

    @property
    def needs_double_backward(self) -> bool:
        return self.form == "double-backward"

    def loss(self, model, x, x_adv, y, progress):
        clean, adv = x.detach().requires_grad_(), x_adv.detach().requires_grad_(self.gradient_at == "adv")
        guide = input_gradient(self._scalars(self.context.teacher(clean), y), clean)
        logits = model(adv)
        ce = F.cross_entropy(widen(logits), y)
        point, at_point = (adv, logits) if self.gradient_at == "adv" else (clean, model(clean))
        gradient = input_gradient(self._scalars(at_point, y), point, self.needs_double_backward)
        distances = cosine_distances(gradient, guide)
        if self.form == "finite-difference":
            distances = distances + self._slopes(model, point.detach(), y, gradient, guide)
        distance = distances.mean()
        return ce + self.igd_weight * distance, {"ce": ce.detach(), "igd": distance.detach()}

    def _scalars(self, logits: Tensor, y: Tensor) -> Tensor:
        """What the input gradients are of: ``(B,)``."""
        if self.gradient_of == "ce":
            return F.cross_entropy(widen(logits), y, reduction="none")
        return widen(logits).gather(1, y[:, None])[:, 0]

    def _slopes(self, model: Model, point: Tensor, y: Tensor, gradient: Tensor, guide: Tensor) -> Tensor:
        """Zeros ``(B,)`` whose gradient with respect to the weights is that of the cosine distances, nearly."""
        gradient = gradient.detach().requires_grad_()
        direction = input_gradient(cosine_distances(gradient, guide), gradient)
        largest = direction.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(direction.dtype).tiny)
        move = self.fd_step * (direction / largest)
        difference = self._scalars(model(point + move), y) - self._scalars(model(point - move), y)
        slopes = difference * largest.flatten() / (2 * self.fd_step)
        return slopes - slopes.detach()


def cosine_distances(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of each pair in two batches of images: ``(B,)``."""
    return 1 - F.cosine_similarity(a.flatten(1), b.flatten(1), eps=1e-12)


def input_gradient(values: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    """d sum(values) / d x. Outside of autocast, where a backward pass belongs."""
    with torch.autocast(x.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=create_graph, retain_graph=True)
    return gradient
