"""Fuzz the public operators: valid calls must agree with NumPy in float64, invalid calls must raise a clear error.

The references are written here, from the formulas, and share no code with the operators.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.op_cases import everywhere, limit_shape
from ltat_fast.ops import balanced_softmax_kl, igdm_loss, pgd_init, pgd_step

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = float("inf")
# Relative error of one rounding to the dtype. The losses are float32 for every half-precision dtype.
ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def examples(number: int) -> settings:
    """Return settings for this number of examples, which are the same in every run."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def laid_out(draw, values: torch.Tensor) -> torch.Tensor:
    """Return the values unchanged or with other strides: permuted, every second of a larger tensor, with an offset."""
    layout = draw(st.sampled_from(["contiguous", "permuted", "sliced", "offset"]))
    between = math.nan if values.is_floating_point() else 99  # a kernel that read it would give a wrong result
    if layout == "permuted" and values.dim() > 1:
        order = draw(st.permutations(range(values.dim())))
        inverse = [order.index(i) for i in range(values.dim())]
        return values.permute(order).contiguous().permute(inverse)
    if layout == "sliced" and values.dim():
        return torch.stack([values, torch.full_like(values, between)], -1).flatten(-2)[..., ::2]
    if layout == "offset":
        padded = torch.cat([torch.full((3,), between, dtype=values.dtype), values.flatten()])
        return padded[3:].view(values.shape)
    return values


def drawn(seed: int, shape: tuple, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Return normal numbers, some of them replaced by +-scale and by zeros, so that values repeat."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(12, shape, generator=generator)
    values = torch.where(kind == 0, scale * torch.ones(()), values)
    values = torch.where(kind == 1, -scale * torch.ones(()), values)
    return torch.where(kind == 2, torch.zeros(()), values).clamp(-6e4, 6e4).to(dtype)


scales = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])
seeds = st.integers(0, 2**31)
reductions = st.sampled_from(["mean", "sum", "none"])
shapes = st.tuples(st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from([1, 2, 3, 10, 17, 100, 1000]))


def log_softmax(z: np.ndarray) -> np.ndarray:
    top = z.max(-1, keepdims=True, initial=-INF)
    with np.errstate(all="ignore"):
        shifted = z - top
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(t: np.ndarray, z: np.ndarray) -> np.ndarray:
    log_p, log_q = log_softmax(t), log_softmax(z)
    p = np.exp(log_p)
    with np.errstate(all="ignore"):
        return np.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def reduced(loss: np.ndarray, reduction: str) -> np.ndarray:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / len(loss) if len(loss) else np.array(math.nan)


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float, relative: float = 3e-5) -> None:
    """Check that the values are equal up to the tolerance, and infinite or NaN in the same places."""
    expected = torch.as_tensor(np.array(expected, dtype=np.float64))
    torch.testing.assert_close(actual.detach().double(), expected, rtol=relative, atol=tolerance, equal_nan=True)


@st.composite
def loss_case(draw):
    rows, classes = draw(shapes)
    seed, dtype = draw(seeds), draw(st.sampled_from(FLOATS))
    logits = drawn(seed, (rows, classes), draw(scales), dtype)
    teacher = drawn(seed + 1, (rows, classes), draw(scales), draw(st.sampled_from(FLOATS)))
    generator = np.random.RandomState(seed)
    labels = torch.from_numpy(generator.randint(0, classes, rows))
    counts = torch.from_numpy(generator.randint(1, 5000, classes))
    if draw(st.booleans()) and classes > 1:  # a class without images
        counts[generator.randint(classes)] = 0
    masked = draw(st.sampled_from(["none", "both", "teacher"])) if classes > 1 else "none"
    if masked != "none":
        column = generator.randint(classes)
        teacher[:, column] = -INF
        if masked == "both":
            logits[:, column] = -INF
    options = {
        "tau": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        "kl_weight": draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        "temperature": draw(st.sampled_from([0.5, 1.0, 4.0])),
        "reduction": draw(reductions),
    }
    counts = counts.tolist() if draw(st.booleans()) else counts
    labels = labels.to(draw(st.sampled_from([torch.int64, torch.int32, torch.uint8 if classes < 256 else torch.int16])))
    return draw(laid_out(logits)), draw(laid_out(labels)), counts, draw(laid_out(teacher)), options


