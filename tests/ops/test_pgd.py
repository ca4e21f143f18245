"""pgd_init and pgd_step: values, invariants, layouts, noise, registration, errors."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.op_cases import DEVICES, DTYPES, LIMITS, assert_same, everywhere, generator, normal, pgd_limits
from ltat_fast.ops import pgd_init, pgd_init_ref, pgd_step, pgd_step_ref
from ltat_fast.ops.pgd import GAUSSIAN_STD

EPS, STEP = 8 / 255, 2 / 255
SHAPES = [(1,), (7,), (41,), (1271,), (2, 3, 5, 7), (4, 3, 32, 32), (70_001,), ()]


def image_batch(shape, dtype=torch.float32, device="cpu"):
    """Return x_adv, grad (with zeros of both signs, NaN and infinity) and x (with some pixels at 0 and at 1)."""
    x = torch.rand(shape, generator=generator(1)).mul(1.2).sub(0.1).clamp(0, 1).to(device, dtype)
    x_adv = (x + 1.3 * EPS * normal(*shape, dtype=dtype, device=device, seed=2)).clamp(0, 1)
    grad = normal(*shape, device=device, seed=3)
    for value, every in ((0.0, 3), (-0.0, 5), (float("nan"), 11), (float("inf"), 13), (1e-42, 7)):
        grad.view(-1)[every - 1 :: every] = value
    return x_adv, grad.to(dtype), x


def samples():
    """Return results on fixed inputs. test_operator.py compares them between the builds of the kernels."""
    torch.manual_seed(0)
    x, grad = torch.rand(2, 3, 9, 7), torch.randn(2, 3, 9, 7)
    found = {"pgd_step": pgd_step(x, grad, x, 0.02, 0.03, out=torch.empty_like(x))}
    for noise in ("uniform", "gaussian"):
        start = pgd_init(x, 0.1, noise, generator(1))
        assert ((start - x).abs() <= 0.1 + 1e-7).all()
        found[f"pgd_init: random, {noise}"] = start
    for name in LIMITS:
        for layout in (torch.contiguous_format, torch.channels_last):
            x_adv, x = (t.contiguous(memory_format=layout) for t in (x + 0.01 * grad, x))
            step_size, eps, lower, upper = pgd_limits(name, x.shape)
            found[f"pgd_step: {name}, {layout}"] = pgd_step(x_adv, grad, x, step_size, eps, lower, upper)
            start = pgd_init(x, eps, "uniform", generator(1), lower=lower, upper=upper)
            found[f"pgd_init: random, {name}, {layout}"] = start
    return found


# --- step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_the_reference_bit_for_bit(shape, dtype, device):
    x_adv, grad, x = image_batch(shape, dtype, device)
    assert_same(pgd_step(x_adv, grad, x, STEP, EPS), pgd_step_ref(x_adv, grad, x, STEP, EPS))


# One image, a single pixel, many channels, more images or channels than the table of the CPU kernel has entries, and
# images of fewer and of more elements than its shortest run and its longest piece.
LIMIT_SHAPES = [
    (4, 3, 6, 8),
    (1, 3, 1, 1),
    (5, 3, 9, 7),
    (2, 3, 32, 32),
    (3, 1500),
    (1500, 2),
    (1500,),
    (2, 300, 2),
    (),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("shape", LIMIT_SHAPES, ids=str)
def test_step_with_tensors_equals_the_reference_and_float64(shape, name, device):
    x_adv, grad, x = image_batch(shape, device=device)
    limits = pgd_limits(name, shape, device=device)
    stepped = pgd_step(x_adv, grad, x, *limits)
    assert_same(stepped, pgd_step_ref(x_adv, grad, x, *limits))

    step_size, eps, lower, upper = (everywhere(limit, shape) for limit in limits)
    centre = x.cpu().double()
    exact = x_adv.cpu().double() + step_size * grad.cpu().sign().nan_to_num()
    exact = torch.minimum(torch.maximum(exact, centre - eps), centre + eps)
    exact = torch.minimum(torch.maximum(exact, lower), upper)
    torch.testing.assert_close(stepped.cpu().double(), exact, rtol=0, atol=2**-23)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_step_with_tensors_in_every_dtype_and_layout(dtype, name, device):
    x_adv, grad, x = image_batch((4, 3, 6, 8), dtype, device)
    limits = pgd_limits(name, x.shape, dtype, device)
    expected = pgd_step_ref(x_adv, grad, x, *limits)
    for layout in ("contiguous", "channels_last", "permuted", "sliced", "batch last"):
        to_layout = LAYOUTS[layout]
        stepped = pgd_step(to_layout(x_adv), to_layout(grad), to_layout(x), *limits)
        torch.testing.assert_close(stepped, expected, rtol=0, atol=0)
        out = to_layout(torch.zeros_like(x))
        assert pgd_step(x_adv, grad, x, *limits, out=out) is out
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_may_have_any_strides(device):
    x_adv, grad, x = image_batch((4, 3, 6, 8), device=device)
    step_size, eps, lower, upper = pgd_limits("mixed", x.shape, device=device)
    expected = pgd_step_ref(x_adv, grad, x, step_size, eps, lower, upper)
    spaced = torch.stack([step_size, torch.full_like(step_size, float("nan"))], 1)[:, 0]
    columns = upper.flatten(1).T.contiguous().T.view(4, 3, 1, 1)
    for eps_again in (eps, eps.expand(4, 3, 1, 1), eps.clone().requires_grad_()):
        assert_same(pgd_step(x_adv, grad, x, spaced, eps_again, lower, columns), expected)
    negated = torch.complex(eps, -eps).conj().imag  # its memory holds -eps
    assert negated.is_neg()
    assert_same(pgd_step(x_adv, grad, x, step_size, negated, lower, upper), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch last"])
@pytest.mark.parametrize("shape", [(4,), (1, 3, 1, 1), (4, 3, 1, 1), ()], ids=str)
def test_tensors_of_one_value_equal_numbers_bit_for_bit(shape, layout, device):
    x_adv, grad, x = (LAYOUTS[layout](t) for t in image_batch((4, 3, 9, 7), device=device))
    step_size, eps, lower, upper = (torch.full(shape, v, device=device) for v in (STEP, EPS, 0.1, 0.9))
    assert_same(pgd_step(x_adv, grad, x, step_size, eps, lower, upper), pgd_step(x_adv, grad, x, STEP, EPS, 0.1, 0.9))
    for noise in ("uniform", "gaussian"):
        torch.manual_seed(0)
        start = pgd_init(x, eps, noise, lower=lower, upper=upper)
        torch.manual_seed(0)
        assert_same(start, pgd_init(x, EPS, noise, lower=0.1, upper=0.9))


def test_a_step_on_normalised_images_is_the_step_on_pixels():
    x_adv, grad, x = image_batch((4, 3, 6, 8), torch.float64)
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]], dtype=torch.float64).view(2, 1, 3, 1, 1)
    ball = {"step_size": STEP / std, "eps": EPS / std, "lower": (0 - mean) / std, "upper": (1 - mean) / std}
    stepped = pgd_step((x_adv - mean) / std, grad, (x - mean) / std, **ball)
    torch.testing.assert_close(stepped * std + mean, pgd_step(x_adv, grad, x, STEP, EPS), rtol=0, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [pgd_step, pgd_step_ref])
def test_values_of_tensors_that_are_not_checked(step, device):
    """What the docstring of pgd_step promises, because a check of the values would wait for the device."""
    x_adv, _, x = image_batch((3, 3, 4, 4), device=device)
    grad, nan = torch.ones_like(x), float("nan")
    eps = torch.tensor([0.0, -0.1, nan], device=device)
    stepped = step(x_adv, grad, x, STEP, eps)
    assert_same(stepped[0], x[0].clamp(0, 1))
    assert_same(stepped[1], (x[1] - 0.1).clamp(0, 1))
    assert stepped[2].isnan().all()
    assert step(x_adv, grad, x, eps, EPS).isnan().flatten(1).all(1).tolist() == [False, False, True]
    channels = torch.tensor([0.0, 0.6, nan], device=device).view(1, 3, 1, 1)
    for lower, upper in ((channels, 0.4), (channels, 0.4 + 0 * channels), (0.9, 0.4 + 0 * channels)):
        stepped = step(x_adv, grad, x, STEP, EPS, lower, upper)
        assert stepped.isnan().any(3).any(2).any(0).tolist() == [False, False, True]
        assert (stepped[:, 1] == torch.tensor(0.4, device=device)).all()


def test_step_by_hand():
    x = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.5])
    x_adv = torch.tensor([0.5, 0.59, 0.41, 0.5, 0.0, 1.0, 0.9])
    grad = torch.tensor([3.0, 1.0, -1.0, 0.0, -1.0, 1.0, 0.0])
    # ascent, two projections, sign(0), two clamps, a start outside the ball
    expected = torch.tensor([0.55, 0.6, 0.4, 0.5, 0.0, 1.0, 0.6])
    torch.testing.assert_close(pgd_step(x_adv, grad, x, 0.05, 0.1), expected)
    torch.testing.assert_close(pgd_step(x, -torch.ones(7), x, -0.05, 0.1, upper=2), (x + 0.05))


@pytest.mark.parametrize("device", DEVICES)
def test_step_against_float64(device):
    x_adv, grad, x = image_batch((4, 3, 32, 32), device=device)
    exact = pgd_step_ref(x_adv.double(), grad.double(), x.double(), STEP, EPS)
    torch.testing.assert_close(pgd_step(x_adv, grad, x, STEP, EPS).double(), exact, rtol=0, atol=2**-23)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_is_read_and_rounded_correctly(dtype, device):
    """Each of the 65,536 values is moved so that results lie between two values, are subnormal, or are too large."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    inf = float("inf")
    for amount in (0.0, 2**-26, 1e-7, 3e-5, 2**-9, 0.3, 17.0, 8.0, 2.0**118):
        stepped = pgd_step(x, torch.ones_like(x), x, amount, inf, -inf, inf)
        assert_same(stepped, pgd_step_ref(x, torch.ones_like(x), x, amount, inf, -inf, inf))


