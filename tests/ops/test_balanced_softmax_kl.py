"""balanced_softmax_kl: values and gradients against float64, extremes, registration, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers.op_cases import (
    DEVICES,
    DTYPES,
    LOSS,
    REDUCTIONS,
    SHAPES,
    assert_same,
    generator,
    gradient_tolerance,
    normal,
)
from ltat_fast.ops import balanced_softmax_kl, balanced_softmax_kl_ref

SCALARS = {"tau": 0.7, "kl_weight": 1.7, "temperature": 2.5, "label_smoothing": 0.0}
SMOOTHING = [0.0, 0.3]


def case(rows, classes, dtype=torch.float32, device="cpu", teacher=True, seed=0):
    """Return logits, labels, long-tailed counts with one empty class that no label names, and teacher logits."""
    logits = normal(rows, classes, dtype=dtype, device=device, seed=seed, scale=3)
    counts = (500 * 0.1 ** (torch.arange(classes) / max(classes - 1, 1))).round()
    labels = torch.randint(0, classes, (rows,), generator=generator(seed + 1))
    if classes > 2:
        counts[classes // 2] = 0
        labels[labels == classes // 2] = 0
    teacher_logits = normal(rows, classes, dtype=dtype, device=device, seed=seed + 2, scale=3) if teacher else None
    return logits, labels.to(device), counts.to(device), teacher_logits


def value_and_gradient(op, logits, labels, counts, teacher, upstream=None, **options):
    logits = logits.detach().requires_grad_()
    loss = op(logits, labels, counts, teacher, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    return loss.detach(), grad


def exact(logits, labels, counts, teacher, upstream=None, **options):
    """Return value and gradient of the reference in float64, for the same rounded inputs."""
    teacher = None if teacher is None else teacher.double()
    return value_and_gradient(balanced_softmax_kl_ref, logits.double(), labels, counts, teacher, upstream, **options)


def assert_exact(inputs, upstream=None, **options):
    loss, grad = value_and_gradient(balanced_softmax_kl, *inputs, upstream, **options)
    expected_loss, expected_grad = exact(*inputs, upstream, **options)
    assert loss.dtype == torch.float32
    assert grad.dtype == inputs[0].dtype
    torch.testing.assert_close(loss.double(), expected_loss, **LOSS)
    torch.testing.assert_close(grad.double(), expected_grad, **gradient_tolerance(grad.dtype))


def samples():
    """Return results on fixed inputs. test_operator.py compares them between the builds of the kernels."""
    found = {}
    for s in SMOOTHING:
        loss, grad = value_and_gradient(balanced_softmax_kl, *case(41, 100), temperature=2.0, label_smoothing=s)
        found |= {f"balanced_softmax_kl: loss {s}": loss, f"balanced_softmax_kl: gradient {s}": grad}
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("teacher", [False, True], ids=["bsl", "bsl+kl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, dtype, teacher, smoothing, device):
    upstream = normal(shape[0], seed=9).to(device)
    options = SCALARS | {"label_smoothing": smoothing}
    assert_exact(case(*shape, dtype, device, teacher), upstream, reduction="none", **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher", [False, True], ids=["bsl", "bsl+kl"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction, teacher, device):
    upstream = torch.full((41,), -1.3, device=device) if reduction == "none" else torch.tensor(-1.3, device=device)
    assert_exact(case(41, 100, device=device, teacher=teacher), upstream, reduction=reduction)


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_the_reference_equals_cross_entropy_plus_kl_div(smoothing):
    logits, labels, counts, teacher = (t.double() if t.is_floating_point() else t for t in case(16, 10))
    counts[5] = 3.0
    options = SCALARS | {"label_smoothing": smoothing}
    bsl = F.cross_entropy(logits + 0.7 * counts.log(), labels, reduction="none", label_smoothing=smoothing)
    log_q, p = (logits / 2.5).log_softmax(-1), (teacher / 2.5).softmax(-1)
    expected = bsl + 1.7 * F.kl_div(log_q, p, reduction="none").sum(-1)
    actual = balanced_softmax_kl_ref(logits, labels, counts, teacher, reduction="none", **options)
    torch.testing.assert_close(actual, expected)
    mean = balanced_softmax_kl(logits, labels, counts, teacher, **options)
    torch.testing.assert_close(mean, bsl.mean() + 1.7 * F.kl_div(log_q, p, reduction="batchmean"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [balanced_softmax_kl, balanced_softmax_kl_ref])
@pytest.mark.parametrize("classes", [10, 41, 300])
def test_an_excluded_class_has_no_part_of_a_smoothed_label(classes, op, device):
    """The loss is that of a problem without the class: torch's cross-entropy over the other columns."""
    logits, _, _, _ = case(16, classes, torch.float64 if device == "cpu" else torch.float32, device)
    excluded = torch.zeros(classes, dtype=torch.bool, device=device)
    excluded[[0, 3, classes - 1]] = True
    counts = torch.arange(1.0, classes + 1, device=device).masked_fill(excluded, 0)
    rest = torch.arange(classes, device=device)[~excluded]
    position = torch.randint(len(rest), (16,), generator=generator(1)).to(device)
    loss, grad = value_and_gradient(op, logits, rest[position], counts, None, reduction="sum", label_smoothing=0.3)

    others = logits.double()[:, rest].requires_grad_()
    prior = counts.double()[rest].log()
    expected = F.cross_entropy(others + prior, position, label_smoothing=0.3, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected, others)
    assert not grad[:, excluded].any()
    torch.testing.assert_close(grad[:, rest].double(), expected_grad, **gradient_tolerance(torch.float32))
    torch.testing.assert_close(loss.double(), expected.detach(), **LOSS)
    # with tau = 0 a count of 0 excludes nothing
    plain = op(logits, rest[position], counts, tau=0.0, label_smoothing=0.3).double()
    torch.testing.assert_close(plain, F.cross_entropy(logits.double(), rest[position], label_smoothing=0.3), **LOSS)