@examples(150)
@given(loss_case())
def test_balanced_softmax_kl(case):
    logits, labels, counts, teacher, options = case
    logits = logits.detach().requires_grad_()
    loss = balanced_softmax_kl(logits, labels, counts, teacher, **options)
    assert loss.dtype == torch.promote_types(torch.promote_types(logits.dtype, teacher.dtype), torch.float32) or (
        options["kl_weight"] == 0 and loss.dtype == torch.promote_types(logits.dtype, torch.float32)
    )
    loss.sum().backward()

    z, t = logits.detach().double().numpy(), teacher.double().numpy()
    y, n = labels.long().numpy(), np.asarray(counts, np.float64)
    rows, classes = z.shape
    tau, weight, temperature = options["tau"], options["kl_weight"], options["temperature"]
    with np.errstate(all="ignore"):
        prior = tau * np.log(n) if tau else np.zeros(classes)
        expected = -log_softmax(z + prior)[np.arange(rows), y]
        if weight:
            expected = expected + weight * kl(t / temperature, z / temperature)
        expected = reduced(expected, options["reduction"])
        grad = np.exp(log_softmax(z + prior)) - np.eye(classes)[y]
        if weight:
            grad += weight / temperature * (np.exp(log_softmax(z / temperature)) - np.exp(log_softmax(t / temperature)))
        if options["reduction"] == "mean" and rows:
            grad /= rows
    # a scaled and shifted logit is rounded to float32; all other errors are relative
    size = max(1.0, *(float(np.abs(v[np.isfinite(v)]).max(initial=0)) / min(temperature, 1) for v in (z, t)))
    error = 2.0**-22 * size * (1 + 2 * weight) if loss.dtype == torch.float32 else 1e-9 * size
    close(loss, expected, error * (rows if options["reduction"] == "sum" else 1) + 1e-6)
    if np.isfinite(expected).all():
        close(logits.grad, grad, 2 * error + 1e-6 + 2 * ROUNDING[logits.dtype] * (1 + weight / temperature))


@st.composite
def matching_case(draw):
    shape, seed, scale = draw(shapes), draw(seeds), draw(scales)
    tensors = [drawn(seed + i, shape, scale, draw(st.sampled_from(FLOATS))) for i in range(4)]
    options = {"divergence": draw(st.sampled_from(["kl", "l1", "l2"])), "reduction": draw(reductions)}
    return [draw(laid_out(tensor)) for tensor in tensors], options


@examples(150)
@given(matching_case())
def test_igdm_loss(case):
    tensors, options = case
    inputs = [tensor.detach().requires_grad_(i < 2) for i, tensor in enumerate(tensors)]
    loss = igdm_loss(*inputs, **options)
    loss.sum().backward()

    plus, minus, teacher_plus, teacher_minus = (tensor.double().numpy() for tensor in tensors)
    a, b = plus - minus, teacher_plus - teacher_minus
    if options["divergence"] == "kl":
        expected, grad = kl(b, a), np.exp(log_softmax(a)) - np.exp(log_softmax(b))
    elif options["divergence"] == "l1":
        expected, grad = np.abs(a - b).sum(-1), np.sign(a - b)
    else:
        expected, grad = ((a - b) ** 2).sum(-1), 2 * (a - b)
    rows = len(a)
    if options["reduction"] == "mean" and rows:
        grad = grad / rows
    size = max(1.0, *(float(np.abs(v).max(initial=0)) for v in (plus, minus, teacher_plus, teacher_minus)))
    exact = loss.dtype == torch.float64
    error = (1e-12 if exact else 2.0**-22) * size
    spread = {"kl": 2, "l1": a.shape[1], "l2": 4 * size * a.shape[1]}[options["divergence"]]
    close(loss, reduced(expected, options["reduction"]), error * spread * max(1, rows) + 1e-6)
    if options["divergence"] == "l1":  # if only float64 can tell a from b, both signs are correct
        grad = np.where(np.abs(a - b) <= 4 * error, np.nan, grad)
    steep = {"kl": 2 * error, "l1": 0.0, "l2": 8 * error}[options["divergence"]]
    for tensor, sign in zip(inputs[:2], (1, -1), strict=True):
        known = ~np.isnan(grad) & (np.abs(grad) < 6e4)  # float16 cannot hold more
        rounding = 2 * ROUNDING[tensor.dtype]
        close(tensor.grad[torch.from_numpy(known)], sign * grad[known], steep + 1e-6, max(3e-5, rounding))