def test_step_takes_float64_on_the_cpu():
    x_adv, grad, x = (t.double() for t in image_batch((1271,)))
    assert_same(pgd_step(x_adv, grad, x, STEP, EPS), pgd_step_ref(x_adv, grad, x, STEP, EPS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_takes_a_gradient_of_any_dtype(dtype, grad_dtype, device):
    x_adv, grad, x = image_batch((3, 41), dtype, device)
    grad = grad.to(grad_dtype)
    if grad_dtype == torch.float64:
        grad[0, 0] = 1e-60  # positive, but 0 in float32
    assert_same(pgd_step(x_adv, grad, x, STEP, EPS), pgd_step_ref(x_adv, grad, x, STEP, EPS))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_x_adv_or_x_gives_nan(device):
    x_adv, grad, x = image_batch((50,), device=device)
    x_adv[3] = x[7] = float("nan")
    stepped = pgd_step(x_adv, grad, x, STEP, EPS)
    assert stepped.isnan().nonzero().flatten().tolist() == [3, 7]
    assert pgd_init(x, EPS).isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_ball_and_infinite_range(device):
    x_adv, grad, x = image_batch((50,), device=device)
    inf = float("inf")
    assert_same(pgd_step(x_adv, grad, x, 3.0, inf, -inf, inf), pgd_step_ref(x_adv, grad, x, 3.0, inf, -inf, inf))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": lambda t: torch.cat([t, t], dim=3)[..., ::2].copy_(t),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "one channel": lambda t: t[:, :1].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_keeps_the_layout(layout, device):
    x_adv, grad, x = (LAYOUTS[layout](t) for t in image_batch((4, 3, 6, 8), device=device))
    stepped = pgd_step(x_adv, grad, x, STEP, EPS)
    assert stepped.stride() == torch.empty_like(x_adv).stride()
    torch.testing.assert_close(stepped, pgd_step_ref(x_adv, grad, x, STEP, EPS), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad_layout", [name for name in LAYOUTS if name != "one channel"])
@pytest.mark.parametrize("out_layout", [name for name in LAYOUTS if name != "one channel"])
def test_step_takes_tensors_of_different_layouts(grad_layout, out_layout, device):
    x_adv, grad, x = image_batch((4, 3, 6, 8), device=device)
    expected = pgd_step_ref(x_adv, grad, x, STEP, EPS)
    x_adv, grad = LAYOUTS["channels_last"](x_adv), LAYOUTS[grad_layout](grad)
    torch.testing.assert_close(pgd_step(x_adv, grad, x, STEP, EPS), expected, rtol=0, atol=0)
    out = LAYOUTS[out_layout](torch.zeros_like(x))
    strides = out.stride()
    assert pgd_step(x_adv, grad, x, STEP, EPS, out=out) is out
    assert out.stride() == strides
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_step_takes_a_broadcast_centre(device):
    x_adv, grad, x = image_batch((4, 3, 6, 8), device=device)
    x = x[:1].expand(4, -1, -1, -1)
    assert_same(pgd_step(x_adv, grad, x, STEP, EPS), pgd_step_ref(x_adv, grad, x, STEP, EPS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_in_place(dtype, device):
    x_adv, grad, x = image_batch((1271,), dtype, device)
    expected = pgd_step_ref(x_adv, grad, x, STEP, EPS)
    assert pgd_step(x_adv, grad, x, STEP, EPS, out=x_adv) is x_adv
    assert_same(x_adv, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_step_has_no_gradient_and_autograd_sees_the_write_to_out(device):
    x_adv, grad, x = image_batch((10,), device=device)
    x_adv, x = x_adv.requires_grad_(), x.requires_grad_()
    assert not pgd_step(x_adv, grad, x, STEP, EPS).requires_grad
    square = x_adv**2  # autograd saves x_adv for the backward
    pgd_step(x_adv, grad, x, STEP, EPS, out=x_adv)
    assert x_adv.is_leaf
    assert x_adv.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    eps=st.floats(0, 1),
    step=st.floats(0, 1),
    steps=st.integers(1, 4),
)
def test_an_attack_never_leaves_the_ball_or_the_range(size, seed, eps, step, steps):
    x = torch.rand(size, generator=generator(seed))
    x_adv = pgd_init(x, eps, generator=generator(seed))
    for k in range(steps):
        x_adv = pgd_step(x_adv, normal(size, seed=seed + k), x, step, eps)
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    assert ((x_adv.double() - x.double()).abs() <= eps + 2**-24).all()  # x +- eps is rounded once


def test_step_errors():
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"grad has shape \(3, 2\), but x_adv has shape \(2, 3\)"):
        pgd_step(x, torch.rand(3, 2), x, STEP, EPS)
    with pytest.raises(ValueError, match="x has shape"):
        pgd_step(x, x, x[0], STEP, EPS)
    with pytest.raises(ValueError, match="grad is on meta"):
        pgd_step(x, x.to("meta"), x, STEP, EPS)
    with pytest.raises(TypeError, match=r"x is torch\.float64, but x_adv is torch.float32"):
        pgd_step(x, x, x.double(), STEP, EPS)
    with pytest.raises(TypeError, match="x_adv must be float32"):
        pgd_step(x.byte(), x, x, STEP, EPS)
    with pytest.raises(TypeError, match=r"out is torch\.bfloat16"):
        pgd_step(x, x, x, STEP, EPS, out=x.bfloat16())
    with pytest.raises(ValueError, match="out has shape"):
        pgd_step(x, x, x, STEP, EPS, out=torch.empty(3, 2))
    for eps in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="eps must be a number >= 0"):
            pgd_step(x, x, x, STEP, eps)
        with pytest.raises(ValueError, match="eps must be a number >= 0"):
            pgd_init(x, eps)
    with pytest.raises(ValueError, match="step_size must be a number"):
        pgd_step(x, x, x, float("nan"), EPS)
    with pytest.raises(ValueError, match="lower must not exceed upper"):
        pgd_step(x, x, x, STEP, EPS, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"lower must not exceed upper, got \[nan, inf\]"):
        pgd_step(x, x, x, STEP, EPS, float("nan"), torch.ones(2))


@pytest.mark.parametrize("name", ["step_size", "eps", "lower", "upper"])
def test_errors_of_tensors(name):
    x = torch.rand(2, 3, 4, 4)
    calls = [lambda limit: pgd_step(x, x, x, **{"step_size": STEP, "eps": EPS, name: limit})]
    if name != "step_size":
        calls.append(lambda limit: pgd_init(x, **{"eps": EPS, name: limit}))
    for call in calls:
        for shape in ((3,), (2, 3), (3, 1, 1), (2, 3, 1), (1, 2, 1, 1), (1, 1, 4, 1), (2, 3, 4, 4), (1, 2, 3, 1, 1)):
            message = (
                rf"{name} must have one value, one per image, shape \(2,\), or one per channel, shape \(1, 3, 1, 1\)"
            )
            with pytest.raises(ValueError, match=message):
                call(torch.ones(shape))
        with pytest.raises(ValueError, match=f"{name} is on meta, but the images are on cpu"):
            call(torch.ones(2, device="meta"))
        with pytest.raises(
            TypeError, match=rf"{name} must be torch.float32 for images of dtype torch.float32, got torch.f"
        ):
            call(torch.ones(2, dtype=torch.float64))
        with pytest.raises(TypeError, match=f"{name} must be dense"):
            call(torch.ones(2).to_sparse())


def test_the_operator_checks_the_tensors_that_its_kernel_reads():
    """torch.ops can be called without the checks of the public function. A wrong tensor must not read other memory."""
    x = torch.rand(2, 3, 4, 4)
    for wrong in (torch.ones(3), torch.ones(1, 2, 1, 1), torch.ones(2, 3, 4, 1), torch.ones(2).double()):
        for position in range(4):
            tensors = [None] * 4
            tensors[position] = wrong
            with pytest.raises((ValueError, TypeError), match=r"step_size|eps|lower|upper"):
                torch.ops.ltat.pgd_step(x, x, x, 0.1, 0.1, 0.0, 1.0, *tensors)
            if position:
                with pytest.raises((ValueError, TypeError), match=r"eps|lower|upper"):
                    torch.ops.ltat.pgd_init(x, torch.tensor([1]), 0.1, 0.1, 0.0, 1.0, "uniform", *tensors[1:])


def test_out_that_partly_overlaps_an_input_is_refused():
    buffer = torch.rand(20)
    x = torch.rand(10)
    with pytest.raises(ValueError, match="overlaps"):
        pgd_step(buffer[:10], x, x, STEP, EPS, out=buffer[1:11])
    square = torch.rand(4, 4)
    with pytest.raises(ValueError, match="overlaps"):
        pgd_step(square, torch.rand(4, 4), torch.rand(4, 4), STEP, EPS, out=square.T)
    with pytest.raises(ValueError, match="overlaps"):
        pgd_step(x, x, x, STEP, buffer[:10], out=buffer[5:15])
    expected = pgd_step_ref(buffer[:10], x, x, STEP, EPS)
    assert_same(pgd_step(buffer[:10], x, x, STEP, EPS, out=buffer[10:]), expected)  # adjacent memory is allowed


# --- start --------------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Return the four words of Philox4x32-10, computed with Python integers."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniforms(count, seed):
    """Return the numbers in [0, 1] that pgd_init computes from the words."""
    words = np.array([philox(i, seed % 2**64) for i in range(-(-count // 4))], dtype=np.uint32).ravel()[:count]
    k = words.view(np.int32).astype(np.int64)
    return np.where(k < 0, -k - 1, k).astype(np.float32).astype(np.float64) / 2**31


def drawn_seed(seed):
    bounds = -(2**63), 2**63 - 1
    return torch.randint(*bounds, (1,), dtype=torch.int64, generator=generator(seed)).item()


def test_philox_gives_the_published_words():
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # known answer of Random123


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 7, 41, 1271])
def test_uniform_noise_is_philox(count, seed):
    noise = pgd_init(torch.zeros(count, dtype=torch.float64), 1.0, generator=generator(seed), lower=-1, upper=1)
    expected = 2 * uniforms(count, drawn_seed(seed)) - 1
    np.testing.assert_allclose(noise.numpy(), expected, atol=2**-24)


@pytest.mark.parametrize("count", [1, 7, 1271])
def test_gaussian_noise_is_box_muller(count):
    x = torch.zeros(count, dtype=torch.float64)
    noise = pgd_init(x, 1.0, "gaussian", generator=generator(3), lower=-1, upper=1)
    u = uniforms(-(-count // 2) * 2, drawn_seed(3)).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(np.maximum(u[:, 0], 1e-7))), 2 * np.pi * u[:, 1]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()[:count]
    np.testing.assert_allclose(noise.numpy(), GAUSSIAN_STD * expected, rtol=1e-5, atol=2e-6 * GAUSSIAN_STD)


@pytest.mark.parametrize("device", DEVICES)
def test_noise_has_the_stated_distribution(device):
    gen = torch.Generator(device).manual_seed(5)
    x = torch.full((200_000,), 0.5, device=device)
    uniform = (pgd_init(x, 0.25, generator=gen) - x).cpu().numpy()
    assert scipy.stats.kstest(uniform, scipy.stats.uniform(-0.25, 0.5).cdf).pvalue > 1e-3
    gaussian = (pgd_init(x, 0.25, "gaussian", generator=gen) - x).cpu().numpy()
    assert scipy.stats.kstest(gaussian, scipy.stats.norm(0, GAUSSIAN_STD).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(gaussian[::2], gaussian[1::2])[0, 1]) < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_start_stays_in_the_ball_and_the_range(noise, dtype, device):
    x = torch.rand(4, 3, 33, 31, generator=generator(0)).to(device, dtype)
    eps = 0.0005  # less than the standard deviation of the gaussian noise, so that the projection changes values
    start = pgd_init(x, eps, noise)
    ulp = torch.finfo(dtype).eps / 2
    assert ((start.double() - x.double()).abs() <= eps + ulp).all()
    assert ((start >= 0) & (start <= 1)).all()
    assert_same(pgd_init(x, 0.0, noise), x)
    assert (pgd_init(x, 0.3, noise, lower=0.4, upper=0.6) >= 0.4).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "batch last"])
def test_start_with_tensors_has_the_noise_of_each_ball(layout, name, device):
    """Uniform noise in the unit ball is scaled by eps, gaussian noise is projected, and both are clipped."""
    x = LAYOUTS[layout](torch.rand(4, 3, 9, 7, generator=generator(1)).to(device))
    _, eps, lower, upper = pgd_limits(name, x.shape, device=device)
    radius, low, high = (everywhere(limit, x.shape) for limit in (eps, lower, upper))
    zeros = torch.zeros_like(x)

    def draw(centre, *args, **bounds):
        start = pgd_init(centre, *args, torch.Generator(device).manual_seed(3), **bounds)
        assert start.stride() == torch.empty_like(x).stride()
        return start.cpu().double()

    noise = radius * draw(zeros, 1.0, "uniform", lower=-1)
    expected = torch.minimum(torch.maximum(x.cpu() + noise, low), high)
    torch.testing.assert_close(draw(x, eps, "uniform", lower=lower, upper=upper), expected, rtol=0, atol=2**-23)

    noise, eps = draw(zeros, 1.0, "gaussian", lower=-1), eps / 20  # so that the projection changes values
    noise = torch.minimum(torch.maximum(noise, -radius / 20), radius / 20)
    expected = torch.minimum(torch.maximum(x.cpu() + noise, low), high)
    torch.testing.assert_close(draw(x, eps, "gaussian", lower=lower, upper=upper), expected, rtol=0, atol=2**-23)


@pytest.mark.parametrize("name", LIMITS)
def test_plain_torch_start_with_tensors(name):
    x = torch.rand(64, 3, 16, 16, generator=generator(1)) * 0.2 + 0.4
    eps = pgd_limits(name, x.shape)[1]
    radius = everywhere(eps, x.shape)
    for start in (pgd_init_ref(x, eps, generator=generator(2)), pgd_init(x, eps, generator=generator(2))):
        noise = (start - x).double()
        assert (noise.abs() <= radius + 1e-7).all()
        assert noise.std() == pytest.approx(radius.square().mean().div(3).sqrt().item(), rel=0.02)
    assert (pgd_init_ref(x, eps / 20, "gaussian") - x).abs().double().le(radius / 20 + 1e-7).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_start_of_a_tensor_with_zeros_and_nan(noise, device):
    x = torch.rand(3, 3, 4, 4, generator=generator(1)).to(device) * 1.2
    start = pgd_init(x, torch.tensor([0.0, 0.1, float("nan")], device=device), noise)
    assert_same(start[0], x[0].clamp(0, 1))
    assert start.isnan().flatten(1).all(1).tolist() == [False, False, True]
    assert not start[1].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_start_is_a_function_of_its_generator(device):
    x = torch.full((2, 3, 5, 7), 0.5, device=device)

    def draw(seed):
        return pgd_init(x, 0.1, generator=torch.Generator(device).manual_seed(seed))

    assert_same(draw(1), draw(1))
    assert (draw(1) != draw(2)).float().mean() > 0.99
    gen = torch.Generator(device).manual_seed(1)
    first, second = pgd_init(x, 0.1, generator=gen), pgd_init(x, 0.1, generator=gen)
    assert_same(first, draw(1))
    assert (first != second).float().mean() > 0.99
    torch.manual_seed(7)
    a = pgd_init(x, 0.1)
    torch.manual_seed(7)
    assert_same(a, pgd_init(x, 0.1))


def test_start_does_not_depend_on_the_number_of_threads():
    x = torch.full((300_007,), 0.5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = pgd_init(x, 0.1, generator=generator(1))
        torch.set_num_threads(2)
        assert_same(pgd_init(x, 0.1, generator=generator(1)), alone)
        assert_same(pgd_step(alone, -alone, x, 0.3, 0.2), pgd_step_ref(alone, -alone, x, 0.3, 0.2))
        for layout in ("contiguous", "channels_last", "batch last"):
            x = LAYOUTS[layout](torch.rand(37, 3, 31, 29))
            limits = pgd_limits("mixed", x.shape)
            assert_same(pgd_step(x, -x, x, *limits), pgd_step_ref(x, -x, x, *limits))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_start_keeps_the_layout_and_does_not_change_its_input(layout, device):
    x = LAYOUTS[layout](torch.rand(4, 3, 6, 8, device=device)).requires_grad_()
    before = x.detach().clone()
    start = pgd_init(x, 0.1)
    assert start.stride() == torch.empty_like(x).stride()
    assert not start.requires_grad
    assert ((start - x).abs() <= 0.1 + 1e-7).all()
    assert (start != x).float().mean() > 0.9
    assert torch.equal(x, before)


def test_start_errors():
    x = torch.rand(3)
    with pytest.raises(ValueError, match="noise must be 'uniform' or 'gaussian', got 'normal'"):
        pgd_init(x, EPS, "normal")
    with pytest.raises(TypeError, match="x must be float32"):
        pgd_init(x.int(), EPS)
    with pytest.raises(ValueError, match="eps must be finite"):
        pgd_init(x, float("inf"))
    with pytest.raises(ValueError, match="lower must not exceed upper"):
        pgd_init(x, EPS, lower=2.0)


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device):
    x = torch.empty(0, 3, 4, 4, device=device)
    assert pgd_init(x, EPS).shape == x.shape
    assert pgd_step(x, x, x, STEP, EPS).shape == x.shape
    assert pgd_step(x, x, x, STEP, EPS, out=x) is x


# --- registration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("name", ["numbers", "mixed"])
def test_opcheck(name, layout, device):
    x_adv, grad, x = (LAYOUTS[layout](t) for t in image_batch((2, 3, 4, 6), device=device))
    seed, out = torch.tensor([11], device=device), torch.empty_like(x)
    tensors = () if name == "numbers" else pgd_limits(name, x.shape, device=device)
    ops = torch.ops.ltat
    torch.library.opcheck(ops.pgd_init.default, (x, seed, EPS, 1e-3, 0.0, 1.0, "uniform", *tensors[1:]))
    torch.library.opcheck(ops.pgd_step.default, (x_adv, grad, x, STEP, EPS, 0.0, 1.0, *tensors))
    torch.library.opcheck(ops.pgd_step_out.default, (x_adv, grad, x, STEP, EPS, 0.0, 1.0, out, *tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["numbers", "mixed"])
def test_compiled_fullgraph_equals_eager(name, backend, device):
    x_adv, grad, x = (LAYOUTS["channels_last"](t) for t in image_batch((2, 3, 4, 6), device=device))
    limits = pgd_limits(name, x.shape, device=device)

    def three_steps(x_adv, grad, x, step_size, eps, lower, upper):
        x_adv = pgd_step(x_adv, grad, x, step_size, eps, lower, upper)
        x_adv = pgd_step(x_adv, grad * 2, x, -step_size, eps, lower, upper, out=torch.empty_like(x))
        pgd_step(x_adv, grad, x, step_size, eps / 2, lower, upper, out=x_adv)
        return x_adv

    def start(x, eps):
        return pgd_init(x, eps, lower=-1.0)

    compiled = torch.compile(three_steps, fullgraph=True, backend=backend)
    assert_same(compiled(x_adv, grad, x, *limits), three_steps(x_adv, grad, x, *limits))
    compiled_start = torch.compile(start, fullgraph=True, backend=backend)
    first, second = compiled_start(x, limits[1]), compiled_start(x, limits[1])
    assert first.stride() == x.stride()
    assert ((first - x).cpu().abs() <= everywhere(limits[1], x.shape) + 1e-7).all()
    assert (first != second).float().mean() > 0.5  # "mixed" has a channel with eps 0


def test_function_transforms_treat_the_step_as_a_constant():
    x_adv, grad, x = image_batch((3, 41))
    weighted = torch.func.grad(lambda x_adv: (x_adv * pgd_step(x_adv, grad, x, STEP, EPS)).sum())(x_adv)
    assert_same(weighted, pgd_step(x_adv, grad, x, STEP, EPS))
    mapped = torch.vmap(lambda x_adv, grad, x: pgd_step(x_adv, grad, x, STEP, EPS))(x_adv, grad, x)
    assert_same(mapped, pgd_step(x_adv, grad, x, STEP, EPS))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_step_writes_to_the_tensor_of_the_caller(backend):
    x_adv, grad, x = image_batch((2, 3, 4, 6))
    expected = pgd_step_ref(x_adv, grad, x, STEP, EPS)

    @torch.compile(fullgraph=True, backend=backend)
    def step_in_place(x_adv, grad, x):
        pgd_step(x_adv, grad, x, STEP, EPS, out=x_adv)

    step_in_place(x_adv, grad, x)
    assert_same(x_adv, expected)


@pytest.mark.gpu
def test_graph_replays_draw_new_noise_and_step_correctly():
    x_adv, grad, x = image_batch((4, 3, 8, 8), device="cuda")
    static = x_adv.clone()

    def work():
        start = pgd_init(x, EPS)
        pgd_step(static, grad, x, STEP, EPS, out=static)
        return start

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start = work()
    static.copy_(x_adv)
    expected, starts = x_adv, []
    for _ in range(3):
        graph.replay()
        starts.append(start.clone())
        expected = pgd_step_ref(expected, grad, x, STEP, EPS)
        assert_same(static, expected)
    assert (starts[0] != starts[1]).float().mean() > 0.8
    assert (starts[1] != starts[2]).float().mean() > 0.8
