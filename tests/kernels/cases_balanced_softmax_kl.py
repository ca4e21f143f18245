"""Value tests of kernels/balanced_softmax_kl.py, on the CPU with TRITON_INTERPRET=1, else on the GPU.

test_interpret.py runs them.
"""

import importlib
import itertools
import os

import pytest
import torch
from torch.testing import assert_close

from ltat_fast.kernels import balanced_softmax_kl as kernels
from ltat_fast.ops import balanced_softmax_kl_ref

# `from ltat_fast.ops import balanced_softmax_kl` would import the function, not the module
op = importlib.import_module("ltat_fast.ops.balanced_softmax_kl")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
# numpy warns of infinity and NaN in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
# Several rows per program with an incomplete last tile (2 to 200 classes), one row per program (1000, 1271), several
# pieces per row (10000).
SHAPES = [(1, 2), (41, 2), (7, 10), (33, 10), (128, 100), (41, 200), (3, 1000), (2, 1271), (3, 10000)]
# Rounding of the stored gradient: Triton's interpreter truncates to bf16, the GPU rounds to nearest. The loss and the
# arithmetic are fp32 for every dtype of the logits.
GRAD_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}


def log_prior(class_counts, tau):
    return torch.zeros_like(class_counts, dtype=torch.float64) if tau == 0 else tau * class_counts.double().log()


def smoothed_label(y, counts, tau, smoothing):
    """Return (1 - smoothing) onehot(y) + smoothing / K on the K classes that are not excluded, in float64."""
    included = (log_prior(counts, tau) > -INF).double()
    return (1 - smoothing) * torch.nn.functional.one_hot(y, len(counts)) + smoothing * included / included.sum()


def reference_loss(s, y, counts, t, tau, kl_weight, temperature, smoothing=0.0):
    """Return the row losses in float64, from the definition."""
    s = s.double()
    log_q = torch.log_softmax(s + log_prior(counts, tau), dim=1)
    label = smoothed_label(y, counts, tau, smoothing)
    loss = -torch.where(label > 0, label * log_q, 0.0).sum(1)
    if t is not None:
        log_p = torch.log_softmax(t.double() / temperature, dim=1)
        log_ratio = log_p - torch.log_softmax(s / temperature, dim=1)
        loss = loss + kl_weight * torch.where(log_p.exp() > 0, log_p.exp() * log_ratio, 0.0).sum(1)
    return loss


def reference_grad(s, y, counts, t, tau, kl_weight, temperature, smoothing=0.0):
    """Return the gradient of the row losses in float64, in closed form. A test below checks it against autograd."""
    s = s.double()
    grad = torch.softmax(s + log_prior(counts, tau), dim=1)
    grad = grad - smoothed_label(y, counts, tau, smoothing)
    if t is not None:
        gap = torch.softmax(s / temperature, dim=1) - torch.softmax(t.double() / temperature, dim=1)
        grad = grad + kl_weight / temperature * gap
    return grad


def long_tailed_counts(C, dtype=torch.float32):
    return (500 * 0.1 ** (torch.arange(C) / max(C - 1, 1))).to(dtype).to(DEVICE)


def case(B, C, dtype=torch.float32, spread=3.0, seed=0):
    """Return (logits, labels, class counts, teacher logits)."""
    g = torch.Generator().manual_seed(seed)
    s, t = (spread * torch.randn(B, C, generator=g) for _ in range(2))
    y = torch.randint(C, (B,), generator=g)
    return s.to(DEVICE, dtype), y.to(DEVICE), long_tailed_counts(C), t.to(DEVICE, dtype)


def forward(s, y, counts, t, tau=1.0, kl_weight=0.5, temperature=2.0, smoothing=0.0, reduction="none"):
    shape = (len(s),) if reduction == "none" else ()
    loss = torch.full(shape, 123.0, device=DEVICE)
    stats = torch.full((kernels.stats_rows(t), len(s)), 123.0, device=DEVICE)
    kernels.launch_forward(s, y, counts, t, loss, stats, tau, kl_weight, temperature, smoothing, reduction)
    return loss, stats


