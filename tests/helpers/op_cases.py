"""Inputs and tolerances that the op tests share."""

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]

# (rows, classes): one class, fewer classes than a vector, one vector and a remainder, real sizes, odd sizes, more
# classes than a chunk.
SHAPES = [
    (1, 1),
    (1, 2),
    (7, 10),
    (128, 16),
    (41, 17),
    (128, 100),
    (16, 200),
    (3, 256),
    (7, 257),
    (5, 1271),
    (2, 10007),
]

# Tolerance of a loss against float64 on the same (rounded) inputs. Arithmetic is float32 for every dtype.
LOSS = {"rtol": 2e-5, "atol": 2e-6}
# Tolerance of a gradient: float32 arithmetic, then one rounding to the dtype.
EPS = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 0.0}


def gradient_tolerance(dtype):
    # 6e-8 is the smallest subnormal of float16: a smaller gradient may be rounded to 0
    return {"rtol": 2e-5 + EPS[dtype], "atol": 1e-6 if dtype == torch.float32 else 2e-6}


# The shapes of step_size, eps, lower and upper of the PGD ops, for images of shape (B, C, ...). None is a number.
LIMITS = {
    "numbers": (None, None, None, None),
    "per image": ("image", "image", None, None),
    "per channel": ("channel", "channel", "channel", "channel"),
    "mixed": ("image", "channel", "one", "both"),
    "eps of each channel of each image": (None, "both", None, None),
}


def limit_shape(kind, shape):
    ones = [1] * (len(shape) - 2)
    images, channels = (*shape, 1, 1)[:2]
    return {
        "one": (),
        "image": (images,) if shape else (),
        "channel": (1, channels, *ones)[: len(shape)],
        "both": (images, channels, *ones)[: len(shape)],
    }[kind]


def pgd_limits(name, shape, dtype=torch.float32, device="cpu"):
    """Return step_size, eps, lower and upper for images of this shape and dtype. The first eps of a tensor is 0."""
    gen, values = generator(4), []
    for kind, low, high in zip(LIMITS[name], (0.002, 0.01, 0.0, 0.8), (0.02, 0.06, 0.2, 1.0), strict=True):
        if kind is None:
            values.append((low + high) / 2)
        else:
            value = low + (high - low) * torch.rand(limit_shape(kind, shape), generator=gen, dtype=torch.float64)
            values.append(value.to(device, torch.promote_types(dtype, torch.float32)))
    if isinstance(values[1], torch.Tensor) and values[1].numel():
        values[1].view(-1)[0] = 0
    return values


def everywhere(limit, shape):
    """Return the value of a limit at each element of images of this shape, in float64."""
    limit = torch.as_tensor(limit, dtype=torch.float64, device="cpu")
    return limit.view(limit.shape + (1,) * (len(shape) - limit.dim())).expand(shape)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=generator(seed))).to(device, dtype)


def assert_same(actual, expected):
    """Compare bit for bit. NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)