def test_by_hand():
    logits, labels = torch.zeros(1, 3), torch.tensor([2])
    torch.testing.assert_close(balanced_softmax_kl(logits, labels, [6, 3, 1]), torch.tensor(10.0).log())
    torch.testing.assert_close(balanced_softmax_kl(logits, labels, [6, 3, 1], tau=0.0), torch.tensor(3.0).log())
    torch.testing.assert_close(balanced_softmax_kl(logits, labels, [6, 0, 2]), torch.tensor(4.0).log())
    # smoothed labels (0.1, 0.1, 0.8) and, without the second class, (0.15, 0, 0.85)
    loss = -(0.1 * math.log(0.6) + 0.1 * math.log(0.3) + 0.8 * math.log(0.1))
    torch.testing.assert_close(balanced_softmax_kl(logits, labels, [6, 3, 1], label_smoothing=0.3), torch.tensor(loss))
    loss = -(0.15 * math.log(0.75) + 0.85 * math.log(0.25))
    torch.testing.assert_close(balanced_softmax_kl(logits, labels, [6, 0, 2], label_smoothing=0.3), torch.tensor(loss))
    confident = torch.tensor([[0.0, 100.0, 0.0]])  # KL(one class || uniform over 3) = log 3
    torch.testing.assert_close(
        balanced_softmax_kl(logits, labels, [1, 1, 1], confident, kl_weight=2.0), 3 * torch.tensor(3.0).log()
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("teacher", [False, True], ids=["bsl", "bsl+kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype, teacher, smoothing, device):
    logits, labels, counts, teacher_logits = case(64, 41, dtype, device, teacher)
    logits = logits.sign() * torch.where(logits.abs() > 3, 1e4, logits.abs())
    logits[:8] = 1e4 + logits[:8]  # large, with small differences
    if teacher:
        teacher_logits = teacher_logits.sign() * torch.where(teacher_logits.abs() > 4, 1e4, teacher_logits.abs())
    inputs = (logits, labels, counts, teacher_logits)
    options = {"reduction": "none", "label_smoothing": smoothing}
    loss, grad = value_and_gradient(balanced_softmax_kl, *inputs, **options)
    expected_loss, expected_grad = exact(*inputs, **options)
    # 1e-3 is the spacing of float32 at 1e4, and logit plus prior is about 1e4
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3 + 2**-8, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_masked_classes(device):
    logits, labels, counts, teacher = case(64, 41, device=device)
    masked = torch.rand(64, 41, generator=generator(3)).to(device) < 0.3
    masked[torch.arange(64), labels] = False
    masked[:, 40] = False
    inf = float("inf")
    masked_logits = logits.masked_fill(masked, -inf)
    for z, t in [(logits, teacher.masked_fill(masked, -inf)), (masked_logits, masked_logits)]:
        assert_exact((z, labels, counts, t), reduction="none")
        assert balanced_softmax_kl(z, labels, counts, t).isfinite()
    # the teacher gives probability to classes that the student excludes
    loss, grad = value_and_gradient(
        balanced_softmax_kl, logits.masked_fill(masked, -inf), labels, counts, teacher, reduction="none"
    )
    assert (loss == inf).all()
    assert grad.isfinite().all()
    assert_exact((logits.masked_fill(masked, -inf), labels, counts, teacher), reduction="none")
    # the count of a label's class is 0
    counts = counts.index_fill(0, labels[:1], 0.0)
    for smoothing in SMOOTHING:
        options = {"reduction": "none", "label_smoothing": smoothing}
        loss, grad = value_and_gradient(balanced_softmax_kl, logits, labels, counts, None, **options)
        assert loss[0] == inf
        assert grad.isfinite().all()
        assert_exact((logits, labels, counts, None), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher", [False, True], ids=["bsl", "bsl+kl"])
@pytest.mark.parametrize("classes", [7, 41, 300])
def test_a_masked_class_makes_a_smoothed_loss_infinite_unless_it_is_excluded(classes, teacher, device):
    """As torch's cross-entropy: a smoothed label gives a part to every class, and here one of them is impossible."""
    logits, labels, counts, teacher_logits = case(4, classes, device=device, teacher=teacher)
    labels[:] = 0
    excluded, masked = classes // 2, classes - 1
    for row, column in ((1, excluded), (2, masked)):
        logits[row, column] = -float("inf")
        if teacher:
            teacher_logits[row, column] = -float("inf")
    inputs = (logits, labels, counts, teacher_logits)
    options = {"reduction": "none", "label_smoothing": 0.3}
    loss, grad = value_and_gradient(balanced_softmax_kl, *inputs, **options)
    assert loss.isinf().tolist() == [False, False, True, False]
    assert grad.isfinite().all()
    assert_exact(inputs, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["logits", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_plus_infinity_in_a_row_makes_only_that_row_nan(value, where, device):
    logits, labels, counts, teacher = case(4, 20, device=device)
    (logits if where == "logits" else teacher)[1, 3] = value
    inputs = (logits, labels, counts, teacher)
    lost = torch.full((1, 5), -float("inf"), device=device)
    for s in SMOOTHING:
        loss, grad = value_and_gradient(balanced_softmax_kl, *inputs, reduction="none", label_smoothing=s)
        assert loss.isnan().tolist() == [False, True, False, False]
        assert grad.isnan().any(1).tolist() == [False, True, False, False]
        assert balanced_softmax_kl(lost, labels[:1] * 0, [1] * 5, label_smoothing=s).isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_torch(dtype, device):
    inputs = case(128, 100, dtype, device)
    logits, labels, counts, teacher = inputs
    counts = counts.clamp(min=1)

    def plain(logits, labels, counts, teacher, reduction):
        bsl = F.cross_entropy(logits + counts.to(logits.dtype).log(), labels, reduction=reduction)
        kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction=reduction, log_target=True)
        return bsl + kl.sum(-1)

    inputs = (logits, labels, counts, teacher)
    exact_loss, exact_grad = exact(*inputs, reduction="none")
    ours = value_and_gradient(balanced_softmax_kl, *inputs, reduction="none")
    theirs = value_and_gradient(plain, *inputs, reduction="none")
    for mine, their, right in zip(ours, theirs, (exact_loss, exact_grad), strict=True):
        assert (mine - right).abs().max() <= 2 * (their - right).abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_integer_types(device):
    logits, labels, counts, teacher = case(41, 100, device=device)
    upstream = torch.rand(82, device=device)[::2]
    expected = value_and_gradient(balanced_softmax_kl, logits, labels, counts, teacher, upstream, reduction="none")
    wide, spread_out = torch.cat([logits, logits], 1), torch.repeat_interleave(logits, 2, 1)
    for z in (wide[:, :100], spread_out[:, ::2], logits.T.contiguous().T):
        for t in (teacher, teacher.T.contiguous().T):
            actual = value_and_gradient(balanced_softmax_kl, z, labels, counts, t, upstream, reduction="none")
            for a, b in zip(actual, expected, strict=True):
                assert_same(a, b)
    spread = torch.stack([labels, labels], 1)[:, 0]
    for y, n in [(spread, counts), (labels.int(), counts.long()), (labels.byte(), counts.double())]:
        assert_same(balanced_softmax_kl(logits, y, n, teacher, reduction="none"), expected[0])
    as_lists = balanced_softmax_kl(logits, labels, counts.tolist(), teacher, reduction="none")
    assert_same(as_lists, expected[0])
    assert_same(balanced_softmax_kl(logits, labels, counts.cpu().numpy(), teacher, reduction="none"), expected[0])


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes_are_promoted(device):
    logits, labels, counts, teacher = case(41, 100, torch.bfloat16, device)
    teacher = normal(41, 100, device=device, seed=4)
    assert_exact((logits, labels, counts, teacher))


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_student_gets_a_gradient(device):
    logits, labels, counts, teacher = case(8, 10, device=device)
    teacher = teacher.requires_grad_()
    loss = balanced_softmax_kl(logits, labels, counts, teacher)
    assert not loss.requires_grad
    loss = balanced_softmax_kl(logits.requires_grad_(), labels, counts, teacher)
    loss.backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert not balanced_softmax_kl(logits, labels, counts, teacher).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_kl_weight_0_ignores_the_teacher(device):
    logits, labels, counts, teacher = case(8, 10, device=device)
    teacher[0, 0] = float("nan")
    without = balanced_softmax_kl(logits, labels, counts)
    assert_same(balanced_softmax_kl(logits, labels, counts, teacher, kl_weight=0), without)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    logits = torch.empty(0, 10, device=device, requires_grad=True)
    labels, counts = torch.empty(0, dtype=torch.int64, device=device), torch.ones(10, device=device)
    assert balanced_softmax_kl(logits, labels, counts).isnan()
    assert balanced_softmax_kl(logits, labels, counts, reduction="none").shape == (0,)
    total = balanced_softmax_kl(logits, labels, counts, logits.detach(), reduction="sum")
    assert total == 0
    total.backward()
    assert logits.grad.shape == (0, 10)


def test_the_number_of_threads_does_not_change_the_result():
    inputs = case(3000, 101)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_gradient(balanced_softmax_kl, *inputs)
        torch.set_num_threads(2)
        for a, b in zip(value_and_gradient(balanced_softmax_kl, *inputs), alone, strict=True):
            assert_same(a, b)
    finally:
        torch.set_num_threads(threads)


# --- registration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("teacher", [False, True], ids=["bsl", "bsl+kl"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, teacher, smoothing):
    logits, labels, counts, teacher_logits = case(3, 7, torch.float64, teacher=teacher)
    logits.requires_grad_()
    options = SCALARS | {"label_smoothing": smoothing}

    def loss(logits):
        return balanced_softmax_kl(logits, labels, counts, teacher_logits, reduction=reduction, **options)

    def dispatched(logits):
        args = (*options.values(), reduction)
        return torch.ops.ltat.balanced_softmax_kl(logits, labels, counts, teacher_logits, *args)[0]

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradcheck(dispatched, (logits,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("teacher", "smoothing"), [(False, 0.0), (True, 0.3)], ids=["bsl", "smoothed bsl+kl"])
def test_opcheck(teacher, smoothing, reduction, device):
    logits, labels, counts, teacher_logits = case(5, 17, device=device, teacher=teacher)
    args = (labels, counts, teacher_logits, *(SCALARS | {"label_smoothing": smoothing}).values(), reduction)
    op, backward = torch.ops.ltat.balanced_softmax_kl.default, torch.ops.ltat.balanced_softmax_kl_backward.default
    for z in (logits, logits.clone().requires_grad_(), logits.T.contiguous().T):
        torch.library.opcheck(op, (z, *args))
    loss, stats = op(logits, *args)
    torch.library.opcheck(backward, (torch.ones_like(loss), logits, *args[:3], stats, *args[3:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_fullgraph_equals_eager(backend, device):
    inputs = case(41, 17, torch.bfloat16, device)

    def loss(logits, labels, counts, teacher):  # one call with counts as a tensor, one with a list
        first = balanced_softmax_kl(logits, labels, counts, teacher, **SCALARS)
        return first + balanced_softmax_kl(logits, labels, [3.0] * 17, label_smoothing=0.3, reduction="none").sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for actual, expected in zip(value_and_gradient(compiled, *inputs), value_and_gradient(loss, *inputs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_function_transforms(device):
    logits, labels, counts, teacher = case(6, 10, device=device)

    def loss(logits):
        return balanced_softmax_kl(logits, labels, counts, teacher, label_smoothing=0.3)

    _, expected = value_and_gradient(balanced_softmax_kl, logits, labels, counts, teacher, label_smoothing=0.3)
    torch.testing.assert_close(torch.func.grad(loss)(logits), expected)
    torch.testing.assert_close(torch.compile(torch.func.grad(loss), fullgraph=True, backend="eager")(logits), expected)
    batch = torch.stack([logits, 2 * logits])
    torch.testing.assert_close(torch.vmap(loss)(batch), torch.stack([loss(logits), loss(2 * logits)]))
    direction = normal(6, 10, seed=8).to(device)
    slope = (expected * direction).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (logits,), (direction,))[1], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, direction)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, slope)


@pytest.mark.parametrize("device", DEVICES)
def test_differentiating_twice_is_an_error(device):
    logits, labels, counts, teacher = case(6, 10, device=device)
    logits.requires_grad_()
    losses = [
        balanced_softmax_kl(logits, labels, counts, teacher),
        torch.ops.ltat.balanced_softmax_kl(logits, labels, counts, teacher, 1.0, 1.0, 1.0, 0.0, "mean")[0],
    ]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="balanced_softmax_kl cannot be differentiated twice"):
            torch.autograd.grad(grad.square().sum(), logits)


@pytest.mark.gpu
def test_graph_replay():
    logits, labels, counts, teacher = case(128, 100, device="cuda")
    logits.requires_grad_()

    def work():
        loss = balanced_softmax_kl(logits, labels, counts, teacher)
        return loss, torch.autograd.grad(loss, logits)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = work()
    for seed in (5, 6):
        with torch.no_grad():
            logits.copy_(normal(128, 100, seed=seed))
        graph.replay()
        expected_loss, expected_grad = exact(logits, labels, counts, teacher)
        torch.testing.assert_close(loss.double(), expected_loss, **LOSS)
        torch.testing.assert_close(grad.double(), expected_grad, **gradient_tolerance(torch.float32))


@pytest.mark.gpu
def test_nothing_synchronises():
    inputs = case(128, 100, device="cuda")
    value_and_gradient(balanced_softmax_kl, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(balanced_softmax_kl, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 10, -100, 2**40])
def test_label_out_of_range(label):
    logits, labels, counts, _ = case(6, 10)
    labels[3] = label
    with pytest.raises(ValueError, match=rf"label {label} .*is outside \[0, 10\)"):
        balanced_softmax_kl(logits, labels, counts)


@pytest.mark.gpu
def test_label_out_of_range_is_nan_on_cuda():
    logits, labels, counts, teacher = case(6, 10, device="cuda")
    labels[3] = 10
    loss, grad = value_and_gradient(balanced_softmax_kl, logits, labels, counts, teacher, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    assert grad.isnan().all(1).nonzero().flatten().tolist() == [3]


def test_errors():
    logits, labels, counts, teacher = case(6, 10)

    def refuses(error, message, *args, **options):
        with pytest.raises(error, match=message):
            balanced_softmax_kl(*args, **options)

    refuses(ValueError, r"logits must have shape \(B, C\), got \(10,\)", logits[0], labels, counts)
    refuses(TypeError, "logits must be float32", logits.long(), labels, counts)
    refuses(ValueError, r"labels must have shape \(6,\), got \(5,\)", logits, labels[:5], counts)
    refuses(TypeError, "labels must be integers, got torch.float32", logits, labels.float(), counts)
    refuses(TypeError, "labels must be integers, got torch.bool", logits, labels.bool(), counts)
    refuses(ValueError, "labels are on meta", logits, labels.to("meta"), counts)
    refuses(ValueError, r"class_counts must have shape \(10,\), got \(9,\)", logits, labels, counts[:9])
    refuses(ValueError, r"class_counts must have shape \(10,\), got \(9,\)", logits, labels, [1] * 9)
    refuses(ValueError, "class_counts are on meta", logits, labels, counts.to("meta"))
    refuses(ValueError, "class_counts must not be negative", logits, labels, [-1] + [1] * 9)
    refuses(ValueError, "class_counts must not be negative", logits, labels, counts - 1e3)
    refuses(ValueError, r"teacher_logits has shape \(5, 10\)", logits, labels, counts, teacher[:5])
    refuses(ValueError, "teacher_logits is on meta", logits, labels, counts, teacher.to("meta"))
    refuses(TypeError, "teacher_logits must be float32", logits, labels, counts, teacher.int())
    refuses(ValueError, "reduction must be", logits, labels, counts, reduction="batchmean")
    for option in ({"tau": -1.0}, {"temperature": 0.0}, {"temperature": -1.0}, {"tau": float("nan")}):
        refuses(ValueError, "need tau >= 0, temperature > 0", logits, labels, counts, teacher, **option)
    for s in (-0.1, 1.0, float("nan")):
        refuses(ValueError, r"label_smoothing must be in \[0, 1\), got", logits, labels, counts, label_smoothing=s)