def backward(
    grad_loss, stats, s, y, counts, t, tau=1.0, kl_weight=0.5, temperature=2.0, smoothing=0.0, reduction="none"
):
    grad = torch.full(s.shape, 123.0, dtype=s.dtype, device=DEVICE)
    kernels.launch_backward(grad_loss, s, y, counts, t, stats, grad, tau, kl_weight, temperature, smoothing, reduction)
    return grad


def check(s, y, counts, t, tau=1.0, kl_weight=0.5, temperature=2.0, smoothing=0.0, reduction="none", atol=1e-6):
    """Check loss and gradient, with a random upstream gradient, against the references."""
    args = (s, y, counts, t, tau, kl_weight, temperature, smoothing)
    rows, grad_rows = reference_loss(*args), reference_grad(*args)
    shape = (len(s),) if reduction == "none" else ()
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    loss, stats = forward(*args, reduction)
    grad = backward(upstream, stats, *args, reduction)
    if reduction == "none":
        expected, expected_grad = rows, grad_rows * upstream[:, None]
    else:
        scale = 1 / len(s) if reduction == "mean" else 1
        expected, expected_grad = rows.sum() * scale, grad_rows * upstream * scale
    assert_close(loss.double(), expected, rtol=1e-5, atol=2 * atol)
    assert grad.dtype == s.dtype
    assert_close(grad.double(), expected_grad.double(), rtol=GRAD_RTOL[s.dtype], atol=atol)


def test_reference_gradient_is_the_derivative_of_the_reference_loss():
    s, y, counts, t = case(5, 7)
    s = s.double().requires_grad_()
    reference_loss(s, y, counts, t, 0.7, 0.3, 2.5, 0.2).sum().backward()
    assert_close(s.grad, reference_grad(s.detach(), y, counts, t, 0.7, 0.3, 2.5, 0.2))


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(shape, dtype, distilled):
    s, y, counts, t = case(*shape, dtype)
    check(s, y, counts, t if distilled else None)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(41, 2), (33, 10), (9, 100), (3, 1271), (2, 10000)], ids=str)
def test_label_smoothing(shape, tau, distilled):
    s, y, counts, t = case(*shape)
    if shape[1] > 2:
        counts[3] = counts[-1] = 0
        y[(y == 3) | (y == shape[1] - 1)] = 0
    check(s, y, counts, t if distilled else None, tau=tau, smoothing=0.3, atol=2e-6)
    check(s, y, counts, t if distilled else None, tau=tau, smoothing=0.9, reduction="mean", atol=2e-6)


def test_label_smoothing_over_many_pieces(monkeypatch):
    """The running maximum rises with every piece, or only with the first one. Some pieces hold no class that shares."""
    monkeypatch.setattr(kernels, "tile", lambda *_: (4, 16, 4))
    s, y, counts, _ = case(3, 401)
    counts[:40] = counts[200:230] = 0
    y[:] = 60
    rise = torch.linspace(0, 60, 401, device=DEVICE)
    for z in (s, s + rise, s - rise, 1e4 * s.sign()):
        check(z, y, counts, None, smoothing=0.3, atol=1.5e-3 if z.abs().max() > 1e3 else 1e-5)
    s[1, 300] = -INF  # a class that shares the label: the loss is +inf, as in torch
    s[2, 210] = -INF  # an excluded class
    loss, stats = forward(s, y, counts, None, smoothing=0.3)
    assert loss.isinf().tolist() == [False, True, False]
    check(s, y, counts, None, smoothing=0.3, atol=1e-5)
    s[1, 50:60] = -INF  # and whole pieces at the start of the row
    s[:, 40:60] = -INF
    loss, stats = forward(s, y, counts, None, smoothing=0.3)
    assert loss.isinf().all()
    grad = backward(torch.ones_like(loss), stats, s, y, counts, None, smoothing=0.3)
    expected = reference_grad(s, y, counts, None, 1.0, 0.0, 1.0, 0.3)
    assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 10), (41, 100), (2, 5000)], ids=str)
def test_reductions(shape, reduction):
    check(*case(*shape), reduction=reduction)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kl_weight", [0.5, 3.0])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_hyper_parameters(tau, kl_weight, temperature):
    check(*case(9, 10), tau=tau, kl_weight=kl_weight, temperature=temperature)


