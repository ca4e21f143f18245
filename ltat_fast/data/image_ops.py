"""The image operations of RandAugment and AutoAugment on batches, bit for bit what torchvision does to a PIL image.

Published results were trained on images that Pillow augmented one at a time. Here an operation takes a batch, uint8
(n, 3, H, W), and arguments, float64 (n, 6), whose meaning is its own (:func:`arguments` makes a row of them). It
computes in integers, or in floating point of Pillow's precision and order, so the result is Pillow's on every device.
None waits for the device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

FIXED = 16
"""binary digits after the point in affine coefficients, as in Pillow's nearest-neighbour transform"""


def affine(x: Tensor, coefficients: Tensor) -> Tensor:
    """Move pixels, nearest neighbour, black outside.

    With coefficients (a, b, c, d, e, f), in fixed point, the pixel in column j and row i comes from column
    ``a*j + b*i + c`` and row ``d*j + e*i + f``, both rounded down.
    """
    n, channels, height, width = x.shape
    a, b, c, d, e, f = coefficients.long()[:, :, None, None].unbind(1)
    i = torch.arange(height, device=x.device)[:, None]
    j = torch.arange(width, device=x.device)
    column, row = (a * j + b * i + c) >> FIXED, (d * j + e * i + f) >> FIXED
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = torch.where(inside, row * width + column, 0).flatten(1)[:, None]
    moved = x.flatten(2).gather(2, source.expand(n, channels, -1)).view(x.shape)
    return moved * inside[:, None]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(x), x, factor)


def color(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    pixels = x.shape[2] * x.shape[3]
    total = _grey(x).sum((2, 3), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), x, factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    wide = x.int()
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smooth = wide.clone()  # the border stays as it is
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, x, factor)


def posterize(x: Tensor, mask: Tensor) -> Tensor:
    return x & mask[:, :1, None, None].to(torch.uint8)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= threshold[:, :1, None, None], 255 - x, x)


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    span = (high - low).double()
    scale = torch.full_like(span, 255) / span  # not 255 / span, which torch takes for 255 * (1 / span)
    stretched = (x * scale + -low.double() * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, x)


def equalize(x: Tensor, _: Tensor) -> Tensor:
    values = x.flatten(2).long()
    levels = torch.arange(256, device=x.device).expand(*values.shape[:2], 256).contiguous()
    below = torch.searchsorted(values.sort().values, levels)  # pixels darker than each level: no histogram, no atomics
    step = below.gather(2, values.amax(2, keepdim=True)) // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(0, 255)
    equalized = table.gather(2, values).to(torch.uint8).view(x.shape)
    return torch.where(step[..., None] > 0, equalized, x)


def invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


KERNELS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    affine,
    brightness,
    color,
    contrast,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
    invert,
)


def arguments(name: str, magnitude: float, height: int, width: int) -> tuple[int, list[float]]:
    """For torchvision's operation ``name`` at ``magnitude``: its place in :data:`KERNELS`, and what that takes."""
    match name:
        case "ShearX":
            kernel, numbers = affine, _fixed(1, magnitude, 0, 0, 1, 0)
        case "ShearY":
            kernel, numbers = affine, _fixed(1, 0, 0, magnitude, 1, 0)
        case "TranslateX":
            kernel, numbers = affine, _fixed(1, 0, -int(magnitude), 0, 1, 0)
        case "TranslateY":
            kernel, numbers = affine, _fixed(1, 0, 0, 0, 1, -int(magnitude))
        case "Rotate":  # degrees, against the clock, about the centre
            cos, sin = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
            x, y = width / 2, height / 2
            kernel, numbers = affine, _fixed(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            kernel = {"Brightness": brightness, "Color": color, "Contrast": contrast, "Sharpness": sharpness}[name]
            numbers = [1 + magnitude]
        case "Posterize":  # bits to keep
            kernel, numbers = posterize, [256 - 2 ** (8 - int(magnitude))]
        case "Solarize":  # invert from this level on
            kernel, numbers = solarize, [math.ceil(magnitude)]
        case _:
            kernel, numbers = {"AutoContrast": autocontrast, "Equalize": equalize, "Invert": invert}[name], []
    return KERNELS.index(kernel), numbers + [0.0] * (6 - len(numbers))


def _fixed(a: float, b: float, c: float, d: float, e: float, f: float) -> list[float]:
    """Coefficients about pixel centres, as fixed-point integers about pixel corners."""
    c, f = c + (a + b) / 2, f + (d + e) / 2
    return [math.floor(v * 2**FIXED + 0.5) for v in (a, b, c, d, e, f)]


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``base + factor * (x - base)`` in float32, clipped, truncated; factors beyond 1 move away from ``base``."""
    base = base.float()
    return ((x - base) * factor[:, :1, None, None].float() + base).clamp(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """Luma (n, 1, H, W), int32, in Pillow's fixed point."""
    red, green, blue = x.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]