@st.composite
def limit_of(draw, x: torch.Tensor, values: list[float]):
    """Return one of the values, or a tensor with some of them that fits the images ``x``, with any strides."""
    kind = draw(st.sampled_from([None, None, "one", "image", "channel", "both"]))
    if kind is None:
        return draw(st.sampled_from(values))
    shape = limit_shape(kind, x.shape)
    picked = draw(st.lists(st.sampled_from(values), min_size=1, max_size=5))
    tensor = torch.tensor(picked, dtype=torch.promote_types(x.dtype, torch.float32))
    return draw(laid_out(tensor.repeat(1 + math.prod(shape))[: math.prod(shape)].view(shape)))


@st.composite
def step_case(draw):
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), max_size=4)))
    seed, dtype, scale = draw(seeds), draw(st.sampled_from(FLOATS)), draw(scales)
    x_adv, x = (drawn(seed + i, shape, scale, dtype) for i in range(2))
    grad = drawn(seed + 2, shape, draw(scales), draw(st.sampled_from(FLOATS)))
    special = draw(st.sampled_from([None, math.nan, INF, -INF]))
    if special is not None and grad.numel():
        grad.view(-1)[seed % grad.numel()] = special
    limits = {
        "step_size": draw(limit_of(x, [0.0, 2 / 255, 0.5, -0.1, 1e4, INF])),
        "eps": draw(limit_of(x, [0.0, 8 / 255, 1.0, 1e4, INF])),
        "lower": draw(limit_of(x, [0.0, -1.0, -INF])),
        "upper": draw(limit_of(x, [1.0, 0.0, 255.0, INF])),
    }
    return draw(laid_out(x_adv)), draw(laid_out(grad)), draw(laid_out(x)), limits, draw(st.booleans())


@examples(300)
@given(step_case())
def test_pgd_step(case):
    x_adv, grad, x, limits, in_place = case
    numbers = {name: everywhere(limit, x.shape).numpy() for name, limit in limits.items()}
    centre, start = x.double().numpy(), x_adv.double().numpy()
    with np.errstate(all="ignore"):
        sign = np.nan_to_num(np.sign(grad.double().numpy()))
        moved = start + np.where(sign == 0, 0.0, numbers["step_size"] * sign)
        ball = np.minimum(np.maximum(moved, centre - numbers["eps"]), centre + numbers["eps"])
    expected = np.clip(ball, numbers["lower"], numbers["upper"])
    out = x_adv.clone() if in_place else None
    result = pgd_step(out if in_place else x_adv, grad, x, **limits, out=out)
    assert result.dtype == x_adv.dtype
    keep = np.asarray(
        (numbers["step_size"] != INF) | (sign != 0)
    )  # inf * 0 is NaN where the gradient is 0, as in torch
    result, expected = result[torch.from_numpy(keep)], expected[keep]
    error = ROUNDING[x_adv.dtype] + 2.0**-23
    values = (centre, start, numbers["step_size"], numbers["eps"])
    size = max(1.0, *(float(np.abs(value[np.isfinite(value)]).max(initial=0)) for value in values))
    close(result, expected, 2.0**-22 * size if x_adv.dtype != torch.float64 else 1e-11, error)
    assert (result.double().numpy() >= numbers["lower"][keep]).all()
    assert (result.double().numpy() <= numbers["upper"][keep]).all()


