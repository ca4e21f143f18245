"""Similarity of the input gradients of two networks: gradient distance (GD) and gradient cosine (GC).

    GD_i = || g_S(x_i) - g_T(x_i) ||_2,    GC_i = cos( g_S(x_i), g_T(x_i) ),    g = d s / d x over all C*H*W values

averaged over the test images; lower GD and higher GC are better. Lee, Cho, Kim, "Indirect Gradient Matching for
Adversarial Robust Distillation" (IGDM, ICLR 2025), section 3 and table 4, where the correlation of GC and robust
accuracy is 0.9. The paper states distance, cosine and mean. It leaves open which scalar s of the logits is
differentiated, and at which image. All three candidates are measured. Cross-entropy at the clean image is the default,
because its GD has the size of the published values, 0.07 to 0.15:

    ce          cross-entropy with the true class
    logit       the logit of the true class
    projection  u . f(x) with u ~ N(0, I), the same for both networks: E GD^2 is the squared Frobenius distance of
                the two Jacobians
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast.analysis.gradients import frozen, true_logit

SCALARS = ("ce", "logit", "projection")


def input_gradients(model: nn.Module, x: Tensor, y: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """The gradient of each of :data:`SCALARS` with respect to each image, shaped like ``x``.

    x: float images in [0, 1], ``(B, C, H, W)``. y: int64 ``(B,)``. directions: u, ``(B, K)``.
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = frozen(model)(point)
        values = {
            "ce": F.cross_entropy(logits, y, reduction="none"),
            "logit": true_logit(logits, y),
            "projection": (directions * logits).sum(1),
        }
        # A sum, not a mean, so that the gradient of an image does not depend on the batch size.
        return {name: torch.autograd.grad(v.sum(), point, retain_graph=True)[0] for name, v in values.items()}


def gradient_alignment(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, directions: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Return ``{"gd": {scalar: (B,)}, "gc": {scalar: (B,)}}`` in float64 at the images ``x``, clean or attacked.

    Arguments as in :func:`input_gradients`. The cosine of a gradient that is exactly zero is 0.
    """
    of_student, of_teacher = (input_gradients(model, x, y, directions) for model in (student, teacher))
    pairs = {name: (of_student[name].flatten(1).double(), of_teacher[name].flatten(1).double()) for name in SCALARS}
    return {
        "gd": {name: (a - b).norm(dim=1) for name, (a, b) in pairs.items()},
        "gc": {name: F.cosine_similarity(a, b, eps=1e-30) for name, (a, b) in pairs.items()},
    }
