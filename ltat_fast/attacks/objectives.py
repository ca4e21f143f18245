"""Objectives that a PGD attack ascends. An objective maps ``(x_adv, logits)`` to a scalar.

Every objective sums over the batch. Sign-gradient steps do not depend on its scale, and a sum keeps small gradients
from underflow in bfloat16.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(labels: Tensor) -> Objective:
    """Return the objective of PGD: cross-entropy with hard labels (Madry et al., ICLR 2018, eq. 2.1).

    labels: int64 ``(B,)``. The logits are used as they are, because an attack must not know the class prior.
    """
    return lambda x_adv, logits: F.cross_entropy(logits, labels, reduction="sum")


def targeted_cross_entropy(targets: Tensor) -> Objective:
    """Return the objective of targeted PGD: the negative cross-entropy with the wrong classes ``targets``.

    targets: int64 ``(B,)``. Source: Kurakin et al., "Adversarial Machine Learning at Scale", ICLR 2017.
    """
    return lambda x_adv, logits: -F.cross_entropy(logits, targets, reduction="sum")


def cw_margin(labels: Tensor) -> Objective:
    """Return the objective of CW-k: largest wrong logit minus true logit (Carlini and Wagner, S&P 2017).

    labels: int64 ``(B,)``. Large logits do not saturate it, unlike cross-entropy.
    """

    def objective(x_adv: Tensor, logits: Tensor) -> Tensor:
        true = F.one_hot(labels, logits.shape[1]).to(torch.bool)
        wrong = logits.masked_fill(true, -torch.inf).amax(1)
        return (wrong - logits.gather(1, labels[:, None]).squeeze(1)).sum()

    return objective


def scaled_cross_entropy(labels: Tensor) -> Objective:
    """Return the objective of scaled PGD: cross-entropy of logits divided, per image, by the gap of the two largest.

    labels: int64 ``(B,)``. Very confident logits saturate the softmax, and the gradient of plain cross-entropy
    underflows to zero: the model looks robust although it is not. After the division, logits of any scale have a
    gradient. No gradient flows through the gap.

    Sources: Carlini and Wagner (arXiv 1607.04311) divide by a constant to break defensive distillation; Yu and Xu (CVPR
    2023) derive a scale per image from the floating-point error.
    """

    def objective(x_adv: Tensor, logits: Tensor) -> Tensor:
        largest = logits.detach().topk(2, dim=1).values
        gap = (largest[:, :1] - largest[:, 1:]).clamp_min(1e-12)
        return F.cross_entropy(logits / gap, labels, reduction="sum")

    return objective
