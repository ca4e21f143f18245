"""Value tests of kernels/pgd.py, on the CPU with TRITON_INTERPRET=1, else on the GPU. test_interpret.py runs them."""

import os

import numpy as np
import pytest
import torch

from helpers.op_cases import LIMITS, everywhere, pgd_limits
from ltat_fast.kernels.pgd import BLOCK, launch_init, launch_step
from ltat_fast.ops import pgd, pgd_step_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 1, 7, 41: fewer elements than a thread, a warp and a block take. 1271: one block and a remainder. (4, 3, 16, 16): only
# whole blocks.
SHAPES = [(1,), (7,), (41,), (1271,), (4, 3, 16, 16)]
EPS, STEP = 8 / 255, 2 / 255


def images(shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def normal(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def seed_tensor(seed):
    return torch.tensor([seed], dtype=torch.int64, device=DEVICE)


def stored(v, dtype):
    """Round fp32 to the storage dtype: to nearest, or truncated for bf16, as in Triton's interpreter.

    test_compile.py checks that the compiled kernel rounds to nearest.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        v = (v.view(torch.int32) & -(2**16)).view(torch.float32)
    return v.to(dtype)


def step_reference(x_adv, grad, x, step_size, eps, lower, upper):
    """The definition in plain fp32 torch, one operation per line, rounded to the dtype of x_adv at the end."""
    v = x_adv.float() + step_size * grad.float().sign()
    v = torch.maximum(v, x.float() - eps)
    v = torch.minimum(v, x.float() + eps)
    return stored(v.clamp(lower, upper), x_adv.dtype)


def start(x, seed, noise="uniform", eps=EPS, lower=0.0, upper=1.0, std=0.001):
    out = torch.full_like(x, float("nan"))
    launch_init(x, out, seed_tensor(seed), eps, lower, upper, noise, std)
    return out


# ---- the ascent step


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_equals_torch_bit_for_bit(shape, dtype, grad_dtype):
    x = images(shape, dtype)
    # Half of the iterates start outside the ball or the image range, and a fifth of the gradients are zero.
    x_adv = (x.float() + 2 * EPS * normal(shape, seed=2)).to(dtype)
    grad = normal(shape, grad_dtype)
    grad[images(shape, seed=3) < 0.2] = 0
    out = torch.full_like(x, float("nan"))
    launch_step(x_adv, grad, x, out, STEP, EPS, 0.0, 1.0)
    assert torch.equal(out, step_reference(x_adv, grad, x, STEP, EPS, 0.0, 1.0))


def test_step_is_within_an_ulp_of_float64():
    x, grad = images(1271), normal(1271)
    x_adv = (x + EPS * (2 * images(1271, seed=5) - 1)).clamp(0, 1)
    out = torch.empty_like(x)
    launch_step(x_adv, grad, x, out, STEP, EPS, 0.0, 1.0)
    x64 = x.double()
    exact = torch.clamp((x_adv.double() + STEP * grad.double().sign()).clamp(x64 - EPS, x64 + EPS), 0, 1)
    assert (out.double() - exact).abs().max() < 1.2e-7


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_step_keeps_the_layout_and_may_work_in_place(layout):
    x, x_adv, grad = (f((2, 3, 9, 5)).contiguous(memory_format=layout) for f in (images, images, normal))
    x_adv.add_(EPS)
    expected = step_reference(x_adv, grad, x, STEP, EPS, 0.0, 1.0)
    launch_step(x_adv, grad, x, x_adv, STEP, EPS, 0.0, 1.0)
    assert torch.equal(x_adv, expected)
    assert x_adv.is_contiguous(memory_format=layout)


def test_step_writes_nothing_beyond_its_tensors():
    buffer = torch.full((1271 + 64,), 9.0, device=DEVICE)
    x, grad = images(1271), normal(1271)
    launch_step(x, grad, x, buffer[16 : 16 + 1271], STEP, EPS, 0.0, 1.0)
    assert (buffer[:16] == 9).all()
    assert (buffer[16 + 1271 :] == 9).all()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.5, 3.25)])
def test_step_special_gradients(bounds):
    """As with torch.sign, NaN and +-0 do not move the iterate, and +-inf and denormals do."""
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([nan, 0.0, -0.0, inf, -inf, 1e-40, -1e-40, 3.0], device=DEVICE)
    x = torch.full_like(grad, 0.5)
    out = torch.empty_like(x)
    launch_step(x, grad, x, out, STEP, EPS, *bounds)
    # A GPU may flush fp32 denormals; everything else is exact.
    keep = slice(None) if INTERPRETED else [0, 1, 2, 3, 4, 7]
    assert torch.equal(out[keep], step_reference(x, grad, x, STEP, EPS, *bounds)[keep])
    assert out[0] == 0.5


def test_step_keeps_nan_of_the_images():
    nan = float("nan")
    x_adv = torch.tensor([nan, 0.5, nan, 0.5], device=DEVICE)
    x = torch.tensor([0.5, nan, nan, 0.5], device=DEVICE)
    out = torch.empty_like(x)
    launch_step(x_adv, torch.ones_like(x), x, out, STEP, EPS, 0.0, 1.0)
    assert out.isnan().tolist() == [True, True, True, False]


def test_empty_tensors():
    x = torch.empty(0, 3, 4, 4, device=DEVICE)
    launch_step(x, x, x, x, STEP, EPS, 0.0, 1.0)
    launch_init(x, x, seed_tensor(0), EPS, 0.0, 1.0, "uniform")


@pytest.mark.skipif(INTERPRETED, reason="needs 13 GiB of GPU memory; the interpreter would take hours")
def test_step_beyond_2_to_31_elements():
    n = 2**31 + 4096
    x = torch.full((n,), 0.5, dtype=torch.bfloat16, device=DEVICE)
    grad = torch.ones_like(x)
    grad[-1] = -1
    out = torch.empty_like(x)
    launch_step(x, grad, x, out, 0.25, 0.25, 0.0, 1.0)
    assert out[:-1].eq(0.75).all()
    assert out[-1] == 0.25


# ---- limits that differ between images and channels


# Images with less than a block each, with a whole number of blocks and with other numbers; channels with one and with
# half a block, so that an index is constant in a block or not; more than one block, the last one not full.
LIMIT_SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 9, 7),
    (3, 2, 32, 32),
    (2, 3, 16, 32),
    (2, 4, 25, 23),
    (700, 3),
    (1300,),
    (4, 400, 2),
]
FORMATS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


LAID_OUT = [
    (shape, layout) for shape in LIMIT_SHAPES for layout in FORMATS if len(shape) == 4 or layout == "contiguous"
]


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "numbers"])
@pytest.mark.parametrize(("shape", "layout"), LAID_OUT, ids=str)
def test_step_with_tensors_equals_torch_bit_for_bit(shape, layout, name):
    x, x_adv, grad = (FORMATS[layout](f(shape)) for f in (images, images, normal))
    x_adv.add_(EPS)
    limits = pgd_limits(name, shape, device=DEVICE)
    out = torch.full_like(x, float("nan"))
    launch_step(x_adv, grad, x, out, *limits)
    everywhere_ = (everywhere(limit, shape).float().to(DEVICE) for limit in limits)
    assert torch.equal(out, step_reference(x_adv, grad, x, *everywhere_))


@pytest.mark.parametrize("name", ["per image", "per channel", "mixed"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", LIMIT_SHAPES[1:3], ids=str)
def test_start_with_tensors_has_the_noise_of_each_ball(shape, layout, name):
    x = FORMATS[layout](images(shape))
    _, eps, lower, upper = pgd_limits(name, shape, device=DEVICE)
    radius, low, high = (everywhere(limit, shape).float().to(DEVICE) for limit in (eps, lower, upper))
    noise = start(torch.zeros_like(x), 5, eps=1.0, lower=-1.0)
    expected = torch.minimum(torch.maximum(x + radius * noise, low), high)
    torch.testing.assert_close(start(x, 5, "uniform", eps, lower, upper), expected, rtol=0, atol=2**-23)
    noise = start(torch.zeros_like(x), 5, "gaussian", eps=1.0, lower=-1.0, std=0.03)
    noise = torch.minimum(torch.maximum(noise, -radius), radius)
    expected = torch.minimum(torch.maximum(x + noise, low), high)
    torch.testing.assert_close(start(x, 5, "gaussian", eps, lower, upper, std=0.03), expected, rtol=0, atol=2**-23)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_stay_float32_for_images_in_half_precision(dtype):
    x, x_adv, grad = (t.to(dtype) for t in (images(1271), images(1271, seed=2), normal(1271)))
    step_size, eps = 0.1 + 0.1 * images(1271, seed=3), 0.2 * images(1271, seed=4)
    out = torch.empty_like(x)
    launch_step(x_adv, grad, x, out, step_size, eps, 0.0, 1.0)
    assert torch.equal(out, step_reference(x_adv, grad, x, step_size, eps, 0.0, 1.0))


def test_tensors_are_read_only_at_their_own_values():
    """Each image and channel has a value of its own, between values that must not be read."""
    x = images((5, 3, 7, 11))
    assert x.numel() % BLOCK
    per_image, per_channel = torch.full((5, 2), 9.0, device=DEVICE), torch.full((1, 6, 1, 1), 9.0, device=DEVICE)
    per_image[:, 0] = torch.arange(5) / 100
    per_channel[:, ::2] = 0.5 + torch.arange(3, device=DEVICE).view(1, 3, 1, 1) / 10
    out = torch.empty_like(x)
    launch_step(x, torch.ones_like(x), x, out, per_image[:, 0], 1.0, 0.0, per_channel[:, ::2])
    step, upper = torch.arange(5).view(5, 1, 1, 1) / 100, 0.5 + torch.arange(3).view(1, 3, 1, 1) / 10
    assert torch.equal(out, torch.minimum(x + step.to(DEVICE), upper.to(DEVICE)))


def test_special_values_of_tensors():
    """As the docstring of ops.pgd_step says. The values cannot be checked, because that would wait for the device."""
    x, nan = images((3, 3, 4, 4)), float("nan")
    eps, out = torch.tensor([0.0, -0.1, nan], device=DEVICE), torch.empty_like(x)
    launch_step(x + 0.1, torch.ones_like(x), x, out, STEP, eps, 0.0, 1.0)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1], (x[1] - 0.1).clamp(0, 1))
    assert out[2].isnan().all()
    for noise in ("uniform", "gaussian"):
        out = start(x, 3, noise, eps)
        assert torch.equal(out[0], x[0])
        assert out[2].isnan().all()
    bounds = torch.tensor([0.0, 0.6, nan], device=DEVICE).view(1, 3, 1, 1)
    for lower, upper in ((bounds, 0.4), (0.9, 0.4 + 0 * bounds)):
        launch_step(x, torch.ones_like(x), x, out, STEP, EPS, lower, upper)
        assert out.isnan().any(3).any(2).any(0).tolist() == [False, False, True]
        assert (out[:, 1] == torch.tensor(0.4)).all()


# ---- the random start


def philox(seed, n):
    """Return the first n words of Philox4x32-10 (Salmon et al. 2011) with counter = index // 4 and key = seed."""
    q = np.arange((n + 3) // 4, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = q & low, q >> np.uint64(32), np.zeros_like(q), np.zeros_like(q)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & low, (a >> np.uint64(32)) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:n].astype(np.uint32)


def uniforms(seed, n):
    """Return fp32 numbers in [0, 1): each word as int32, with negative values k mapped to -k - 1."""
    k = philox(seed, n).view(np.int32).astype(np.int64)
    k = np.where(k < 0, -k - 1, k)
    return k.astype(np.float32) * np.float32(4.6566127342e-10)


def test_philox_of_this_file_gives_the_published_vector():
    assert [hex(w) for w in philox(0, 4)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("n", [1, 7, 41, 1271, 2048])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 12345, -3])
def test_uniform_start_is_philox(seed, n):
    x = torch.zeros(n, device=DEVICE)
    u = torch.from_numpy(uniforms(seed, n))
    assert torch.equal(start(x, seed, eps=0.25, lower=-1.0).cpu(), 0.25 * (2 * u - 1))


def test_gaussian_start_is_box_muller_of_philox():
    n = 4096
    u = uniforms(11, n).astype(np.float64).reshape(-1, 2)
    r, angle = np.sqrt(-2 * np.log(np.maximum(u[:, 0], 1e-7))), 2 * np.pi * u[:, 1]
    expected = torch.from_numpy(np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1).reshape(-1))
    out = start(torch.zeros(n, device=DEVICE), 11, "gaussian", eps=100.0, lower=-100.0, upper=100.0, std=1.0)
    assert (out.cpu().double() - expected).abs().max() < 3e-6


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_statistics(noise):
    n = 1 << 15
    std = 1 / 3**0.5 if noise == "uniform" else 1.0
    bound = 1.0 if noise == "uniform" else 10.0
    x = torch.zeros(n, device=DEVICE)
    a, b = (start(x, s, noise, eps=bound, lower=-bound, upper=bound, std=1.0).double() / std for s in (1, 2))
    five_sigma = 5 / n**0.5
    kurtosis = 1.8 if noise == "uniform" else 3.0
    assert a.mean().abs() < five_sigma
    assert (a.var() - 1).abs() < five_sigma * (kurtosis - 1) ** 0.5
    assert ((a**4).mean() - kurtosis).abs() < five_sigma * (1.7 if noise == "uniform" else 96**0.5)
    for lag in (1, 2, 3, 4, 1024):  # neighbours in a counter, in the next counters, in the next block
        assert (a[lag:] * a[:-lag]).mean().abs() < five_sigma
    assert (a * b).mean().abs() < five_sigma  # seeds are independent
    if noise == "uniform":
        assert a.abs().max() <= 3**0.5
        assert (a.max() - a.min()) > 2 * 3**0.5 * (1 - 10 / n)
        counts = torch.histc(a.float().cpu(), bins=64, min=-(3**0.5), max=3**0.5)
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi-squared, 5 sigma


def test_noise_depends_on_the_seed_and_not_on_the_size():
    x = torch.zeros(5000, device=DEVICE)
    a, b, prefix = start(x, 7, lower=-1.0), start(x, 7, lower=-1.0), start(x[:1271], 7, lower=-1.0)
    assert torch.equal(a, b)
    assert torch.equal(a[:1271], prefix)
    assert not torch.equal(a, start(x, 8, lower=-1.0))


def test_a_refilled_seed_tensor_is_read_again():
    """A replayed CUDA graph needs this: the seed is data, not a launch argument."""
    x, seed = torch.zeros(64, device=DEVICE), seed_tensor(3)
    a, b = torch.empty_like(x), torch.empty_like(x)
    launch_init(x, a, seed, EPS, -1.0, 1.0, "uniform")
    seed.fill_(4)
    launch_init(x, b, seed, EPS, -1.0, 1.0, "uniform")
    assert torch.equal(b, start(x, 4, lower=-1.0))
    assert not torch.equal(a, b)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_cuda_graph_replays_with_new_noise():
    x, grad, seed = images((4, 3, 32, 32)), normal((4, 3, 32, 32)), seed_tensor(1)
    x_adv = torch.empty_like(x)

    def attack():
        launch_init(x, x_adv, seed, EPS, 0.0, 1.0, "uniform")
        launch_step(x_adv, grad, x, x_adv, STEP, EPS, 0.0, 1.0)

    attack()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attack()
    replays = []
    for s in range(5):
        seed.fill_(s)
        graph.replay()
        replays.append(x_adv.clone())
        attack()
        assert torch.equal(replays[-1], x_adv)
    assert len({r.double().sum().item() for r in replays}) == 5


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_start_stays_in_the_ball_and_the_range(shape, dtype, noise):
    x = images(shape, dtype)
    # The standard deviation is the radius of the ball, so that the projection changes many values.
    out = start(x, 5, noise, std=EPS)
    ulp = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-12}[dtype]
    assert out.dtype == dtype
    assert ((out.double() - x.double()).abs() <= EPS + ulp).all()
    assert ((out >= 0) & (out <= 1)).all()


