"""Indirect gradient matching (Lee, Cho and Kim, ICLR 2025, eq. 8), one value a sample.

    a = student(x + d) - student(x - d),   b = teacher(x + d) - teacher(x - d)
    kl   sum_k P_k (log P_k - log Q_k),    P = softmax(b), Q = softmax(a)
    l1   sum_k |a_k - b_k|                 l2   sum_k (a_k - b_k)^2

Shapes: four logit tensors (B, C).
"""

import torch
from torch import Tensor


def igdm_loss_ref(
    student_plus: Tensor,
    student_minus: Tensor,
    teacher_plus: Tensor,
    teacher_minus: Tensor,
    *,
    divergence: str = "kl",
    reduction: str = "mean",
) -> Tensor:
    """Plain-torch :func:`igdm_loss`, in float32 (float64 for float64)."""
    work = torch.promote_types(student_plus.dtype, torch.float32)
    a = student_plus.to(work) - student_minus.to(work)
    b = teacher_plus.detach().to(work) - teacher_minus.detach().to(work)
    if divergence == "kl":
        log_q, log_p = a.log_softmax(-1), b.log_softmax(-1)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    elif divergence == "l1":
        terms = (a - b).abs()
    else:
        terms = (a - b).square()
    loss = terms.sum(-1)
    return loss if reduction == "none" else getattr(loss, reduction)()


def igdm_loss(
    student_plus: Tensor,
    student_minus: Tensor,
    teacher_plus: Tensor,
    teacher_minus: Tensor,
    *,
    divergence: str = "kl",
    reduction: str = "mean",
) -> Tensor:
    """Distance between the two logit differences; float32 result, gradient to the student's two tensors."""
    return igdm_loss_ref(
        student_plus, student_minus, teacher_plus, teacher_minus, divergence=divergence, reduction=reduction
    )
