"""Balanced softmax cross-entropy plus distillation on the GPU: logits s, teacher t, labels y, class counts n.

    z      = s + tau * log n
    u_c    = (1 - e) [c = y] + e / K         smoothed label: K classes are not excluded and share e, e = 0 is onehot(y)
    loss_i = [logsumexp(z) - sum_c u_c z_c] + kl_weight * KL(softmax(t / T) || softmax(s / T))
    d loss_i / ds = softmax(z) - u + kl_weight / T * (softmax(s / T) - softmax(t / T))

Forward: one pass over the rows with an online softmax (one iteration if a row fits a tile). It also saves the maximum
and the log-sum of each softmax per row. Backward: one elementwise pass that recomputes the gradient from these.

The alternative is to compute the gradient in the forward and to scale it by the upstream gradient in the backward. With
a teacher it moves as many elements (5 B C), without a teacher more (4 B C instead of 3 B C). But it keeps a (B, C)
buffer alive between forward and backward, rounds a bf16 gradient twice, and computes a gradient in a forward that needs
none. At 128 x 10 to 128 x 200 both designs are launch-bound, so the large shapes decide.

The reductions "mean" and "sum" are a second launch over the row losses. Its order is fixed, so the result is
deterministic, which atomics are not. A scheme in which the last block reduces would need a zeroed counter: another
launch, or a counter that streams share.

Arithmetic is in log space, and rows are shifted by their maximum before anything is scaled or exponentiated. So logits
of +-1e4 are as exact as small ones, except for the rounding of s + tau * log n, which every fp32 implementation has.
"""

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def tile(num_classes: int, smooth: bool = False) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a program: several short rows, one row, or one row in several pieces.

    At most 16 elements per thread: enough 16-byte loads are in flight, and two tensors with their exponentials fit
    into registers. Smoothed labels also need the class prior, so their tile of 4096 columns has 8 elements per thread.
    """
    columns = min(triton.next_power_of_2(num_classes), 4096)
    rows = min(max(1024 // columns, 1), 32)
    warps = 4 if columns < 4096 else 16 if smooth else 8
    return rows, columns, warps


def stats_rows(teacher_logits: torch.Tensor | None) -> int:
    """Return the number of rows of the statistics: maximum and log-sum of the balanced, student and teacher softmax."""
    return 2 if teacher_logits is None else 6


@triton.jit
def _log_prior(counts_ptr, classes, mask, tau):
    """Return tau * log n: -inf for an empty class, which then has no probability, and 0 for every class if tau is 0."""
    count = tl.load(counts_ptr + classes, mask=mask, other=1).to(tl.float32)
    return tl.where(tau == 0, 0.0, tau * tl.log(count))


@triton.jit
def _share(counts_ptr, tau, label_smoothing, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Return label_smoothing / K, the share of each class that is not excluded in a smoothed label."""
    number = 0.0
    for start in range(0, C, COLUMNS):
        classes = start + tl.arange(0, COLUMNS)
        prior = _log_prior(counts_ptr, classes, classes < C, tau)
        number += tl.sum(tl.where((classes < C) & (prior > -float("inf")), 1.0, 0.0), axis=0)
    return label_smoothing / number