@pytest.mark.parametrize("columns", [16, 64, 256])
def test_online_softmax_over_many_pieces(monkeypatch, columns):
    """Split rows into 26, 7 and 2 pieces. The running maximum rises with every piece, or only with the first one."""
    monkeypatch.setattr(kernels, "tile", lambda *_: (4, columns, 4))
    s, y, counts, t = case(3, 401)
    rise = torch.linspace(0, 60, 401, device=DEVICE)
    check(s, y, counts, t)
    check(s + rise, y, counts, t + rise)
    check(s - rise, y, counts, t - rise)
    check(s + rise, y, counts, t - rise)


@pytest.mark.parametrize("C", [10, 200, 10000])
def test_extreme_logits(C):
    """Check logits of +-1e4, equal rows of huge logits, and a common offset of 1e4, which must cancel."""
    s, y, counts, t = case(6, C)
    s[0], t[0] = 1e4 * s[0].sign(), 1e4 * t[0].sign()
    s[1] = t[1] = 1e4 * t[1].sign()
    s[2] = t[2].add_(1e4)
    s[3], t[3] = -1e4, 1e4
    s[4] += 1e4
    check(s, y, counts, t, tau=0.0, temperature=1.0)
    # The prior is added to the logit in fp32, whose spacing is 1e-3 at 1e4. Plain fp32 torch has the same error.
    check(s, y, counts, t, temperature=1.0, atol=1.5e-3)
    loss, _ = forward(s, y, counts, t, kl_weight=1.0)
    plain, _ = forward(s, y, counts, None)
    assert_close(loss[1:4], plain[1:4], rtol=0, atol=1e-5)  # KL(p || p) = 0, also for two uniform rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits(dtype, monkeypatch):
    """Mask the same classes of student and teacher, among them the first pieces, and some of the teacher alone."""
    monkeypatch.setattr(kernels, "tile", lambda *_: (4, 16, 4))
    s, y, counts, t = case(6, 100, dtype)
    y[:] = 60
    s[:, :40] = t[:, :40] = -INF
    t[3:, 80:] = -INF
    check(s, y, counts, t)