@examples(100)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), max_size=4),
    seeds,
    st.sampled_from(FLOATS),
    scales,
    st.sampled_from(["uniform", "gaussian"]),
    st.data(),
)
def test_pgd_init(shape, seed, dtype, scale, noise, data):
    x = data.draw(laid_out(drawn(seed, tuple(shape), scale, dtype)))
    eps = data.draw(limit_of(x, [0.0, 1e-3, 8 / 255, 1.0, 1e4]))
    start = pgd_init(x, eps, noise, torch.Generator().manual_seed(seed))
    assert start.shape == x.shape
    assert start.dtype == x.dtype
    assert not start.requires_grad
    assert ((start >= 0) & (start <= 1)).all()
    away = (start.double() - x.double().clamp(0, 1)).abs()
    assert (away <= everywhere(eps, x.shape) + ROUNDING[dtype] + 2.0**-22).all()
    assert torch.equal(start, pgd_init(x, eps, noise, torch.Generator().manual_seed(seed)))


LOGITS, LABELS, COUNTS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), [1, 2, 3, 4]
NEVER = [None, "a", [1.0], (), {}, object(), 1.0, 7, True, b"x", math.nan]
WRONG_TENSORS = [
    torch.zeros(3, 4).to_sparse(),
    torch.zeros(3, 4, dtype=torch.int64),
    torch.zeros(3, 4, dtype=torch.complex64),
    torch.zeros(3, 4, dtype=torch.bool),
    torch.zeros(3, 5),
    torch.zeros(4, 4),
    torch.zeros(3, 0),
    torch.zeros(12),
    torch.zeros(()),
    torch.zeros(3, 4, 1),
    torch.zeros(3, 4, device="meta"),
]
WRONG_LIMITS = [tensor for tensor in WRONG_TENSORS if tensor.dim()]
WRONG_LIMITS += [torch.ones(4), torch.ones(3, 1, 1), torch.ones(1, 3), torch.ones(3).double()]
CALLS = {
    "balanced_softmax_kl": (
        balanced_softmax_kl,
        {"logits": LOGITS, "labels": LABELS, "class_counts": COUNTS, "teacher_logits": LOGITS},
        {
            "labels": [
                LABELS - 1,
                LABELS + 4,
                LABELS.float(),
                LABELS[:2],
                LABELS[None],
                LABELS.to_sparse(),
                2**40 + LABELS,
            ],
            "class_counts": [[1, 2, 3], [-1, 2, 3, 4], [math.nan] * 4, [INF] * 4, ["a"] * 4, torch.ones(4).to_sparse()],
            "tau": [-1.0, math.nan, INF, "a", None],
            "temperature": [0.0, -1.0, math.nan, INF, "a", None],
            "kl_weight": [math.nan, INF, "a", None],
            "reduction": ["batchmean", "", None, 1, []],
        },
        {"teacher_logits": [None]},
    ),
    "igdm_loss": (
        igdm_loss,
        dict.fromkeys(("student_plus", "student_minus", "teacher_plus", "teacher_minus"), LOGITS),
        {"divergence": ["js", "", None, 1, []], "reduction": ["batchmean", None]},
        {},
    ),
    "pgd_step": (
        pgd_step,
        {"x_adv": LOGITS, "grad": LOGITS, "x": LOGITS, "step_size": 0.1, "eps": 0.1},
        {
            "step_size": [math.nan, "a", None, [], *WRONG_LIMITS],
            "eps": [-0.1, math.nan, "a", None, *WRONG_LIMITS],
            "lower": [2.0, math.nan, "a", None, *WRONG_LIMITS],
            "upper": [-1.0, math.nan, "a", None, *WRONG_LIMITS],
            "out": [
                LOGITS.double(),
                LOGITS[:2].clone(),
                [1.0],
                torch.zeros(1, 4).expand(3, 4),
                torch.zeros(3, 4).to_sparse(),
            ],
        },
        {},
    ),
    "pgd_init": (
        pgd_init,
        {"x": LOGITS, "eps": 0.1},
        {
            "eps": [-0.1, math.nan, INF, "a", None, *WRONG_LIMITS],
            "noise": ["normal", None, 1],
            "generator": [5, "a"],
            "lower": [2.0, math.nan, "a", *WRONG_LIMITS],
        },
        {"x": [tensor for tensor in WRONG_TENSORS if tensor.dtype == torch.float32 and tensor.layout is torch.strided]},
    ),
}


