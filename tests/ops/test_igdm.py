"""igdm_loss: values and gradients against float64, extremes, registration, errors."""

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
from ltat_fast.ops import igdm_loss, igdm_loss_ref

DIVERGENCES = ["kl", "l1", "l2"]


def case(rows, classes, dtype=torch.float32, device="cpu"):
    return tuple(normal(rows, classes, dtype=dtype, device=device, seed=seed, scale=2) for seed in range(4))


def value_and_gradients(op, plus, minus, teacher_plus, teacher_minus, upstream=None, **options):
    plus, minus = plus.detach().requires_grad_(), minus.detach().requires_grad_()
    loss = op(plus, minus, teacher_plus, teacher_minus, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (plus, minus), upstream)


def assert_exact(inputs, upstream=None, **options):
    loss, *grads = value_and_gradients(igdm_loss, *inputs, upstream, **options)
    doubled = [t.double() for t in inputs]
    expected_loss, *expected_grads = value_and_gradients(igdm_loss_ref, *doubled, upstream, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, equal_nan=True, **LOSS)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.dtype == inputs[0].dtype
        torch.testing.assert_close(grad.double(), expected, equal_nan=True, **gradient_tolerance(grad.dtype))


def samples():
    """Return results on fixed inputs. test_operator.py compares them between the builds of the kernels."""
    found = {}
    for divergence in DIVERGENCES:
        results = value_and_gradients(igdm_loss, *case(41, 100), divergence=divergence)
        found |= {f"igdm_loss: {divergence}, {i}": result for i, result in enumerate(results)}
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, dtype, divergence, device):
    upstream = normal(shape[0], seed=9).to(device)
    assert_exact(case(*shape, dtype, device), upstream, divergence=divergence, reduction="none")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction, divergence, device):
    upstream = torch.full((41,), -1.3, device=device) if reduction == "none" else torch.tensor(-1.3, device=device)
    assert_exact(case(41, 100, device=device), upstream, divergence=divergence, reduction=reduction)