def test_gaussian_start_has_the_given_standard_deviation():
    x = torch.full((1 << 14,), 0.5, device=DEVICE)
    assert abs((start(x, 9, "gaussian") - x).double().std().item() / 0.001 - 1) < 0.03


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_start_walks_storage_order_in_place(layout):
    x = torch.zeros(2, 3, 9, 5, device=DEVICE).contiguous(memory_format=layout)
    launch_init(x, x, seed_tensor(1), 0.5, -1.0, 1.0, "uniform")
    flat = x.permute(0, 2, 3, 1).reshape(-1) if layout == torch.channels_last else x.reshape(-1)
    assert torch.equal(flat.cpu(), 0.5 * (2 * torch.from_numpy(uniforms(1, 270)) - 1))


# ---- the functions that ltat_fast/ops/pgd.py registers for CUDA: they bring all tensors into one layout

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": lambda t: torch.repeat_interleave(t, 2, 3)[..., ::2],
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "broadcast": lambda t: t,
}


def images_in(layout):
    """The layout's function, x_adv, grad, x, and x in the layout. The two images of x are equal, for "broadcast"."""
    shape = (2, 3, 5, 7)
    x_adv, grad, x = images(shape), normal(shape), images(shape, seed=2)
    x[1] = x[0]
    to_layout = LAYOUTS[layout]
    return to_layout, x_adv, grad, x, x[:1].expand(2, -1, -1, -1) if layout == "broadcast" else to_layout(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered_step_takes_any_layout(layout):
    to_layout, x_adv, grad, x, centre = images_in(layout)
    expected = pgd_step_ref(x_adv, grad, x, 0.1, 0.2)
    for slope in (to_layout(grad), grad):
        args = (to_layout(x_adv), slope, centre, 0.1, 0.2, 0.0, 1.0)
        stepped = pgd._pgd_step_cuda(*args)
        assert stepped.stride() == torch.empty_like(args[0]).stride()
        torch.testing.assert_close(stepped, expected, rtol=0, atol=0)
        out = to_layout(torch.zeros_like(x))
        strides = out.stride()
        pgd._pgd_step_out_cuda(*args, out)
        assert out.stride() == strides
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered_functions_take_tensors_and_any_layout(layout):
    to_layout, x_adv, grad, x, centre = images_in(layout)
    step_size, eps, lower, upper = pgd_limits("mixed", x.shape, device=DEVICE)
    expected = pgd_step_ref(x_adv, grad, x, step_size, eps, lower, upper)
    args, tensors = (to_layout(x_adv), grad, centre, 9.0, 9.0, 9.0, -9.0), (step_size, eps, lower, upper)
    torch.testing.assert_close(pgd._pgd_step_cuda(*args, *tensors), expected, rtol=0, atol=0)
    out = to_layout(torch.zeros_like(x))
    pgd._pgd_step_out_cuda(*args, out, *tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    only_eps = pgd._pgd_step_cuda(*args[:3], 0.1, 9.0, 0.0, 1.0, None, eps, None, None)
    torch.testing.assert_close(only_eps, pgd_step_ref(x_adv, grad, x, 0.1, eps), rtol=0, atol=0)
    for noise in ("uniform", "gaussian"):
        start = pgd._pgd_init_cuda(centre, seed_tensor(5), 9.0, 1e-3, 9.0, -9.0, noise, eps, lower, upper)
        assert torch.equal(start, pgd_step_ref(start, torch.zeros_like(x), x, 0.0, eps, lower, upper))
        assert (start != x).float().mean() > 0.5  # one of three channels has eps 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered_start_takes_any_layout(layout):
    _, _, _, x, centre = images_in(layout)
    start = pgd._pgd_init_cuda(centre, seed_tensor(5), 0.1, 1e-3, 0.0, 1.0, "uniform")
    assert start.stride() == torch.empty_like(centre).stride()
    assert ((start - x).abs() <= 0.1 + 1e-7).all()
    assert (start != x).float().mean() > 0.9
