"""What a PGD attack ascends. An objective maps ``(x_adv, logits)`` to a scalar.

Objectives are sums over the batch: sign-gradient steps do not depend on the scale, and a sum keeps small gradients
away from underflow in bfloat16.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(labels: Tensor) -> Objective:
    """Cross-entropy with hard labels, the objective of PGD (Madry et al. 2018, eq. 2.1).

    labels: int64 ``(B,)``. It takes the raw logits: no class prior belongs in an attack.
    """
    return lambda x_adv, logits: F.cross_entropy(logits, labels, reduction="sum")


def cw_margin(labels: Tensor) -> Objective:
    """Carlini and Wagner's margin, largest wrong logit minus true logit, under the PGD loop ("CW-k").

    labels: int64 ``(B,)``. Not saturated by large logits, unlike cross-entropy.
    """

    def objective(x_adv: Tensor, logits: Tensor) -> Tensor:
        true = F.one_hot(labels, logits.shape[1]).to(torch.bool)
        wrong = logits.masked_fill(true, -torch.inf).amax(1)
        return (wrong - logits.gather(1, labels[:, None]).squeeze(1)).sum()

    return objective


def scaled_cross_entropy(labels: Tensor) -> Objective:
    """Cross-entropy of the logits divided by the gap between the two largest, image by image ("scaled PGD").

    labels: int64 ``(B,)``. Confident logits saturate the softmax, and the gradient of plain cross-entropy underflows
    to zero: the model looks robust and is not. Divided by their gap, logits of any scale leave the softmax where its
    gradient is alive. Dividing by a constant is how Carlini and Wagner (arXiv 1607.04311) undid defensive
    distillation; Yu and Xu (CVPR 2023) derive a scale for each image from floating-point error. The gap is held
    constant: no gradient flows through it.
    """

    def objective(x_adv: Tensor, logits: Tensor) -> Tensor:
        largest = logits.detach().topk(2, dim=1).values
        gap = (largest[:, :1] - largest[:, 1:]).clamp_min(1e-12)
        return F.cross_entropy(logits / gap, labels, reduction="sum")

    return objective