@triton.jit
def _forward_kernel(
    logits_ptr,  # [B, C] student
    labels_ptr,  # [B] int64
    counts_ptr,  # [C] class counts
    teacher_ptr,  # [B, C] teacher; unused without HAS_TEACHER
    loss_ptr,  # [B] fp32 row losses
    stats_ptr,  # [2 or 6, B] fp32: per softmax the row maximum of the raw logits, then log sum exp((v - max) / T)
    tau,
    kl_weight,
    inv_temperature,
    label_smoothing,  # unused without SMOOTH
    B,
    # constexpr, because C is constant in a training run. So C = 100 or 1000 gets 16-byte loads too. As a run-time
    # argument, only a multiple of 16 would get them.
    C: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tau, inv_temperature = tl.cast(tau, tl.float32), tl.cast(inv_temperature, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < B
    label = tl.load(labels_ptr + rows, mask=row_mask, other=0)
    label_ok = (label >= 0) & (label < C)
    tl.device_assert(label_ok, "balanced_softmax_kl: label outside [0, number of classes)")

    # The maxima start at a finite number: then a leading block of -inf gives exp(-inf) = 0 and not exp(-inf + inf).
    z_max = tl.full([ROWS], LOWEST, tl.float32)
    s_max = tl.full([ROWS], LOWEST, tl.float32)
    t_max = tl.full([ROWS], LOWEST, tl.float32)
    z_sum = tl.zeros([ROWS], tl.float32)
    s_sum = tl.zeros([ROWS], tl.float32)
    t_sum = tl.zeros([ROWS], tl.float32)
    # sum_c e^a (a - b) with a = (t_c - t_max) / T and b = (s_c - s_max) / T: an offset of the logits cancels.
    cross = tl.zeros([ROWS], tl.float32)
    if SMOOTH:
        # sum of z_c - anchor over the classes that share the label; the anchor keeps the digits of large logits
        anchor = tl.load(logits_ptr + rows * LOGITS_STRIDE + label, mask=row_mask & label_ok, other=0.0).to(tl.float32)
        anchor = tl.where(anchor == -float("inf"), 0.0, anchor)
        shared_sum = tl.zeros([ROWS], tl.float32)
        e = tl.cast(label_smoothing, tl.float32)
        share = _share(counts_ptr, tau, e, C, COLUMNS)
    for start in range(0, C, COLUMNS):
        classes = start + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (classes < C)[None, :]
        s_ptrs = logits_ptr + rows[:, None] * LOGITS_STRIDE + classes[None, :]
        s = tl.load(s_ptrs, mask=mask, other=-float("inf")).to(tl.float32)
        prior = _log_prior(counts_ptr, classes, classes < C, tau)
        z = s + prior[None, :]
        if SMOOTH:
            shares = (classes < C) & (prior > -float("inf"))
            shared_sum += tl.sum(tl.where(shares[None, :], z - anchor[:, None], 0.0), axis=1)
        new_max = tl.maximum(z_max, tl.max(z, axis=1))
        z_sum = z_sum * tl.exp(z_max - new_max) + tl.sum(tl.exp(z - new_max[:, None]), axis=1)
        z_max = new_max
        if HAS_TEACHER:
            t_ptrs = teacher_ptr + rows[:, None] * TEACHER_STRIDE + classes[None, :]
            t = tl.load(t_ptrs, mask=mask, other=-float("inf")).to(tl.float32)
            new_max = tl.maximum(s_max, tl.max(s, axis=1))
            s_shift = (new_max - s_max) * inv_temperature
            b = (s - new_max[:, None]) * inv_temperature
            s_sum = s_sum * tl.exp(-s_shift) + tl.sum(tl.exp(b), axis=1)
            s_max = new_max

            new_max = tl.maximum(t_max, tl.max(t, axis=1))
            t_shift = (new_max - t_max) * inv_temperature
            a = (t - new_max[:, None]) * inv_temperature
            weight = tl.exp(a)
            carried = t_sum * tl.exp(-t_shift)
            cross = tl.where(carried > 0, cross * tl.exp(-t_shift) + carried * (s_shift - t_shift), 0.0)
            # A class without teacher probability adds 0, not 0 * inf.
            cross += tl.sum(tl.where(weight > 0, weight * (a - b), 0.0), axis=1)
            t_sum = carried + tl.sum(weight, axis=1)
            t_max = new_max

    z_label = tl.load(logits_ptr + rows * LOGITS_STRIDE + label, mask=row_mask & label_ok, other=0.0).to(tl.float32)
    z_label += _log_prior(counts_ptr, label, row_mask & label_ok, tau)
    # A label out of range makes the loss of the row NaN and, through the saved statistics, its gradient too.
    z_log_sum = tl.where(label_ok, tl.log(z_sum), float("nan"))
    if SMOOTH:
        loss = z_log_sum - (1 - e) * (z_label - z_max) - (share * shared_sum + e * (anchor - z_max))
    else:
        loss = z_log_sum - (z_label - z_max)
    tl.store(stats_ptr + rows, z_max, mask=row_mask)
    tl.store(stats_ptr + B + rows, z_log_sum, mask=row_mask)
    if HAS_TEACHER:
        s_log_sum, t_log_sum = tl.log(s_sum), tl.log(t_sum)
        loss += tl.cast(kl_weight, tl.float32) * (cross / t_sum - t_log_sum + s_log_sum)
        tl.store(stats_ptr + 2 * B + rows, s_max, mask=row_mask)
        tl.store(stats_ptr + 3 * B + rows, s_log_sum, mask=row_mask)
        tl.store(stats_ptr + 4 * B + rows, t_max, mask=row_mask)
        tl.store(stats_ptr + 5 * B + rows, t_log_sum, mask=row_mask)
    tl.store(loss_ptr + rows, loss, mask=row_mask)


@triton.jit
def _backward_kernel(
    grad_loss_ptr,  # [B] or one element (GRAD_LOSS_STRIDE 0), fp32, read on the device
    logits_ptr,  # [B, C] student
    labels_ptr,  # [B] int64
    counts_ptr,  # [C] class counts
    teacher_ptr,  # [B, C] teacher; unused without HAS_TEACHER
    stats_ptr,  # [2 or 6, B] fp32, from the forward
    grad_logits_ptr,  # [B, C] out
    tau,
    kl_weight,
    inv_temperature,
    label_smoothing,  # unused without SMOOTH
    scale,  # 1 / B for the mean, else 1
    B,
    C: tl.constexpr,
    GRAD_LOSS_STRIDE: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    GRAD_LOGITS_STRIDE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tau, inv_temperature = tl.cast(tau, tl.float32), tl.cast(inv_temperature, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < B
    classes = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (classes < C)[None, :]
    label = tl.load(labels_ptr + rows, mask=row_mask, other=0)
    upstream = tl.load(grad_loss_ptr + rows * GRAD_LOSS_STRIDE, mask=row_mask, other=0.0)
    z_max = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
    z_log_sum = tl.load(stats_ptr + B + rows, mask=row_mask, other=0.0)
    if SMOOTH:
        e = tl.cast(label_smoothing, tl.float32)
        share = _share(counts_ptr, tau, e, C, COLUMNS)

    s_ptrs = logits_ptr + rows[:, None] * LOGITS_STRIDE + classes[None, :]
    s = tl.load(s_ptrs, mask=mask, other=-float("inf")).to(tl.float32)
    prior = _log_prior(counts_ptr, classes, classes < C, tau)
    z = s + prior[None, :]
    grad = tl.exp(z - z_max[:, None] - z_log_sum[:, None])
    if SMOOTH:
        grad -= tl.where(classes[None, :] == label[:, None], 1 - e, 0.0)
        grad -= tl.where(prior > -float("inf"), share, 0.0)[None, :]
    else:
        grad -= tl.where(classes[None, :] == label[:, None], 1.0, 0.0)
    if HAS_TEACHER:
        s_max = tl.load(stats_ptr + 2 * B + rows, mask=row_mask, other=0.0)
        s_log_sum = tl.load(stats_ptr + 3 * B + rows, mask=row_mask, other=0.0)
        t_max = tl.load(stats_ptr + 4 * B + rows, mask=row_mask, other=0.0)
        t_log_sum = tl.load(stats_ptr + 5 * B + rows, mask=row_mask, other=0.0)
        t_ptrs = teacher_ptr + rows[:, None] * TEACHER_STRIDE + classes[None, :]
        t = tl.load(t_ptrs, mask=mask, other=-float("inf")).to(tl.float32)
        student = tl.exp((s - s_max[:, None]) * inv_temperature - s_log_sum[:, None])
        teacher = tl.exp((t - t_max[:, None]) * inv_temperature - t_log_sum[:, None])
        grad += tl.cast(kl_weight, tl.float32) * inv_temperature * (student - teacher)
    grad *= (upstream * tl.cast(scale, tl.float32))[:, None]
    tl.store(grad_logits_ptr + rows[:, None] * GRAD_LOGITS_STRIDE + classes[None, :], grad, mask=mask)


def launch_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    loss: torch.Tensor,
    stats: torch.Tensor,
    tau: float,
    kl_weight: float,
    temperature: float,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Write the loss (fp32, shape () for "mean" and "sum", (B,) for "none") and the statistics for the backward."""
    B, C = logits.shape
    assert reduction in ("mean", "sum", "none")
    assert logits.stride(1) == 1 or C == 1
    assert teacher_logits is None or teacher_logits.shape == logits.shape
    assert teacher_logits is None or teacher_logits.stride(1) == 1 or C == 1
    assert stats.shape == (stats_rows(teacher_logits), B)
    assert stats.is_contiguous()
    rows, columns, warps = tile(C, label_smoothing > 0)
    teacher = logits if teacher_logits is None else teacher_logits
    with torch.cuda.device_of(logits):
        row_loss = loss if reduction == "none" else torch.empty(B, dtype=torch.float32, device=logits.device)
        if B > 0:
            _forward_kernel[(triton.cdiv(B, rows),)](
                logits, labels, class_counts, teacher, row_loss, stats,
                float(tau), float(kl_weight), 1 / temperature, float(label_smoothing), B,
                C, logits.stride(0), teacher.stride(0), teacher_logits is not None, label_smoothing > 0,
                rows, columns, num_warps=warps,
            )  # fmt: skip
        if reduction != "none":
            (torch.mean if reduction == "mean" else torch.sum)(row_loss, dim=0, out=loss)


def launch_backward(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    stats: torch.Tensor,
    grad_logits: torch.Tensor,
    tau: float,
    kl_weight: float,
    temperature: float,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Write the gradient of the logits. ``grad_loss`` is fp32 of shape (), or (B,) with any stride for "none"."""
    B, C = logits.shape
    assert grad_loss.shape == ((B,) if reduction == "none" else ())
    assert grad_logits.shape == (B, C)
    assert grad_logits.stride(1) == 1 or C == 1
    if B == 0:
        return
    rows, columns, warps = tile(C, label_smoothing > 0)
    teacher = logits if teacher_logits is None else teacher_logits
    with torch.cuda.device_of(logits):
        _backward_kernel[(triton.cdiv(B, rows), triton.cdiv(C, columns))](
            grad_loss, logits, labels, class_counts, teacher, stats, grad_logits,
            float(tau), float(kl_weight), 1 / temperature, float(label_smoothing),
            1 / B if reduction == "mean" else 1.0, B,
            C, grad_loss.stride(0) if reduction == "none" else 0,
            logits.stride(0), teacher.stride(0), grad_logits.stride(0),
            teacher_logits is not None, label_smoothing > 0, rows, columns, num_warps=warps,
        )  # fmt: skip