def wrong_calls():
    """Yield valid calls in which one argument is replaced by an invalid one."""
    for name, (op, right, numbers, allowed) in CALLS.items():
        for argument, value in right.items():
            if isinstance(value, torch.Tensor) and argument != "labels":
                for wrong in (*NEVER, *WRONG_TENSORS):
                    if not any(wrong is each for each in allowed.get(argument, ())):
                        yield name, op, right, argument, wrong
        for argument, values in numbers.items():
            for wrong in values:
                yield name, op, right, argument, wrong


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_wrong_calls_raise_a_clear_error():
    tried = 0
    for name, op, right, argument, wrong in wrong_calls():
        what = f"{name}({argument}={type(wrong).__name__} {str(wrong)[:60]})"
        try:
            result = op(**{**right, argument: wrong})
        except (ValueError, TypeError, RuntimeError) as error:
            said = str(error)
        else:
            pytest.fail(f"{what} raised no error and returned {result}")
        assert 0 < len(said) < 1000, what
        assert "INTERNAL ASSERT" not in said, what
        tried += 1
    assert tried > 250


@pytest.mark.parametrize("rows", [0, 3])
def test_logits_without_a_class_are_refused(rows):
    nothing = torch.zeros(rows, 0)
    with pytest.raises(ValueError, match="logits must have at least one class"):
        balanced_softmax_kl(nothing, LABELS[:rows], [])
    for divergence in ("kl", "l1", "l2"):
        with pytest.raises(ValueError, match="student_plus must have at least one class"):
            igdm_loss(*[nothing] * 4, divergence=divergence)


def test_tensors_whose_memory_holds_the_negated_values():
    """The imaginary part of a conjugate is stored with the opposite sign: no kernel may read its memory directly."""
    hidden = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    assert hidden.is_neg()
    plain = hidden.resolve_neg()
    one = torch.ones(3, 4)
    assert torch.equal(pgd_step(one, hidden, one, 0.1, 1.0), pgd_step(one, plain, one, 0.1, 1.0))
    assert torch.equal(pgd_step(*[hidden] * 3, 0.1, 0.05, -9, 9), pgd_step(*[plain] * 3, 0.1, 0.05, -9, 9))
    assert torch.equal(igdm_loss(hidden, one, one, one), igdm_loss(plain, one, one, one))
    assert torch.equal(balanced_softmax_kl(hidden, LABELS, COUNTS), balanced_softmax_kl(plain, LABELS, COUNTS))
    pgd_step(one, -one, one, 0.1, 1.0, out=hidden)
    assert torch.equal(hidden, one - 0.1)


def test_a_label_out_of_range_is_nan_under_torch_func():
    """Values cannot be checked under torch.func. So the row becomes NaN, and only that row, as in the CUDA kernels."""
    labels = torch.tensor([0, 9, -5])
    loss = torch.func.vmap(lambda z: balanced_softmax_kl(z[None], labels[:1], COUNTS))(LOGITS)
    assert loss.isfinite().all()

    def summed(z):
        each = balanced_softmax_kl(z, labels, COUNTS, reduction="none")
        return each.sum(), each

    grad, each = torch.func.grad(summed, has_aux=True)(LOGITS)
    assert each.isnan().tolist() == [False, True, True]
    assert grad.isnan().any(1).tolist() == [False, True, True]
