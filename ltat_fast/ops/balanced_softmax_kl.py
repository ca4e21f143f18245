"""Balanced softmax cross-entropy plus distillation: fused loss and gradient, without a (B, C) intermediate.

    b_c    = log(n_c^tau)                                    class prior; n_c = 0 excludes class c, and 0^0 = 1
    u_c    = (1 - s) [c = y] + s / K                         label; s: label smoothing (Szegedy et al. 2016, section 7)
    BSL    = -sum_c u_c log softmax(z + b)[c]                (Ren et al. 2020, eq. 3; AT-BSL: tau = 1, s = 0)
    KL     = sum_k P_k (log P_k - log Q_k)                   P = softmax(t / T), Q = softmax(z / T); 0 log 0 = 0
    loss   = BSL + kl_weight * KL                            no T^2 factor; the KL sees the raw logits z, without b

    d loss / d z = softmax(z + b) - u + (kl_weight / T) * (Q - P);   the teacher gets no gradient

The K classes that are not excluded share s: an excluded class does not make every loss infinite.

Student logits z and teacher logits t have shape (B, C) and dtype float32, bfloat16 or float16 (float64 on the CPU).
Labels y have shape (B,) and dtype int64, class counts n have shape (C,). Arithmetic is in log space and relative to the
maximum of the row, so that logits of 1e4 and masks of -inf are exact. The methods at_bsl, robal, reat and ltat use this
loss. With tau = 0 and a teacher it is the loss of ARD.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import inf

import torch
from torch import Tensor

from ltat_fast.ops._operator import (
    Operator,
    check_dense,
    check_like,
    check_logits,
    check_reduction,
    no_double_backward,
)


def balanced_softmax_kl_ref(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    tau: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Plain-torch :func:`balanced_softmax_kl`, in float32 (float64 for float64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_prior = tau * class_counts.to(z).log() if tau else torch.zeros_like(z[:1])
    log_b = (z + log_prior).log_softmax(-1)
    loss = -log_b.gather(-1, labels[:, None])[:, 0]
    if label_smoothing:
        included = log_prior > -inf
        uniform = -torch.where(included, log_b, 0.0).sum(-1) / included.sum(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if teacher_logits is not None:
        log_q = (z / temperature).log_softmax(-1)
        log_p = (teacher_logits.detach().to(z) / temperature).log_softmax(-1)
        p = log_p.exp()
        loss = loss + kl_weight * torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    return loss if reduction == "none" else getattr(loss, reduction)()


def _loss_and_stats(logits, labels, class_counts, teacher_logits, tau, kl_weight, temperature, smoothing, reduction):
    """Allocate the outputs. ``stats`` holds the maximum and log-sum of each softmax per row, for the backward."""
    rows, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty((2 if teacher_logits is None else 6, rows), dtype=dtype)


def _grad_logits(grad_loss, logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _forward_cuda(logits, labels, class_counts, teacher_logits, *scalars_and_reduction):
    from ltat_fast.kernels.balanced_softmax_kl import launch_forward  # pyright: ignore[reportMissingImports]

    logits, labels, class_counts, teacher_logits = _launchable(logits, labels, class_counts, teacher_logits)
    loss, stats = _loss_and_stats(logits, labels, class_counts, teacher_logits, *scalars_and_reduction)
    launch_forward(logits, labels, class_counts, teacher_logits, loss, stats, *scalars_and_reduction)
    return loss, stats


def _backward_cuda(grad_loss, logits, labels, class_counts, teacher_logits, stats, *scalars_and_reduction):
    from ltat_fast.kernels.balanced_softmax_kl import launch_backward  # pyright: ignore[reportMissingImports]

    logits, labels, class_counts, teacher_logits = _launchable(logits, labels, class_counts, teacher_logits)
    grad_logits = _grad_logits(grad_loss, logits)
    launch_backward(grad_loss, logits, labels, class_counts, teacher_logits, stats, grad_logits, *scalars_and_reduction)
    return grad_logits


def _launchable(
    logits: Tensor, labels: Tensor, class_counts: Tensor, teacher_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors with strides that the launchers accept: any stride between rows, stride 1 between classes."""

    def unit_columns(t: Tensor) -> Tensor:
        return t if t.stride(1) == 1 else t.contiguous()

    teacher_logits = None if teacher_logits is None else unit_columns(teacher_logits)
    return unit_columns(logits), labels.contiguous(), class_counts.contiguous(), teacher_logits


_forward = Operator(
    "balanced_softmax_kl(Tensor logits, Tensor labels, Tensor class_counts, Tensor? teacher_logits, float tau, "
    "float kl_weight, float temperature, float label_smoothing, str reduction) -> (Tensor, Tensor)",
    fake=_loss_and_stats,
    triton=_forward_cuda,
    public="balanced_softmax_kl",
)
_backward = Operator(
    "balanced_softmax_kl_backward(Tensor grad_loss, Tensor logits, Tensor labels, Tensor class_counts, "
    "Tensor? teacher_logits, Tensor stats, float tau, float kl_weight, float temperature, float label_smoothing, "
    "str reduction) -> Tensor",
    fake=_grad_logits,
    triton=_backward_cuda,
)


def _save(ctx, inputs, output) -> None:
    logits, labels, class_counts, teacher_logits, *ctx.scalars = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(logits, labels, class_counts, teacher_logits, stats)


def _differentiate(ctx, grad_loss, grad_stats=None):
    grad_logits = _backward(grad_loss, *ctx.saved_tensors, *ctx.scalars)
    return grad_logits, *(None,) * (3 + len(ctx.scalars))


