"""The image operations of RandAugment and AutoAugment on batches, bit-equal to torchvision's on PIL images.

Published results were trained on images that Pillow augmented one at a time. Here each operation takes a uint8 batch
(n, 3, H, W) and its arguments, float64 (n, 6) with one row per image (see :func:`kernel_arguments`), and returns a
uint8 batch of the same shape. It computes in integers, or in floating point with Pillow's precision and order of
operations, so that the result equals Pillow's on every device. No operation waits for the device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

FIXED = 16
"""fractional bits of the affine coefficients, as in Pillow's nearest-neighbour transform"""


def affine(x: Tensor, coefficients: Tensor) -> Tensor:
    """Apply an affine transform with nearest-neighbour sampling; pixels from outside the image are black.

    ``coefficients`` are (a, b, c, d, e, f) in fixed point. The output pixel in column j and row i is the input pixel in
    column ``a*j + b*i + c`` and row ``d*j + e*i + f``, both rounded down.
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
    """Blend with black."""
    return _blend(torch.zeros_like(x), x, factor)


def color(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey version of the image."""
    return _blend(_grey(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey level of the image, rounded to an integer."""
    pixels = x.shape[2] * x.shape[3]
    total = _grey(x).sum((2, 3), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), x, factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with a 3x3 smoothing: weight 5 at the centre, 1 elsewhere, and an unchanged border."""
    x32 = x.int()
    rows = x32[:, :, :-2] + x32[:, :, 1:-1] + x32[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x32[:, :, 1:-1, 1:-1]
    smooth = x32.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return _blend(smooth, x, factor)


def posterize(x: Tensor, mask: Tensor) -> Tensor:
    """Keep the bits set in ``mask``."""
    return x & mask[:, :1, None, None].to(torch.uint8)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values at and above ``threshold``."""
    return torch.where(x >= threshold[:, :1, None, None], 255 - x, x)


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a constant channel does not change."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    span = (high - low).double()
    scale = torch.full_like(span, 255) / span  # not 255 / span: torch computes that as 255 * (1 / span)
    stretched = (x * scale + -low.double() * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, x)


def equalize(x: Tensor, _: Tensor) -> Tensor:
    """Equalize the histogram of each channel."""
    values = x.flatten(2).long()
    levels = torch.arange(256, device=x.device).expand(*values.shape[:2], 256).contiguous()
    # The number of pixels darker than each level, by sorting: a histogram would need atomics on CUDA.
    below = torch.searchsorted(values.sort().values, levels)
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


def kernel_arguments(name: str, magnitude: float, height: int, width: int) -> tuple[int, list[float]]:
    """Return the kernel of torchvision's operation ``name``, as a position in :data:`KERNELS`, and its six arguments.

    Args:
        magnitude: in torchvision's units: degrees for Rotate, pixels for TranslateX and TranslateY, bits to keep for
            Posterize, a level for Solarize; ignored by AutoContrast, Equalize and Invert
        height, width: size of the images, in pixels

    Raises:
        KeyError: an unknown operation.
    """
    match name:
        case "ShearX":
            kernel, arguments = affine, _fixed(1, magnitude, 0, 0, 1, 0)
        case "ShearY":
            kernel, arguments = affine, _fixed(1, 0, 0, magnitude, 1, 0)
        case "TranslateX":
            kernel, arguments = affine, _fixed(1, 0, -int(magnitude), 0, 1, 0)
        case "TranslateY":
            kernel, arguments = affine, _fixed(1, 0, 0, 0, 1, -int(magnitude))
        case "Rotate":  # degrees, counter-clockwise, about the centre
            cos, sin = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
            x, y = width / 2, height / 2
            kernel, arguments = affine, _fixed(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            kernel = {"Brightness": brightness, "Color": color, "Contrast": contrast, "Sharpness": sharpness}[name]
            arguments = [1 + magnitude]
        case "Posterize":
            kernel, arguments = posterize, [256 - 2 ** (8 - int(magnitude))]
        case "Solarize":
            kernel, arguments = solarize, [math.ceil(magnitude)]
        case _:
            kernel, arguments = {"AutoContrast": autocontrast, "Equalize": equalize, "Invert": invert}[name], []
    return KERNELS.index(kernel), arguments + [0.0] * (6 - len(arguments))


def _fixed(a: float, b: float, c: float, d: float, e: float, f: float) -> list[float]:
    """Convert coefficients for pixel centres to fixed-point integers for pixel corners."""
    c, f = c + (a + b) / 2, f + (d + e) / 2
    return [math.floor(v * 2**FIXED + 0.5) for v in (a, b, c, d, e, f)]


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return ``base + factor * (x - base)``, computed in float32, clamped to 0..255 and truncated."""
    base = base.float()
    return ((x - base) * factor[:, :1, None, None].float() + base).clamp(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """Return the luma int32 (n, 1, H, W) in Pillow's fixed point."""
    red, green, blue = x.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]
