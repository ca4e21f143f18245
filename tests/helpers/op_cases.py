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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=generator(seed))).to(device, dtype)


def assert_same(actual, expected):
    """Compare bit for bit. NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)
