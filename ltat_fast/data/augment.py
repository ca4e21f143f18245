"""Augmentation of whole uint8 batches on the device they lie on.

What to do with each image is drawn on the CPU (:func:`draw_crops`), for a whole epoch at once: the draws are then the
same on every device and for every number of processes, and applying them needs no wait for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Crops(NamedTuple):
    """Where each image is cut out of its padded self, and whether it is mirrored; three tensors of one shape."""

    top: Tensor
    left: Tensor
    mirrored: Tensor


def draw_crops(shape: tuple[int, ...], pad: int, flip: bool, generator: torch.Generator) -> Crops:
    """Offsets uniform on 0..2*pad (int64) and mirroring (bool) with probability 1/2, or never when ``flip`` is off."""

    def offsets() -> Tensor:
        return torch.randint(2 * pad + 1, shape, generator=generator, device=generator.device)

    top, left = offsets(), offsets()
    coin = torch.randint(2, shape, generator=generator, device=generator.device).bool()
    return Crops(top, left, coin if flip else torch.zeros_like(coin))


def apply_crops(x: Tensor, pad: int, crops: Crops) -> Tensor:
    """Pad with zeros, cut each image back to its size at its own place, mirror it or not; (N, C, H, W), any dtype.

    ``crops`` holds N entries on the device of ``x``. One gather, with one index for all the channels of a pixel.
    """
    n, channels, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)
    rows = crops.top[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    columns = crops.left[:, None] + torch.where(crops.mirrored[:, None], columns.flip(0), columns)
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(n, 1, -1)
    return padded.gather(2, pixels.expand(n, channels, -1)).view(x.shape)


def crop_flip(x: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop out of ``pad`` zeros a side and random horizontal mirroring of uint8 (N, C, H, W) images."""
    crops = draw_crops((len(x),), pad, flip, generator)
    return apply_crops(x, pad, Crops(*(draw.to(x.device) for draw in crops)))