torch.library.register_autograd("ltat::balanced_softmax_kl", _differentiate, setup_context=_save)
torch.library.register_autograd("ltat::balanced_softmax_kl_backward", no_double_backward("balanced_softmax_kl"))


def balanced_softmax_kl(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor | Sequence[float],
    teacher_logits: Tensor | None = None,
    *,
    tau: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return ``BSL(logits + tau * log class_counts) + kl_weight * KL(teacher || student)``.

    The formulas are at the top of this file.

    logits: (B, C), any strides. Only this argument gets a gradient, which is contiguous and has its dtype.
    labels: (B,), any integer dtype, each in [0, C).
    class_counts: number of training samples per class, (C,), >= 0: a tensor on the device of ``logits``, or a sequence.
        The device copy of a sequence is kept for the next call. A count of 0 excludes the class: the loss of a sample
        of that class is +inf.
    teacher_logits: (B, C) or None. If its dtype differs from that of ``logits``, both are promoted to a common dtype.
    tau: strength of the prior, >= 0. 0 is plain cross-entropy.
    kl_weight: weight of the KL. 0 leaves the KL out.
    temperature: temperature of the KL, > 0.
    label_smoothing: share s of the label that is spread evenly over all classes that are not excluded, in [0, 1). If
        no class is excluded, BSL is ``F.cross_entropy(logits + tau * class_counts.log(), labels, label_smoothing=s)``.
    reduction: "mean" over the batch, "sum", or "none".

    Returns float32 (float64 for float64) of shape (), or (B,) for "none". The sum of an empty batch is 0, its mean NaN.

    The call does not synchronise with the device. So a label out of range or a negative count raises ValueError only on
    the CPU. On CUDA it makes the affected losses and gradients NaN, and so does such a label under torch.func.
    Differentiating twice raises RuntimeError.

    Raises ValueError for shapes, devices or numbers that do not fit, TypeError for dtypes that do not fit.
    """
    check_logits("logits", logits)
    check_reduction(reduction)
    if not (0 <= tau < inf and 0 < temperature < inf and -inf < kl_weight < inf):
        numbers = f"{tau=}, {temperature=} and {kl_weight=}"
        raise ValueError(f"need tau >= 0, temperature > 0 and kl_weight, all finite, got {numbers}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    labels = _checked_labels(labels, logits)
    class_counts = _checked_counts(class_counts, logits)
    if kl_weight == 0:
        teacher_logits = None
    elif teacher_logits is not None:
        check_like("teacher_logits", teacher_logits, "logits", logits)
        teacher_logits = teacher_logits.detach() if teacher_logits.requires_grad else teacher_logits
        if teacher_logits.dtype != logits.dtype:
            common = torch.promote_types(logits.dtype, teacher_logits.dtype)
            logits, teacher_logits = logits.to(common), teacher_logits.to(common)

    if not _forward.runs_on(logits):
        logits, labels = _nan_for_wrong_labels(logits, labels)
        return balanced_softmax_kl_ref(
            logits,
            labels,
            class_counts,
            teacher_logits,
            tau=tau,
            kl_weight=kl_weight,
            temperature=temperature,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    scalars = (tau, kl_weight, temperature, label_smoothing)
    return _forward(logits, labels, class_counts, teacher_logits, *scalars, reduction)[0]


def _nan_for_wrong_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Make the row of a label out of range NaN, as the CUDA kernels do.

    torch's gather would instead raise a device-side assertion, after which the process cannot use the device.
    """
    wrong = (labels < 0) | (labels >= logits.shape[1])
    return logits + torch.where(wrong, float("nan"), 0.0).to(logits)[:, None], labels.masked_fill(wrong, 0)


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    check_dense("labels", labels)
    if labels.dtype != torch.int64:
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        labels = labels.long()
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape ({logits.shape[0]},), got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, but logits are on {logits.device}")
    if logits.device.type == "cpu" and "cpu" not in _forward.kernels and not torch.compiler.is_compiling():
        # The C++ kernel checks this itself; plain torch must raise the same error.
        wrong = labels[(labels < 0) | (labels >= logits.shape[1])]
        if wrong.numel():
            raise ValueError(f"label {wrong[0].item()} is outside [0, {logits.shape[1]})")
    return labels


def _checked_counts(class_counts: Tensor | Sequence[float], logits: Tensor) -> Tensor:
    if not isinstance(class_counts, Tensor):
        counts = tuple(float(n) for n in class_counts)
        for n in counts:
            if not 0 <= n < inf:
                raise ValueError(f"class_counts must not be negative, infinite or NaN, got {n}")
        compiling = torch.compiler.is_compiling()
        class_counts = (_on_device.__wrapped__ if compiling else _on_device)(counts, logits.device)
    check_dense("class_counts", class_counts)
    if class_counts.dtype.is_complex:
        raise TypeError(f"class_counts must be real numbers, got {class_counts.dtype}")
    if class_counts.shape != logits.shape[1:]:
        raise ValueError(f"class_counts must have shape ({logits.shape[1]},), got {tuple(class_counts.shape)}")
    if class_counts.device != logits.device:
        raise ValueError(
            f"class_counts are on {class_counts.device}, but logits are on {logits.device}: move the counts there once"
        )
    return class_counts if class_counts.dtype in (torch.float32, torch.int64) else class_counts.float()


@lru_cache(maxsize=16)
def _on_device(counts: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts, dtype=torch.float32, device=device)