def test_student_without_probability_where_the_teacher_has_some():
    """The KL is +inf, and the gradient stays finite."""
    s, y, counts, t = case(3, 100)
    y[:] = 0
    s[1, 50] = -INF
    loss, stats = forward(s, y, counts, t)
    assert loss.isinf().tolist() == [False, True, False]
    grad = backward(torch.ones_like(loss), stats, s, y, counts, t)
    assert_close(grad.double(), reference_grad(s, y, counts, t, 1.0, 0.5, 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts_dtype", [torch.float32, torch.int64, torch.int32], ids=str)
def test_class_with_zero_count(counts_dtype):
    """The balanced softmax excludes the class. A row with that label has the loss +inf and a finite gradient."""
    s, y, _, t = case(8, 10)
    counts = long_tailed_counts(10, counts_dtype)
    counts[4] = 0
    y[:] = torch.arange(8, device=DEVICE)
    y[4] = 9
    check(s, y, counts, t)
    loss, stats = forward(s, y, counts, None)
    assert (backward(torch.ones_like(loss), stats, s, y, counts, None)[:, 4] == 0).all()
    assert_close(loss, forward(s, y, counts, None)[0])
    y[4] = 4
    loss, stats = forward(s, y, counts, None)
    assert loss.isinf().tolist() == [i == 4 for i in range(8)]
    grad = backward(torch.ones_like(loss), stats, s, y, counts, None)
    assert_close(grad.double(), reference_grad(s, y, counts, None, 1.0, 0.0, 1.0), rtol=1e-5, atol=1e-6)
    check(s, y, counts, t, tau=0.0)  # 0 * log 0 = 0: no prior


@pytest.mark.parametrize("wrong", [-1, 10, 2**40, -(2**63)])
def test_label_out_of_range_makes_only_its_row_nan(wrong):
    s, y, counts, t = case(5, 10)
    good, good_stats = forward(s, y, counts, t)
    good_grad = backward(torch.ones_like(good), good_stats, s, y, counts, t)
    y[2] = wrong
    loss, stats = forward(s, y, counts, t)
    grad = backward(torch.ones_like(loss), stats, s, y, counts, t)
    others = [0, 1, 3, 4]
    assert loss[2].isnan()
    assert grad[2].isnan().all()
    assert torch.equal(loss[others], good[others])
    assert torch.equal(grad[others], good_grad[others])


def test_nan_and_fully_masked_rows_are_nan_as_in_torch():
    s, y, counts, t = case(4, 10)
    s[0, 3], s[1], t[2, 3] = NAN, -INF, NAN
    loss, stats = forward(s, y, counts, t)
    grad = backward(torch.ones_like(loss), stats, s, y, counts, t)
    assert loss.isnan().tolist() == [True, True, True, False]
    assert grad.isnan().all(dim=1).tolist() == [True, True, True, False]


def test_row_strides_and_strided_upstream():
    s, y, counts, t = case(9, 41)
    wide_s, wide_t, wide_grad = (torch.full((9, 64), NAN, device=DEVICE) for _ in range(3))
    wide_s[:, 5:46], wide_t[:, 2:43] = s, t
    upstream = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    view_s, view_t, view_grad = wide_s[:, 5:46], wide_t[:, 2:43], wide_grad[:, 1:42]
    loss, stats = forward(view_s, y, counts, view_t)
    assert torch.equal(loss, forward(s, y, counts, t)[0])
    for grad_loss in (upstream[:, 1], torch.tensor(3.0, device=DEVICE).expand(9)):
        kernels.launch_backward(grad_loss, view_s, y, counts, view_t, stats, view_grad, 1.0, 0.5, 2.0, 0.0, "none")
        expected = reference_grad(s, y, counts, t, 1.0, 0.5, 2.0) * grad_loss.double()[:, None]
        assert_close(view_grad.double(), expected, rtol=1e-5, atol=1e-6)
        assert wide_grad[:, 0].isnan().all()
        assert wide_grad[:, 42:].isnan().all()


def test_teacher_of_another_dtype():
    s, y, counts, t = case(7, 100)
    check(s, y, counts, t.bfloat16())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
def test_repeated_runs_give_the_same_bits():
    s, y, counts, t = case(128, 100)
    first = forward(s, y, counts, t, reduction="mean")
    for _ in range(2):
        again = forward(s, y, counts, t, reduction="mean")
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction):
    s, y, counts, t = case(0, 10)
    loss, stats = forward(s, y, counts, t, reduction=reduction)
    backward(loss, stats, s, y, counts, t, reduction=reduction)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert loss.sum() == 0


def test_tiles_are_powers_of_two_with_at_most_16_elements_per_thread():
    for C, smooth in itertools.product(range(2, 12000), (False, True)):
        rows, columns, warps = kernels.tile(C, smooth)
        assert rows & (rows - 1) == columns & (columns - 1) == 0
        assert min(C, 4096) <= columns < 2 * C
        assert rows * columns <= 16 * 32 * warps


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("teacher_layout", ["none", "rows", "columns"])
def test_registered_functions_take_any_strides(teacher_layout, reduction):
    """Check the functions that ltat_fast/ops registers for CUDA, and the shapes that their fakes return."""
    logits, labels, counts, teacher = case(5, 17, spread=1.0)
    t = {"none": None, "rows": teacher, "columns": teacher.T.contiguous().T}[teacher_layout]
    spread_labels = torch.stack([labels, labels], 1)[:, 0]
    scalars = {"tau": 0.7, "kl_weight": 1.7, "temperature": 2.5, "label_smoothing": 0.2}
    for z, n in ((logits, counts), (logits.T.contiguous().T, counts.long())):
        args = (z, spread_labels, n, t, *scalars.values(), reduction)
        loss, stats = op._forward_cuda(*args)
        upstream = torch.rand(10, device=DEVICE)[::2] if reduction == "none" else torch.tensor(1.3, device=DEVICE)
        grad = op._backward_cuda(upstream, *args[:4], stats, *args[4:])
        fakes = (*op._loss_and_stats(*args), op._grad_logits(loss, z))
        for real, fake in zip((loss, stats, grad), fakes, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
        wanted = logits.double().requires_grad_()
        exact = balanced_softmax_kl_ref(wanted, labels, n, t, reduction=reduction, **scalars)
        torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6)
        (right,) = torch.autograd.grad(exact, wanted, upstream.double())
        torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=1e-6)