def test_the_reference_equals_kl_div_of_the_differences():
    plus, minus, teacher_plus, teacher_minus = (t.double() for t in case(16, 10))
    log_q, p = (plus - minus).log_softmax(-1), (teacher_plus - teacher_minus).softmax(-1)
    expected = F.kl_div(log_q, p, reduction="batchmean")
    torch.testing.assert_close(igdm_loss_ref(plus, minus, teacher_plus, teacher_minus), expected)
    gap = (plus - minus) - (teacher_plus - teacher_minus)
    for divergence, expected in (("l1", gap.abs().sum(1).mean()), ("l2", gap.square().sum(1).mean())):
        actual = igdm_loss(plus, minus, teacher_plus, teacher_minus, divergence=divergence)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_ignores_constants_and_depends_only_on_differences(device):
    plus, minus, teacher_plus, teacher_minus = case(16, 10, device=device)
    shift = normal(16, 1, seed=7, scale=5).to(device)
    loss, grad_plus, grad_minus = value_and_gradients(igdm_loss, plus, minus, teacher_plus, teacher_minus)
    # a constant added to a row of logits
    for moved in (
        (plus + shift, minus, teacher_plus, teacher_minus),
        (plus, minus, teacher_plus, teacher_minus - shift),
    ):
        torch.testing.assert_close(igdm_loss(*moved), loss)
    assert_same(grad_plus, -grad_minus)
    torch.testing.assert_close(grad_plus.sum(1), torch.zeros(16, device=device), atol=1e-6, rtol=0)
    # the same difference of other logits
    torch.testing.assert_close(igdm_loss(plus, minus, plus + shift, minus), torch.zeros((), device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits(divergence, device):
    inputs = [t.sign() * torch.where(t.abs() > 3, 1e4, t.abs()) for t in case(64, 41, device=device)]
    halves = [t.half() for t in inputs]
    halves[0][0, 0], halves[1][0, 0] = 6e4, -6e4  # their difference overflows float16
    for logits in [inputs] if divergence == "l2" else [inputs, halves]:  # float16 cannot hold the gradient of l2
        ours = value_and_gradients(igdm_loss, *logits, divergence=divergence, reduction="none")
        doubled = [t.double() for t in logits]
        exact = value_and_gradients(igdm_loss_ref, *doubled, divergence=divergence, reduction="none")
        for actual, expected in zip(ours, exact, strict=True):
            # the error of a difference of logits of 1e4 is 2e-3, which is also the relative error of its exponential
            torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_masked_classes(device):
    plus, minus, teacher_plus, teacher_minus = case(64, 41, device=device)
    masked = torch.rand(64, 41, generator=generator(3)).to(device) < 0.3
    masked[:, 40] = False
    inf = float("inf")
    agreed = (plus.masked_fill(masked, -inf), minus, teacher_plus.masked_fill(masked, -inf), teacher_minus)
    assert igdm_loss(*agreed).isfinite()
    assert_exact(agreed, reduction="none")
    denied = (plus.masked_fill(masked, -inf), minus, teacher_plus, teacher_minus)
    assert igdm_loss(*denied) == inf
    assert_exact(denied, reduction="none")
    undefined = (plus.masked_fill(masked, -inf), minus.masked_fill(masked, -inf), teacher_plus, teacher_minus)
    assert igdm_loss(*undefined, reduction="none").isnan().tolist() == masked.any(1).tolist()  # inf - inf


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("which", range(4))
def test_nan_in_a_row_makes_only_its_loss_nan(which, divergence, device):
    inputs = case(4, 20, device=device)
    inputs[which][1, 3] = float("nan")
    loss, *_ = value_and_gradients(igdm_loss, *inputs, divergence=divergence, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_torch(dtype, device):
    inputs = case(128, 100, dtype, device)

    def plain(plus, minus, teacher_plus, teacher_minus):
        log_p = (teacher_plus - teacher_minus).log_softmax(-1)
        return F.kl_div((plus - minus).log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)

    ours = value_and_gradients(igdm_loss, *inputs, reduction="none")
    theirs = value_and_gradients(plain, *inputs)
    exact = value_and_gradients(igdm_loss_ref, *(t.double() for t in inputs), reduction="none")
    for mine, their, right in zip(ours, theirs, exact, strict=True):
        assert (mine - right).abs().max() <= 2 * (their - right).abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_mixed_dtypes(device):
    inputs = case(41, 100, device=device)
    upstream = torch.rand(82, device=device)[::2]
    expected = value_and_gradients(igdm_loss, *inputs, upstream, reduction="none")
    wide = torch.cat(inputs, 1)
    strided = (wide[:, :100], inputs[1].T.contiguous().T, wide[:, 200:300], wide[:, 300:])
    for a, b in zip(value_and_gradients(igdm_loss, *strided, upstream, reduction="none"), expected, strict=True):
        assert_same(a, b)
    plus, minus, teacher_plus, teacher_minus = inputs
    assert_exact(
        (plus.bfloat16(), minus.bfloat16(), teacher_plus, teacher_minus.bfloat16()), upstream, reduction="none"
    )


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_student_gets_gradients(device):
    inputs = [t.requires_grad_() for t in case(8, 10, device=device)]
    igdm_loss(*inputs).backward()
    assert [t.grad is not None for t in inputs] == [True, True, False, False]
    plus, minus, teacher_plus, teacher_minus = case(8, 10, device=device)
    assert not igdm_loss(plus, minus, teacher_plus.requires_grad_(), teacher_minus).requires_grad
    one_sided = igdm_loss(plus.requires_grad_(), minus, teacher_plus, teacher_minus)
    torch.testing.assert_close(torch.autograd.grad(one_sided, plus)[0], inputs[0].grad)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    inputs = [torch.empty(0, 10, device=device, requires_grad=True) for _ in range(4)]
    assert igdm_loss(*inputs).isnan()
    assert igdm_loss(*inputs, reduction="none").shape == (0,)
    total = igdm_loss(*inputs, reduction="sum")
    assert total == 0
    total.backward()
    assert inputs[0].grad.shape == (0, 10)


def test_the_number_of_threads_does_not_change_the_result():
    inputs = case(3000, 101)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_gradients(igdm_loss, *inputs)
        torch.set_num_threads(2)
        for a, b in zip(value_and_gradients(igdm_loss, *inputs), alone, strict=True):
            assert_same(a, b)
    finally:
        torch.set_num_threads(threads)


# --- registration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, divergence):
    plus, minus, *teacher = case(3, 7, torch.float64)
    student = (plus.requires_grad_(), minus.requires_grad_())
    options = {"divergence": divergence, "reduction": reduction}
    assert torch.autograd.gradcheck(lambda plus, minus: igdm_loss(plus, minus, *teacher, **options), student)
    dispatched = torch.ops.ltat.igdm
    assert torch.autograd.gradcheck(
        lambda plus, minus: dispatched(plus, minus, *teacher, divergence, reduction), student
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck(divergence, reduction, device):
    plus, *others = case(5, 17, device=device)
    op, backward = torch.ops.ltat.igdm.default, torch.ops.ltat.igdm_backward.default
    for z in (plus, plus.clone().requires_grad_(), plus.T.contiguous().T):
        torch.library.opcheck(op, (z, *others, divergence, reduction))
    upstream = torch.ones_like(op(plus, *others, divergence, reduction))
    torch.library.opcheck(backward, (upstream, plus, *others, divergence, reduction))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_fullgraph_equals_eager(backend, device):
    inputs = case(41, 17, torch.bfloat16, device)

    def loss(*logits):
        return igdm_loss(*logits) + igdm_loss(*logits, divergence="l2", reduction="none").sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for actual, expected in zip(
        value_and_gradients(compiled, *inputs), value_and_gradients(loss, *inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_function_transforms(device):
    inputs = case(6, 10, device=device)
    _, *expected = value_and_gradients(igdm_loss, *inputs)
    torch.testing.assert_close(torch.func.grad(igdm_loss, argnums=(0, 1))(*inputs), tuple(expected))
    batch = [torch.stack([t, 2 * t]) for t in inputs]
    one_by_one = torch.stack([igdm_loss(*inputs), igdm_loss(*(2 * t for t in inputs))])
    torch.testing.assert_close(torch.vmap(igdm_loss)(*batch), one_by_one)


@pytest.mark.parametrize("device", DEVICES)
def test_differentiating_twice_is_an_error(device):
    inputs = case(6, 10, device=device)
    inputs[0].requires_grad_()
    for loss in (igdm_loss(*inputs), torch.ops.ltat.igdm(*inputs, "kl", "mean")):
        (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="igdm_loss cannot be differentiated twice"):
            torch.autograd.grad(grad.square().sum(), inputs[0])


@pytest.mark.gpu
def test_graph_replay_without_synchronising():
    inputs = case(128, 100, device="cuda")
    student = [t.requires_grad_() for t in inputs[:2]]

    def work():
        loss = igdm_loss(*inputs)
        return loss, *torch.autograd.grad(loss, student)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    for seed in (5, 6):
        with torch.no_grad():
            student[0].copy_(normal(128, 100, seed=seed))
        graph.replay()
        expected = value_and_gradients(igdm_loss_ref, *(t.detach().double() for t in inputs))
        for actual, right in zip(results, expected, strict=True):
            torch.testing.assert_close(actual.double(), right, rtol=2e-5, atol=2e-6)


def test_errors():
    plus, minus, teacher_plus, teacher_minus = case(6, 10)

    def refuses(error, message, *args, **options):
        with pytest.raises(error, match=message):
            igdm_loss(*args, **options)

    refuses(ValueError, r"student_plus must have shape \(B, C\)", plus[0], minus[0], plus[0], plus[0])
    refuses(TypeError, "student_plus must be float32", plus.int(), minus, teacher_plus, teacher_minus)
    refuses(ValueError, r"student_minus has shape \(5, 10\)", plus, minus[:5], teacher_plus, teacher_minus)
    refuses(ValueError, r"teacher_plus has shape \(6, 9\)", plus, minus, teacher_plus[:, :9], teacher_minus)
    refuses(ValueError, "teacher_minus is on meta", plus, minus, teacher_plus, teacher_minus.to("meta"))
    refuses(TypeError, "teacher_minus must be float32", plus, minus, teacher_plus, teacher_minus.int())
    refuses(ValueError, "divergence must be", plus, minus, teacher_plus, teacher_minus, divergence="js")
    refuses(ValueError, "reduction must be", plus, minus, teacher_plus, teacher_minus, reduction="batchmean")
