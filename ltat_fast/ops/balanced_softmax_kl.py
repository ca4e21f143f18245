"""Balanced softmax cross-entropy with distillation, one value a sample.

    b_c    = tau * log n_c                                         class prior of the training set, n_c^tau with 0^0 = 1
    BSL    = -log softmax(z + b)[y]                                (Ren et al. 2020, eq. 3; AT-BSL: tau = 1)
    KL     = sum_k P_k (log P_k - log Q_k),   P = softmax(t / T),  Q = softmax(z / T)
    loss   = BSL + kl_weight * KL                                  no T^2 factor; the KL sees the raw logits z

Shapes: logits z and teacher logits t (B, C), labels y (B,), class counts n (C,).
"""

import torch
from torch import Tensor


def balanced_softmax_kl_ref(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    tau: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Plain-torch :func:`balanced_softmax_kl`, in float32 (float64 for float64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_prior = tau * class_counts.to(z).log() if tau else torch.zeros_like(z[:1])
    loss = -(z + log_prior).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    if teacher_logits is not None:
        log_q = (z / temperature).log_softmax(-1)
        log_p = (teacher_logits.detach().to(z) / temperature).log_softmax(-1)
        p = log_p.exp()
        # a class the teacher gives no mass adds nothing, also where the student gives it none
        loss = loss + kl_weight * torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return _reduce(loss, reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else getattr(loss, reduction)()


def balanced_softmax_kl(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    tau: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """BSL(logits + tau log n) + kl_weight * KL(teacher || student); float32 result, gradient to ``logits`` only."""
    class_counts = torch.as_tensor(class_counts, device=logits.device)
    return balanced_softmax_kl_ref(
        logits,
        labels,
        class_counts,
        teacher_logits,
        tau=tau,
        kl_weight=kl_weight,
        temperature=temperature,
        reduction=reduction,
    )
