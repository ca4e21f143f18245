"""Indirect gradient matching: fused loss and gradients, without a (B, C) intermediate.

    a = student(x + d) - student(x - d),   b = teacher(x + d) - teacher(x - d)      logit differences, a ~ 2 J_student d
    kl   sum_k P_k (log P_k - log Q_k)     P = softmax(b), Q = softmax(a); 0 log 0 = 0     (Lee et al. 2025, eq. 8)
    l1   sum_k |a_k - b_k|                 l2   sum_k (a_k - b_k)^2

    d loss / d student_plus = G,   d loss / d student_minus = -G
    kl   G = Q - P                         l1   G = sign(a - b)                            l2   G = 2 (a - b)

The four logit tensors have shape (B, C) and dtype float32, bfloat16 or float16 (float64 on the CPU). Arithmetic is
float32. The teacher gets no gradient. The method ltat uses this loss, and every distillation method can add it.
Source: Lee, Cho and Kim, "Indirect Gradient Matching for Adversarial Robust Distillation", ICLR 2025.
"""

from functools import reduce

import torch
from torch import Tensor

from ltat_fast.ops._operator import (
    Operator,
    check_like,
    check_logits,
    check_reduction,
    no_double_backward,
)


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
        terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    elif divergence == "l1":
        terms = (a - b).abs()
    else:
        terms = (a - b).square()
    loss = terms.sum(-1)
    return loss if reduction == "none" else getattr(loss, reduction)()


def _loss(student_plus, student_minus, teacher_plus, teacher_minus, divergence, reduction):
    shape = student_plus.shape[:1] if reduction == "none" else ()
    return student_plus.new_empty(shape, dtype=torch.promote_types(student_plus.dtype, torch.float32))


def _grads(grad_loss, student_plus, *_):
    return tuple(torch.empty_like(student_plus, memory_format=torch.contiguous_format) for _ in range(2))


# The CUDA kernels are C++ too: csrc/igdm_cuda.cpp registers them.
_forward = Operator(
    "igdm(Tensor student_plus, Tensor student_minus, Tensor teacher_plus, Tensor teacher_minus, str divergence, "
    "str reduction) -> Tensor",
    fake=_loss,
    public="igdm_loss",
)
_backward = Operator(
    "igdm_backward(Tensor grad_loss, Tensor student_plus, Tensor student_minus, Tensor teacher_plus, "
    "Tensor teacher_minus, str divergence, str reduction) -> (Tensor, Tensor)",
    fake=_grads,
)


def _save(ctx, inputs, output) -> None:
    *logits, ctx.divergence, ctx.reduction = inputs
    ctx.save_for_backward(*logits)


def _differentiate(ctx, grad_loss):
    grads = _backward(grad_loss, *ctx.saved_tensors, ctx.divergence, ctx.reduction)
    return *grads, None, None, None, None


torch.library.register_autograd("ltat::igdm", _differentiate, setup_context=_save)
torch.library.register_autograd("ltat::igdm_backward", no_double_backward("igdm_loss"))


def igdm_loss(
    student_plus: Tensor,
    student_minus: Tensor,
    teacher_plus: Tensor,
    teacher_minus: Tensor,
    *,
    divergence: str = "kl",
    reduction: str = "mean",
) -> Tensor:
    """Return the distance between the changes of the student's and of the teacher's logits from x - d to x + d.

    The formulas are at the top of this file.

    student_plus, student_minus: student logits at x + d and at x - d, (B, C). They get the gradients.
    teacher_plus, teacher_minus: teacher logits at x + d and at x - d, (B, C). They get no gradient. If the dtypes
        of the four tensors differ, all are promoted to a common dtype.
    divergence: "kl" (as in the paper), "l1" or "l2" (squared), summed over the classes.
    reduction: "mean" over the batch, "sum", or "none".

    Returns float32 (float64 for float64) of shape (), or (B,) for "none". The sum of an empty batch is 0, its mean NaN.
    The call does not synchronise with the device. Differentiating twice raises RuntimeError.

    Raises ValueError for shapes, devices or names that do not fit, TypeError for dtypes that do not fit.
    """
    check_logits("student_plus", student_plus)
    check_like("student_minus", student_minus, "student_plus", student_plus)
    check_like("teacher_plus", teacher_plus, "student_plus", student_plus)
    check_like("teacher_minus", teacher_minus, "student_plus", student_plus)
    check_reduction(reduction)
    if divergence not in ("kl", "l1", "l2"):
        raise ValueError(f"divergence must be 'kl', 'l1' or 'l2', got {divergence!r}")
    if teacher_plus.requires_grad or teacher_minus.requires_grad:
        teacher_plus, teacher_minus = teacher_plus.detach(), teacher_minus.detach()
    logits = (student_plus, student_minus, teacher_plus, teacher_minus)
    if not student_plus.dtype == student_minus.dtype == teacher_plus.dtype == teacher_minus.dtype:
        common = reduce(torch.promote_types, (t.dtype for t in logits))
        logits = tuple(t.to(common) for t in logits)

    if not _forward.runs_on(logits[0]):
        return igdm_loss_ref(*logits, divergence=divergence, reduction=reduction)
    return _forward(*logits, divergence, reduction)
